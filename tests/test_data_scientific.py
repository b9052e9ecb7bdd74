"""Images of many channels and more than 8 bits, and what is measured of a data set."""

import io

import numpy as np
import pytest
import tifffile
import torch
from conftest import make_loader, make_source, of_type, random_noise, undivided

from mae.data import stats, transforms
from mae.data.crops import resize
from mae.data.prepare import Prepare
from mae.data.source import Arrays, BadImage
from mae.data.sources.scientific import Bands, scientific_folder
from mae.data.sources.torchvision import digits


def npy(values, **options):
    out = io.BytesIO()
    np.save(out, values, **options)
    return bytearray(out.getvalue())


def tiff(values, **options):
    out = io.BytesIO()
    tifffile.imwrite(out, values, **options)
    return bytearray(out.getvalue())


def bands(kind, channels=5, height=12, width=20):
    return (np.random.default_rng(0).random((channels, height, width)) * 60_000).astype(kind)


@pytest.fixture
def root(tmp_path):
    """Two classes of 5-channel uint16 images, as .npy and TIFF."""
    for k, name in enumerate(("field", "town")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(8):
            values = bands(np.uint16) // (k + 1)
            make, suffix = (npy, "npy") if i % 2 else (tiff, "tif")
            (tmp_path / "set" / name / f"{i}.{suffix}").write_bytes(make(values))
    return tmp_path / "set"


def opened(root, split="train", **changes):
    options = {"in_chans": 5, "val_fraction": 0.25, "layout": "chw", "max_pixels": 10**6, "follow_links": False}
    options |= {"cache_dir": str(root.parent / "cache"), "splits": "auto"} | changes
    return make_source(scientific_folder, split, root=str(root), **options)


@pytest.mark.parametrize("make", [npy, tiff])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32", ">u2", ">f4", "int32", "float64"])
def test_values_are_kept(make, kind):
    values = bands(kind) if kind != "uint8" else bands("uint16").astype("uint8")
    kept = {"uint8": torch.uint8, "uint16": torch.uint16, ">u2": torch.uint16}.get(kind, torch.float32)
    image = Bands(5, "chw", 10**6)(make(values))
    assert image.dtype == kept and image.shape == (5, 12, 20)
    assert np.array_equal(image.numpy().astype(np.float64), values.astype(np.float32))
    turned = Bands(5, "hwc", 10**6)(make(np.ascontiguousarray(values.transpose(1, 2, 0))))
    assert torch.equal(image.float(), turned.float())
    assert Bands(1, "chw", 10**6)(make(values[0])).shape == (1, 12, 20)


BAD = {
    "shape": (npy(np.zeros((3, 4, 5))), "its shape is"),
    "channels": (tiff(np.zeros((3, 9, 9), np.uint16)), "data.in_chans=5"),
    "nan": (npy(np.full((5, 4, 4), np.nan)), "NaN"),
    "pickle": (npy(np.array([{}, {}], object), allow_pickle=True), "allow_pickle"),
    "complex": (npy(np.zeros((5, 4, 4), complex)), "not numbers"),
    "empty": (bytearray(), "empty"),
    "text": (bytearray(b"hello there, this is no image"), ""),
    "cut": (npy(bands("uint16"))[:300], ""),
    "cut tiff": (tiff(bands("uint16"))[:300], ""),
    "large": (npy(np.zeros((5, 2000, 600), np.uint8)), "data.max_pixels"),
    "large tiff": (tiff(np.zeros((5, 2000, 600), np.uint8), compression="zlib"), "data.max_pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_apart(name):
    data, says = BAD[name]
    with pytest.raises(BadImage, match=says or "."):
        Bands(5, "chw", 10**6)(data)


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_five_channels_of_sixteen_bits_through_loader_and_normalisation(root, workers):
    source = opened(root)
    assert source.classes == ["field", "town"] and len(source) == 12 and len(opened(root, "val")) == 4
    measured = stats.statistics(source, np.arange(len(source)))
    loader = make_loader(
        source,
        transforms.RandomResizedCrop(img_size=[8, 16], scale=[0.8, 1.0], ratio=[1.6, 1.7], min_crop=0.0, hflip=True),
        12,
        6,
        0,
        masking=random_noise(8),
        num_workers=2,
        workers=workers,
        prefetch=2,
        timeout_s=60.0,
        repeats=1,
        fraction=1.0,
        per_class=None,
        max_bad_fraction=0.0,
    )
    prepare = Prepare(mean=measured.mean, std=measured.std)
    for batch in next(loader.steps(0)):
        assert batch["image"].dtype == torch.uint16 and batch["image"].shape == (6, 5, 8, 16)
        ready = prepare(batch["image"], batch["flip"])
        assert ready.dtype == torch.float32 and ready.mean().abs() < 0.5 and 0.5 < ready.std() < 1.5
    loader.close()


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_files_of_two_types_are_named(root, workers):
    for path in root.glob("town/*.npy"):
        path.write_bytes(npy((bands(np.uint16) // 256).astype(np.uint8)))
    transform = transforms.RandomResizedCrop(img_size=8, scale=[0.2, 1.0], ratio=[0.75, 1.33], min_crop=0.0, hflip=True)
    options = {"prefetch": 2, "timeout_s": 60.0, "repeats": 1, "fraction": 1.0, "per_class": None}
    source = opened(root, val_fraction=0.01)
    loader = make_loader(source, transform, 14, 14, 0, num_workers=1, workers=workers, max_bad_fraction=0.0, **options)
    name = r"(field|town)/\d\.(npy|tif)"
    with pytest.raises(
        ValueError, match=rf"^{name} holds uint(8|16) and {name} uint(16|8): all files must be of one type\.$"
    ):
        list(map(list, loader.steps(0)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_statistics_are_those_of_all_pixels(dtype):
    images = (torch.rand(40, 3, 7, 9) * torch.tensor([50, 150, 250]).view(3, 1, 1)).to(dtype)
    found = stats.statistics(Arrays(images, None, [], "x"), np.arange(40), workers=3)
    values = images.numpy().astype(np.float64) / {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 1)
    assert np.allclose(found.mean, values.mean((0, 2, 3)), rtol=1e-12)
    assert np.allclose(found.std, values.std((0, 2, 3)), rtol=1e-9)
    assert found.images == 40 and found.bad == [] and found.sizes == {(7, 9): 40}


def test_statistics_pass_over_bad_images(root):
    (root / "town" / "0.tif").write_bytes(b"nothing")
    (root / "town" / "1.npy").write_bytes(b"")
    source = undivided(opened(root))
    found = stats.statistics(source, np.arange(len(source)), workers=2)
    assert found.images == 14 and sorted(one.name for one in found.bad) == ["town/0.tif", "town/1.npy"]
    parts = [stats.statistics(source, np.arange(r, len(source), 3)) for r in range(3)]
    together = parts[0].merged(parts[1]).merged(parts[2])
    assert together.mean == pytest.approx(found.mean, rel=1e-12) and together.std == pytest.approx(found.std, rel=1e-9)
    assert together.sizes == found.sizes and sorted(together.bad) == sorted(found.bad)


def test_statistics_of_ranks_of_which_one_reads_nothing(root):
    for path in (root / "town").iterdir():
        path.write_bytes(b"")
    source = undivided(opened(root))
    good, none = (stats.statistics(source, np.arange(start, start + 8)) for start in (0, 8))
    for merged in (good.merged(none), none.merged(good)):
        assert merged.mean == good.mean and merged.images == 8 and len(merged.bad) == 8
    assert none.merged(none).images == 0


def test_blocks_of_a_large_image_are_merged(monkeypatch):
    image = (torch.rand(2, 50, 70) * 200).to(torch.uint8)
    whole = stats.Moments.of(image)
    monkeypatch.setattr(stats, "BLOCK", 999)
    parts = stats.Moments.of(image)
    assert np.allclose(whole.mean, parts.mean, rtol=1e-13) and np.allclose(whole.square, parts.square, rtol=1e-11)


def test_worker_counts():
    assert [list(stats.worker_counts(n)) for n in (1, 2, 6, 16)] == [[1], [1, 2], [1, 2, 3, 4, 6], [1, 2, 3, 4, 8, 16]]


def test_the_numbers_of_digits_yaml():
    source = of_type(Arrays, digits("train", in_chans=3, val_fraction=0.2))
    larger = Arrays(resize(source.images.flatten(0, 1), (32, 32)).unflatten(0, (-1, 3)), None, [], "x")
    found = stats.statistics(larger, np.arange(len(larger)))
    assert found.mean == pytest.approx([0.31] * 3, abs=0.005) and found.std == pytest.approx([0.35] * 3, abs=0.005)


def test_class_counts_speed_and_contact_sheet(root):
    source = opened(root)
    assert stats.class_counts(source) == {"field": 6, "town": 6}
    assert stats.class_counts(Arrays(torch.zeros(2, 1, 2, 2), None, [], "x")) == {}

    def make(count):
        return make_loader(
            source,
            transforms.CenterCrop(img_size=8, crop_fraction=1.0),
            6,
            6,
            0,
            num_workers=count,
            workers="auto",
            prefetch=2,
            timeout_s=60.0,
            repeats=1,
            fraction=1.0,
            per_class=None,
            max_bad_fraction=0.0,
        )

    speeds = stats.loading_speed(make, [0, 1], batches=4)
    assert list(speeds) == [0, 1] and all(v > 0 for v in speeds.values())
    batch = next(iter(next(make(0).steps(0))))
    sheet = stats.contact_sheet(batch["image"], batch["flip"], columns=4)
    assert sheet.size == (4 * 10 + 2, 2 * 10 + 2) and len(of_type(list, sheet.getcolors(1000))) > 50
    grey = stats.contact_sheet(torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 4, 4), columns=2)
    assert grey.getpixel((2, 2)) == (0, 0, 0) and grey.getpixel((2, 8)) == (2, 2, 2)
