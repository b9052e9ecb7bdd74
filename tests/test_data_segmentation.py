"""Images with maps of classes: where they come from, what is wrong with them, and how both are cropped."""

import errno
import os

import numpy as np
import pytest
import torch
from conftest import make_eval_loader, make_source, of_type
from PIL import Image
from torch import Tensor

from mae.data.crops import cut, nearest, resize
from mae.data.source import IGNORED, BadImage, Source
from mae.data.sources.digit_scenes import digit_scenes
from mae.data.sources.segmentation import segmentation_bands, segmentation_folder
from mae.data.transforms import CenterCrop, Draw, RandomScaleCrop, WholeImage
from mae.errors import UserError

SCENES = {"in_chans": 3, "val_fraction": 0.2, "canvas": 32, "digits_per_scene": 3, "scenes": 6, "val_scenes": 4}
FOLDER = {
    "images": ["images/train", "images/val"],
    "maps": ["masks/train", "masks/val"],
    "image_suffix": None,
    "map_suffix": ".png",
    "ignore": 255,
    "reduce_zero_label": False,
    "num_classes": 3,
    "in_chans": 3,
    "exif_orientation": False,
    "max_pixels": 1 << 20,
}


def draw(*numbers: float) -> Draw:
    """Random numbers: the scale, then the corner."""
    values = [0.5] * 32
    values[0], values[20], values[21] = numbers
    return Draw(values, 0)


def test_scenes_of_digits_are_always_the_same_and_split_by_digit():
    first, again = (make_source(digit_scenes, "train", **SCENES) for _ in range(2))
    val = make_source(digit_scenes, "val", **SCENES)
    assert (len(first), len(val), len(first.classes)) == (6, 4, 11)
    for index in range(6):
        assert all(torch.equal(a, b) for a, b in zip(sample(first, index), sample(again, index), strict=True))
    image, labels = sample(first, 0)
    assert image.shape == (3, 32, 32) and labels.shape == (32, 32) and image.dtype == labels.dtype == torch.uint8
    assert 2 <= len(labels.unique()) <= 4 and image[0][labels > 0].float().mean() > image[0][labels == 0].float().mean()
    assert image[0][labels == 0].float().mean() < 24
    assert not torch.equal(image, val[0][0])


def test_image_and_map_are_cropped_to_the_same_pixels():
    """The image holds its map's values, so that an unscaled crop must be equal in both, pixel by pixel."""
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (20, 30), dtype=np.uint8))
    crop = RandomScaleCrop(img_size=20, scale=[1.0, 1.0], hflip=False, mean=[0.5])
    for corner in (0.0, 0.4, 0.99):
        numbers = draw(0.0, corner, corner)
        assert torch.equal(crop(values[None], numbers)[0], crop.target(values, numbers))
        assert torch.equal(crop.target(values, numbers), values[:, int(corner * 11) : int(corner * 11) + 20])


def test_a_scaled_crop_enlarges_the_same_box_and_a_small_image_is_padded():
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (20, 30), dtype=np.uint8))
    twice = RandomScaleCrop(img_size=20, scale=[2.0, 2.0], hflip=True, mean=[0.5])
    numbers = draw(0.0, 0.5, 0.5)
    box = (5, 10, 10, 10)
    assert torch.equal(
        twice.target(values, numbers), values[5:15, 10:20].repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    assert torch.equal(twice(values[None], numbers), resize(cut(values[None], box), (20, 20)))
    half = RandomScaleCrop(img_size=20, scale=[0.5, 0.5], hflip=True, mean=[0.5])
    image, target = half(values[None], numbers)[0], half.target(values, numbers)
    assert image.shape == target.shape == (20, 20) and twice.hflip
    assert (target[10:] == IGNORED).all() and (target[:, 15:] == IGNORED).all() and (image[10:] == 128).all()
    assert torch.equal(target[:10, :15], nearest(values, (10, 15)))
    assert torch.equal(image[:10, :15], resize(values[None], (10, 15))[0])


@pytest.mark.parametrize(
    ("shape", "eval_size", "expected"),
    [((40, 60), None, (40, 60)), ((10, 40), None, (20, 80)), ((40, 60), 30, (30, 45)), ((40, 60), 8, (20, 30))],
)
def test_a_validation_image_stays_whole_and_is_no_smaller_than_a_window(shape, eval_size, expected):
    whole = WholeImage(img_size=20, eval_size=eval_size)
    image, values = torch.zeros(3, *shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8)
    assert whole(image).shape[1:] == expected and whole.target(values).shape == shape


@pytest.fixture
def root(tmp_path):
    """Two training images and one of validation; maps are grey, or with a palette."""
    random = np.random.default_rng(0)
    for split, names in (("train", ("a/1.jpg", "b.png")), ("val", ("c.jpg",))):
        for name in names:
            path = tmp_path / "images" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)
            write_map(tmp_path, f"{split}/{name[:-4]}", random.integers(0, 3, (12, 16), dtype=np.uint8))
    (tmp_path / "masks" / "train" / ".hidden.png").write_bytes(b"")
    return tmp_path


def sample(source: Source, index: int) -> tuple[Tensor, Tensor]:
    """An image and its map."""
    image, target = source[index]
    return image, of_type(Tensor, target)


def write_map(root, name: str, values: np.ndarray, mode: str = "L"):
    path = root / "masks" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    if mode == "P":
        picture = Image.frombytes("P", picture.size, values.tobytes())
        picture.putpalette([k for colour in range(256) for k in (colour, 255 - colour, 0)])
    picture.save(path)


def folder(root, split="train", **changes):
    return make_source(segmentation_folder, split, root=str(root), **FOLDER | changes)


def test_images_and_maps_of_equal_names(root):
    values = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16) % 3
    values[0, :4] = 255
    write_map(root, "train/b", values, "P")
    source = folder(root)
    assert [source.name(k) for k in range(2)] == ["images/train/a/1.jpg", "images/train/b.png"]
    assert source.classes == ["0", "1", "2"] and source.labels is None and len(folder(root, "val")) == 1
    image, labels = sample(source, 1)
    assert image.shape == (3, 12, 16) and np.array_equal(labels.numpy(), values)
    box = (2, 3, 8, 9)
    region = source.region(1, lambda height, width: box)
    assert torch.equal(region[0], cut(image, box)) and torch.equal(of_type(Tensor, region[1]), cut(labels, box))
    (root / "classes.txt").write_text("sky\nroad\n\n car \n")
    assert folder(root, num_classes=None).classes == ["sky", "road", "car"]


def test_the_first_value_may_be_ignored(root):
    write_map(root, "train/b", np.array([[0, 1, 2, 3] * 4] * 12, np.uint8))
    assert sample(folder(root, reduce_zero_label=True), 1)[1][0, :4].tolist() == [IGNORED, 0, 1, 2]


def test_bands_with_maps(root):
    import tifffile

    tifffile.imwrite(root / "images" / "train" / "b.tif", np.ones((5, 12, 16), np.uint16))
    options = {key: value for key, value in FOLDER.items() if key != "exif_orientation"}
    changes = {"in_chans": 5, "layout": "chw", "images": ["images/bands", "images/val"], "maps": ["masks/bands", "x"]}
    for kind, name in (("images", "b.tif"), ("masks", "b.png")):
        (root / kind / "bands").mkdir()
        (root / kind / "train" / name).rename(root / kind / "bands" / name)
    image, labels = sample(make_source(segmentation_bands, "train", root=str(root), **options | changes), 0)
    assert image.shape == (5, 12, 16) and image.dtype == torch.uint16 and labels.shape == (12, 16)


def spoil(root, fault: str) -> dict:
    """Makes one fault, and returns the settings that show it."""
    if fault == "no map":
        (root / "masks" / "train" / "a" / "1.png").unlink()
    elif fault == "no folder":
        return {"maps": ["labels/train", "labels/val"]}
    elif fault == "no image":
        return {"image_suffix": "_rgb.png"}
    elif fault == "no count":
        return {"num_classes": None}
    elif fault == "many":
        return {"num_classes": 256}
    elif fault == "names":
        (root / "classes.txt").write_text("sky\nroad\n")
    elif fault == "latin":
        (root / "classes.txt").write_text("straße\nsky\nsea\n", encoding="latin-1")
    elif fault == "twice":
        (root / "classes.txt").write_text("sky\nsea\nsky\n")
    elif fault == "images of one name":
        Image.new("RGB", (16, 12)).save(root / "images" / "train" / "b.jpg")
    elif fault == "maps of one name":
        (root / "masks" / "train" / "b.PNG").write_bytes(b"")
    return {}


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("no map", "1 of 2 images have no map: {root}/images/train/a/1.jpg needs {root}/masks/train/a/1.png."),
        ("no folder", "data.root={root} has no folder labels/train (data.maps)."),
        ("no image", "no image lies under {root}/images/train (looked for _rgb.png)."),
        ("no count", "data.num_classes is not set, and data.root={root} has no classes.txt"),
        ("many", "data.num_classes=256: maps of 8 bits hold 255 classes at most."),
        ("names", "data.num_classes=3, but {root}/classes.txt names 2 classes: correct one of them."),
        ("latin", "{root}/classes.txt is not UTF-8 (invalid continuation byte): save it as such."),
        ("twice", "{root}/classes.txt names the class sky twice: each line must be another class."),
        (
            "images of one name",
            "data.root: {root}/images/train/b.jpg and b.png have one name but for their endings, by which images and "
            "maps are paired. Remove one, or choose by data.image_suffix, as .jpg.",
        ),
        (
            "maps of one name",
            "data.root: {root}/masks/train/b.PNG and b.png have one name but for their endings, by which images and "
            "maps are paired. Remove one.",
        ),
    ],
)
def test_faults_of_folders_are_said_in_a_sentence(root, fault, sentence):
    changes = spoil(root, fault)
    with pytest.raises(UserError) as caught:
        folder(root, **changes)
    assert sentence.format(root=root) in str(caught.value)


def test_linked_folders_and_files_are_read_and_one_that_cannot_be_read_is_said(root, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for kind in ("images", "masks"):
        (root / kind / "train" / "a").rename(elsewhere / kind)
        (root / kind / "train" / "a").symlink_to(elsewhere / kind)
        (root / kind / "train" / "again").symlink_to(root / kind / "train")  # back to a parent
    assert [folder(root).name(index) for index in range(2)] == ["images/train/a/1.jpg", "images/train/b.png"]
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("/a"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)  # root may read all folders
    with pytest.raises(UserError) as caught:
        folder(root)
    assert str(caught.value) == f"data.root: the folder {root}/images/train/a cannot be read: Permission denied."


def test_a_value_past_the_classes_ends_the_run(root):
    """It says that the settings are wrong, so that no image stands in for it."""
    write_map(root, "train/b", np.full((12, 16), 7, np.uint8))
    options = {"num_workers": 0, "workers": "auto", "prefetch": 2, "timeout_s": 60.0, "max_bad_fraction": 1.0}
    loader = make_eval_loader(folder(root), CenterCrop(img_size=8, crop_fraction=1.0), 2, 2, **options)
    with pytest.raises(UserError) as caught:
        next(iter(loader))
    sentence = "masks/train/b.png holds the value 7, which is none of the 3 classes: correct data.num_classes"
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("size", "its map has 6 x 8 pixels, and the image 12 x 16"),
        ("colours", "its map masks/train/b.png: is a picture of mode RGB, where one class number a pixel is needed"),
        ("text", "its map masks/train/b.png: not an image of a known kind"),
        ("cut", "its map masks/train/b.png:"),
    ],
)
def test_a_map_that_cannot_be_used_makes_its_image_bad(root, fault, reason):
    path = root / "masks" / "train" / "b.png"
    if fault == "size":
        write_map(root, "train/b", np.zeros((6, 8), np.uint8))
    elif fault == "colours":
        Image.new("RGB", (16, 12)).save(path)
    elif fault == "text":
        path.write_text("no picture")
    else:
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BadImage) as caught:
        folder(root).region(1, lambda height, width: (0, 0, 4, 4))
    assert reason in str(caught.value)
