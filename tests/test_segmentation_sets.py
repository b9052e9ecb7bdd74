"""Published data sets of segmentation, from small trees of the layouts in which they are shipped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, make_source, of_type, run_here
from PIL import Image
from torch import Tensor

from mae.data import SOURCES
from mae.data.source import IGNORED, Source
from mae.errors import UserError

DECODER = {"in_chans": 3, "exif_orientation": False, "max_pixels": 1 << 20}
VOC = {"sets": ["train", "val"], "map_folder": "SegmentationClass"}
SIZE = (12, 16)
LAYOUTS = {
    "ade20k": (
        "ADEChallengeData2016",
        "images/{0}/ADE_{1}_0000000{2}.jpg",
        "annotations/{0}/ADE_{1}_0000000{2}.png",
        ("training", "validation"),
    ),
    "voc2012": ("VOCdevkit/VOC2012", "JPEGImages/{1}_{2}.jpg", "SegmentationClass/{1}_{2}.png", ("", "")),
    "cityscapes": (
        ".",
        "leftImg8bit/{0}/ulm/ulm_{2}_leftImg8bit.png",
        "gtFine/{0}/ulm/ulm_{2}_gtFine_labelIds.png",
        ("train", "val"),
    ),
    "oxford_pets": ("oxford-iiit-pet", "images/{1}_cat_{2}.jpg", "annotations/trimaps/{1}_cat_{2}.png", ("", "")),
}
# values of a map, and their classes
VALUES = {
    "ade20k": ([0, 1, 2, 150], [IGNORED, 0, 1, 149]),
    "voc2012": ([0, 1, 20, 255], [0, 1, 20, IGNORED]),
    "cityscapes": ([0, 7, 8, 6, 31, 33, 30, 26], [IGNORED, 0, 1, IGNORED, 16, 18, IGNORED, 13]),
    "oxford_pets": ([1, 2, 3], [0, 1, IGNORED]),
}


def write_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_layout(root: Path, name: str) -> Path:
    """A data set of two training images and one of validation; returns the folder that its archives unpack to."""
    archive, image, label, folders = LAYOUTS[name]
    top = root / archive
    values = np.resize(np.array(VALUES[name][0], np.uint8), SIZE)
    colours = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    for folder, split, count in zip(folders, ("train", "val"), (2, 1), strict=True):
        for number in range(count):
            write_picture(top / image.format(folder, split, number), colours)
            write_picture(top / label.format(folder, split, number), values)
    lists = {
        "voc2012": {
            "ImageSets/Segmentation/train.txt": "train_0\ntrain_1\n",
            "ImageSets/Segmentation/val.txt": "val_0",
        },
        "oxford_pets": {
            "annotations/trainval.txt": "#Image CLASS-ID SPECIES BREED ID\ntrain_cat_0 1 1 1\ntrain_cat_1 1 1 1\n",
            "annotations/test.txt": "val_cat_0 1 1 1\n",
        },
    }
    for file, text in lists.get(name, {}).items():
        (top / file).parent.mkdir(parents=True, exist_ok=True)
        (top / file).write_text(text)
    return top


def published(name: str, root: Path, split: str = "train", **changes) -> Source:
    own = {"voc2012": VOC, "oxford_pets": {"ignore_border": True}}.get(name, {})
    return make_source(SOURCES[name], split, root=str(root), **DECODER | own | changes)


def classes_of(source: Source) -> list[int]:
    """The classes of the first map's pixels, in their order."""
    values = of_type(Tensor, source[0][1])
    assert values.shape == SIZE and values.dtype == torch.uint8
    return values.flatten().tolist()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_is_read_with_its_classes(name, tmp_path):
    top = write_layout(tmp_path, name)
    train, val = published(name, tmp_path), published(name, tmp_path, "val")
    assert (len(train), len(val)) == (2, 1) and train.classes == val.classes
    assert len(train.classes) == {"ade20k": 150, "voc2012": 21, "cityscapes": 19, "oxford_pets": 2}[name]
    expected = VALUES[name][1]
    assert classes_of(train) == classes_of(val) == np.resize(expected, SIZE).flatten().tolist()
    assert train.name(0) == LAYOUTS[name][1].format(LAYOUTS[name][3][0], "train", 0)
    assert len(published(name, top)) == 2  # data.root may be the inner folder


@pytest.mark.parametrize(
    ("name", "missing", "sentence"),
    [
        ("ade20k", "annotations/training/ADE_train_00000001.png", "1 of 2 maps are missing, such as {file}"),
        ("ade20k", "images", "data.root={root} has no folder images, nor ADEChallengeData2016/images"),
        ("ade20k", "images/training", "{file} holds no file *.jpg"),
        ("voc2012", "JPEGImages/train_1.jpg", "1 of 2 images are missing, such as {file}"),
        ("voc2012", "ImageSets/Segmentation/train.txt", "the list of images {file} cannot be read: No such file"),
        ("cityscapes", "gtFine", "2 of 2 maps are missing, such as {file}/train/ulm/ulm_0_gtFine_labelIds.png"),
        ("oxford_pets", "annotations/trimaps", "2 of 2 maps are missing, such as {file}/train_cat_0.png"),
    ],
)
def test_missing_files_are_named_in_a_sentence(name, missing, sentence, tmp_path):
    top = write_layout(tmp_path, name)
    file = top / missing
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError) as caught:
        published(name, tmp_path)
    assert sentence.format(root=tmp_path, file=file) in str(caught.value)


def test_an_empty_list_of_images_is_said(tmp_path):
    path = write_layout(tmp_path, "voc2012") / "ImageSets" / "Segmentation" / "train.txt"
    path.write_text("\n")
    with pytest.raises(UserError) as caught:
        published("voc2012", tmp_path)
    assert f"the list of images {path} is empty." in str(caught.value)


def test_a_list_or_a_table_that_is_not_utf8_is_said(tmp_path):
    path = write_layout(tmp_path / "voc", "voc2012") / "ImageSets" / "Segmentation" / "train.txt"
    path.write_text("grün\n", encoding="latin-1")
    with pytest.raises(UserError) as caught:
        published("voc2012", tmp_path / "voc")
    assert str(caught.value).startswith(f"data.root: the list of images {path} is not UTF-8 (invalid")
    path = write_layout(tmp_path / "ade", "ade20k") / "objectInfo150.txt"
    path.write_text("grün\n", encoding="latin-1")
    with pytest.raises(UserError) as caught:
        published("ade20k", tmp_path / "ade")
    assert str(caught.value).startswith(f"data.root: {path} is not UTF-8 (invalid")


@pytest.mark.parametrize(("name", "folder"), [("ade20k", "images/training"), ("cityscapes", "leftImg8bit/train")])
def test_images_in_linked_folders_are_read(name, folder, tmp_path):
    top = write_layout(tmp_path, name)
    before = published(name, tmp_path)
    linked = next(iter(sorted(path for path in (top / folder).rglob("*") if path.is_dir())), top / folder)
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    after = published(name, tmp_path)
    assert [after.name(k) for k in range(len(after))] == [before.name(k) for k in range(len(before))] != []


def test_the_border_of_a_pet_may_be_a_class(tmp_path):
    write_layout(tmp_path, "oxford_pets")
    source = published("oxford_pets", tmp_path, ignore_border=False)
    assert source.classes == ["pet", "background", "border"] and classes_of(source)[:3] == [0, 1, 2]


def test_further_maps_of_voc_are_read_by_a_list_and_a_folder_of_their_own(tmp_path):
    top = write_layout(tmp_path, "voc2012")
    (top / "SegmentationClass").rename(top / "SegmentationClassAug")
    (top / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("train_1\n")
    source = published("voc2012", tmp_path, sets=["trainaug", "val"], map_folder="SegmentationClassAug")
    assert [source.name(k) for k in range(len(source))] == ["JPEGImages/train_1.jpg"]


def test_names_of_ade20k_are_read_from_its_own_table(tmp_path):
    table = write_layout(tmp_path, "ade20k") / "objectInfo150.txt"
    rows = [f"{k}\t0.1\t{k}\t1\tname {k}, other name {k} " for k in range(1, 151)]
    table.write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    assert published("ade20k", tmp_path).classes[::149] == ["name 1", "name 150"]
    table.write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows[:9]]))
    with pytest.raises(UserError) as caught:
        published("ade20k", tmp_path)
    assert f"{table} names 9 classes, where ADE20K has 150." in str(caught.value)


def test_ids_of_cityscapes_are_those_of_torchvision():
    from torchvision.datasets import Cityscapes

    from mae.data.sources.segmentation_sets import CITYSCAPES_IDS

    labels = sorted(
        (label for label in Cityscapes.classes if 0 <= label.train_id < 255), key=lambda label: label.train_id
    )
    assert list(CITYSCAPES_IDS.items()) == [(label.name, label.id) for label in labels]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_segments_a_published_layout(name, tmp_path):
    write_layout(tmp_path, name)
    small = [override for override in TINY if not override.startswith("data.")]
    arguments = [*small, f"data={name}", f"data.root={tmp_path}", "data.img_size=8", "task.batch_size=2"]
    arguments += ["task=segment", "task.epochs=1", "task.warmup_epochs=0", "launcher=inline"]
    assert run_here(tmp_path / "run", *arguments) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["miou"] >= 0
