"""Augmentation: geometry, determinism, and the device half."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as TF

from mae import rng
from mae.data import crops, transforms
from mae.data.prepare import Prepare

RRC = {"img_size": [12, 20], "scale": [0.2, 1.0], "ratio": [0.75, 4 / 3], "min_crop": 0.0, "hflip": True}
NORMAL = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
BUILDERS = {
    "random_resized_crop": RRC,
    "rand_augment": RRC | NORMAL | {"policy": "rand-m9-mstd0.5-inc1", "erase_prob": 0.5},
    "color_jitter": RRC | {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "fixed_crop": {"img_size": [12, 20], "crop_fraction": None, "hflip": True},
    "center_crop": {"img_size": [12, 20], "crop_fraction": 0.9},
}


def draw(index, epoch=0, seed=0):
    key = rng.keys(seed, epoch, np.array([index]))
    return transforms.Draw(rng.uniform(key, transforms.DRAWS)[0].tolist(), int(key[0]))


def picture(height=30, width=40):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))


def seen(transform, image, drawn):
    """A sample as the reader makes it: of the box that the transform asks for."""
    box = transform.box(drawn)
    return transform(crops.inside(image, box) if box else image, drawn)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_augmentation_gives_the_size_and_hangs_on_its_draw_alone(name):
    make = transforms.AUGMENTATIONS[name]
    transform, other = make(**BUILDERS[name]), pickle.loads(pickle.dumps(make(**BUILDERS[name])))
    image = picture()
    before = image.clone()
    results = [seen(transform, image, draw(i)) for i in range(40)]
    torch.rand(3)
    np.random.rand()
    for i in reversed(range(40)):
        assert torch.equal(seen(other, image, draw(i)), results[i])
    assert all(r.shape == (3, 12, 20) and r.dtype == torch.uint8 for r in results)
    assert torch.equal(image, before)
    assert name == "center_crop" or len({r.numpy().tobytes() for r in results}) > 10


def test_numbers_are_uniform_and_uncorrelated():
    numbers = rng.uniform(rng.keys(1, 2, np.arange(20_000)), 8)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.allclose(numbers.mean(0), 0.5, atol=0.01) and np.allclose(numbers.var(0), 1 / 12, atol=0.003)
    others = [rng.uniform(rng.keys(*k, np.arange(20_000)), 8) for k in ((1, 3), (2, 2))]
    others.append(rng.uniform(rng.keys(1, 2, np.arange(20_000), 1), 8))
    columns = np.concatenate([numbers, *others], 1).T
    assert np.abs(np.corrcoef(columns) - np.eye(len(columns))).max() < 0.03


@given(
    height=st.integers(1, 600),
    width=st.integers(1, 600),
    low=st.floats(0.01, 1.0),
    index=st.integers(0, 10**6),
)
@settings(max_examples=300)
def test_crop_boxes_lie_inside(height, width, low, index):
    top, left, h, w = crops.crop_box(height, width, (low, 1.0), (0.75, 4 / 3), draw(index).numbers)
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h > 0 and w > 0


def test_crop_boxes_are_spread_as_torchvisions():
    from torchvision.transforms.v2 import RandomResizedCrop

    theirs = RandomResizedCrop(224, scale=(0.2, 1.0))
    torch.manual_seed(0)
    image = torch.zeros(3, 375, 500, dtype=torch.uint8)
    n = 4000
    a = np.array([crops.crop_box(375, 500, (0.2, 1.0), (0.75, 4 / 3), draw(i).numbers) for i in range(n)])
    b = [theirs.make_params([image]) for _ in range(n)]
    b = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in b])
    for k in range(4):
        quantiles = [np.quantile(x[:, k], np.linspace(0.1, 0.9, 9)) for x in (a, b)]
        assert np.abs(quantiles[0] - quantiles[1]).max() < 15  # pixels


@pytest.mark.parametrize("size", [(30, 41), (41, 30), (500, 375), (17, 17)])
def test_evaluation_crop_is_torchvisions(size):
    image = picture(*size)
    ours = transforms.CenterCrop(img_size=28, crop_fraction=None)(image)
    wide = TF.resize(image, [32], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(ours, TF.center_crop(wide, [28]))


def test_large_images_are_evaluated_whole():
    assert transforms.CenterCrop(img_size=448, crop_fraction=None).covered == (448, 448)
    assert transforms.CenterCrop(img_size=224, crop_fraction=None).covered == (256, 256)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.float32])
def test_scientific_types_are_cropped_too(dtype):
    image = (torch.rand(5, 30, 40) * 30_000).to(dtype)
    out = transforms.RandomResizedCrop(**RRC)(image, draw(1))
    assert out.shape == (5, 12, 20) and out.dtype == dtype
    with pytest.raises(ValueError, match="augmentation.name=rand_augment works on 8-bit images of 3 channels"):
        transforms.RandAugment(**BUILDERS["rand_augment"])(image, draw(1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_prepare_flips_and_normalises(dtype):
    image = (torch.rand(4, 3, 5, 6) * 200).to(dtype)
    before = image.clone()
    flip = torch.tensor([True, False, True, False])
    prepare = Prepare(**NORMAL)
    out = prepare(image, flip)
    assert torch.equal(image, before)
    top = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1}[dtype]
    plain = torch.where(flip[:, None, None, None], before.float().flip(-1), before.float()) / top
    mean, std = (torch.tensor(NORMAL[k]).view(3, 1, 1) for k in ("mean", "std"))
    assert torch.allclose(out, (plain - mean) / std, atol=1e-5)
    assert torch.allclose(prepare.undo(out), plain, atol=1e-5, rtol=1e-5)
    assert prepare(image).shape == image.shape and not prepare.state_dict()


def test_erased_pixels_are_normal_noise():
    image = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    options = {**BUILDERS["rand_augment"], "img_size": 64, "policy": "rand-m9-n0", "erase_prob": 1.0}
    make = transforms.RandAugment(**options)
    erased = torch.cat([make(image, draw(i)).flatten(1) for i in range(30)], 1)
    erased = erased[:, (erased != 128).any(0)].float()
    mean, std = (torch.tensor(NORMAL[k]).view(3, 1) for k in ("mean", "std"))
    normal = (erased / 255 - mean) / std
    assert normal.mean().abs() < 0.05 and abs(normal.std() - 1) < 0.06


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_resizing_gives_the_bits_of_interpolate_whatever_the_layout(channels, dtype):
    pixels = (torch.rand(97, 83, channels, generator=torch.Generator().manual_seed(0)) * 255).to(dtype)
    for image in (pixels.permute(2, 0, 1), pixels.permute(2, 0, 1).contiguous()):
        crop = image[:, 5:90, 3:70]
        plain = torch.nn.functional.interpolate(crop[None], size=(32, 48), mode="bicubic", antialias=True)[0]
        resized = crops.resize(crop, (32, 48))
        assert torch.equal(resized, plain)
        if dtype == torch.uint8 and channels in (3, 4):  # as batches travel, so that none is laid out anew
            assert resized.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("size", [32, [64, 32], 224])
@pytest.mark.parametrize("shape", [(3, 1, 600), (3, 3, 900), (3, 2000, 7), (1, 100, 9000), (5, 30, 900)])
def test_a_long_image_is_cropped_before_it_is_resized(shape, size, monkeypatch):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    image = image.to(torch.uint16) * 257 if shape[0] == 5 else image
    for name in ("center_crop", "fixed_crop"):
        options = {"img_size": size, "crop_fraction": None} | ({"hflip": True} if name == "fixed_crop" else {})
        transform = transforms.AUGMENTATIONS[name](**options)
        for number in range(3):
            monkeypatch.setattr(crops, "LONGEST", 10**9)
            whole = transform(image, draw(number)).to(torch.float32)
            monkeypatch.setattr(crops, "LONGEST", 0)
            cropped = transform(image, draw(number)).to(torch.float32)
            assert cropped.shape == whole.shape
            assert (cropped - whole).abs().max() <= (8 * 257 if shape[0] == 5 else 8)
            assert shape[1] != 1 or torch.equal(cropped, whole)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_thin_image_takes_no_more_than_its_crop(channels):
    image = torch.arange(20_000_000, dtype=torch.int64).remainder_(256).to(torch.uint8)[None, None]
    image = image.expand(channels, -1, -1).permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as decoding leaves it
    crop = transforms.CenterCrop(img_size=32, crop_fraction=None)
    lying = crop(image)  # 36 x 720,000,000 when resized
    assert lying.shape == (channels, 32, 32) and lying.unique().numel() > 1
    standing = crop(image.transpose(1, 2))  # as an Exif orientation leaves it
    assert (standing.transpose(1, 2).to(torch.int16) - lying.to(torch.int16)).abs().max() <= 1
