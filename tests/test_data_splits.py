"""Which folders are splits and which are classes; hidden names, links, and trees of any kind."""

import logging

import numpy as np
import pytest
from conftest import make_source
from PIL import Image

from mae.config.from_run import resumed
from mae.config.identity import identity
from mae.config.saved import read_config
from mae.data.sources.folder import classes_of, image_folder
from mae.data.sources.scientific import scientific_folder
from mae.errors import UserError
from tests.conftest import composed, run_here

FOLDER = {
    "in_chans": 3,
    "val_fraction": 0.25,
    "exif_orientation": False,
    "max_pixels": 10**6,
    "follow_links": False,
    "splits": "auto",
}
PIXELS = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


TINY_RUN = ["data=folder", "model.img_size=8", "model.patch_size=4", "model.embed_dim=8", "model.depth=1"]
TINY_RUN += ["model.num_heads=1", "model.decoder_embed_dim=8", "model.decoder_depth=1", "model.decoder_num_heads=1"]
TINY_RUN += ["task.batch_size=4", "task.warmup_epochs=0", "data.num_workers=0", "device=cpu", "task.epochs=1"]


def images(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        PIXELS.save(folder / f"{k}.png")


def grown(root, *folders):
    """A tree of folders with images in each."""
    for name in folders:
        images(root / name)
    return root


def opened(root, split="train", **changes):
    return make_source(image_folder, split, root=str(root), cache_dir=str(root.parent / "cache"), **(FOLDER | changes))


def names(source):
    return {source.name(i) for i in range(len(source))}


def read(root, **changes):
    """(classes, training images, validation images, whether the splits are folders), or the sentence that refuses."""
    try:
        train, val = opened(root, **changes), opened(root, "val", **changes)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return str(error)
    assert train.classes == val.classes
    return train.classes, len(train), len(val), type(train).__name__ == "Files"


# ---------------------------------------------------------------- splits and classes


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        # a class called train
        (["bus", "car", "train"], (["bus", "car", "train"], 9, 3, False)),
        (["bus", "car", "test"], (["bus", "car", "test"], 9, 3, False)),
        (["bus", "car", "Train"], (["Train", "bus", "car"], 9, 3, False)),
        # splits by other names and in other letters
        (["Training/x", "Training/y", "Testing/x", "Testing/y"], (["x", "y"], 8, 8, True)),
        (["Train/x", "Train/y", "Test/x", "Test/y", "Val/x", "Val/y"], (["x", "y"], 8, 8, True)),
        (["TRAIN/x", "TRAIN/y", "dev/x", "dev/y"], (["x", "y"], 8, 8, True)),
        (["train2017", "val2017"], ([], 4, 4, True)),
        (["training_set/x", "training_set/y", "test_set/x", "test_set/y"], (["x", "y"], 8, 8, True)),
        (["seg_train/x", "seg_train/y", "seg_test/x", "seg_test/y"], (["x", "y"], 8, 8, True)),
        # as ever
        (["train/x", "train/y", "val/x"], (["x", "y"], 8, 4, True)),
        (["train/x", "train/y"], (["x", "y"], 6, 2, False)),
        (["train", "test"], ([], 4, 4, True)),
        (["x", "y", "valve"], (["valve", "x", "y"], 9, 3, False)),
        (["train/x", "train/y", "val/x", "val/y", "extra/x"], (["x", "y"], 8, 8, True)),
    ],
)
def test_splits_are_folders_that_hold_what_splits_hold(tmp_path, folders, expected):
    assert read(grown(tmp_path / "set", *folders)) == expected


@pytest.mark.parametrize(
    ("folders", "typed"),
    [
        (
            ["bus", "car", "train", "test"],
            {"[train,test]": ([], 4, 4), "off": (["bus", "car", "test", "train"], 12, 4)},
        ),
        (["train", "extra"], {"[train]": ([], 3, 1), "off": (["extra", "train"], 6, 2)}),
        (["train/x", "train/y", "extra"], {"[train]": (["x", "y"], 6, 2), "off": (["extra", "train"], 9, 3)}),
        (["val/x", "test/x"], {"[val]": ([], 3, 1), "off": (["test", "val"], 6, 2)}),
        (["Train", "train", "val"], {"[train,val]": ([], 4, 4), "off": (["Train", "train", "val"], 9, 3)}),
        (["train-a", "val-a", "train-b", "val-b"], {"[train-b,val-b]": ([], 4, 4)}),
        (["train", "test", "my train"], {"[train,test]": ([], 4, 4), "off": (["my train", "test", "train"], 9, 3)}),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_with_what_to_type_for_each(tmp_path, folders, typed):
    root = grown(tmp_path / "set", *folders)
    said = read(root)
    assert isinstance(said, str) and "data.splits=off" in said
    for choice, expected in typed.items():
        assert f"data.splits={choice}" in said
        value = composed("data=folder", f"data.root={root}", f"data.splits={choice}").data.splits
        assert read(root, splits=value if choice == "off" else list(value))[:3] == expected


def test_images_beside_a_folder_of_training_are_refused_with_both_readings(tmp_path):
    said = read(grown(tmp_path / "set", ".", "train"))
    assert isinstance(said, str) and "data.splits=[train]" in said and "data.splits=off" in said
    assert read(tmp_path / "set", splits="off")[1:3] == (6, 2)


def test_splits_that_are_typed_must_be_there(tmp_path):
    root = grown(tmp_path / "set", "train", "val")
    assert "data.splits names Train, and" in read(root, splits=["Train"])
    assert "must be auto, off" in read(root, splits=["train", "val", "test"])
    assert "must be auto, off" in read(root, splits=["train", "train"])
    with pytest.raises(UserError, match="data.splits must be one of auto, off or a list"):
        composed("data=folder", f"data.root={root}", "data.splits=maybe")


def test_what_was_recognised_is_logged_with_counts(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    read(grown(tmp_path / "set", "Train/x", "Train/y", "Test/x", "Test/y", "val/x", "val/y"))
    assert "Train is for training: 8 images, 2 classes" in caplog.text
    assert "val is for validation: 8 images, 2 classes, Test left out" in caplog.text
    caplog.clear()
    read(grown(tmp_path / "other", "bus", "car", "train"))
    assert "the folder train is a class, as bus and car are" in caplog.text
    caplog.clear()
    read(grown(tmp_path / "deep", "archive/train/x", "archive/test/x"))
    assert f"give data.root={tmp_path / 'deep' / 'archive'}" in caplog.text


def test_classes_that_differ_between_the_splits_name_the_other_reading(tmp_path):
    said = read(grown(tmp_path / "set", "train/steam", "train/diesel", "test/a", "test/b"))
    assert "has a class that the training images lack: a" in said and "data.splits=off where train and test" in said


def test_scientific_folders_are_read_alike(tmp_path):
    for name in ("bus", "car", "train", "../parted/Train/a", "../parted/Train/b", "../parted/Test/a"):
        (tmp_path / "set" / name).resolve().mkdir(parents=True)
        for k in range(4):
            np.save((tmp_path / "set" / name).resolve() / f"{k}.npy", np.zeros((2, 4, 4), np.uint8))
    options = {"in_chans": 2, "val_fraction": 0.25, "layout": "chw", "max_pixels": 99, "follow_links": False}
    options |= {"cache_dir": str(tmp_path / "cache"), "splits": "auto"}
    for root, classes, count in (("set", ["bus", "car", "train"], 9), ("parted", ["a", "b"], 8)):
        source = make_source(scientific_folder, "train", root=str(tmp_path / root), **options)
        assert (source.classes, len(source)) == (classes, count)


def test_published_sets_are_found_in_other_letters(tmp_path):
    root = grown(tmp_path / "set", "Train/x", "Train/y", "Validation/x", "Validation/y", "test")
    options = {key: FOLDER[key] for key in ("in_chans", "exif_orientation", "max_pixels", "follow_links")}
    options |= {"cache_dir": str(tmp_path / "cache"), "parts": ["train", "val"], "classes": None}
    assert len(make_source(classes_of, "train", root=str(root), **options)) == 8
    assert names(make_source(classes_of, "val", root=str(root), **options)) == {
        f"{c}/{k}.png" for c in "xy" for k in range(4)
    }
    images(root / "TRAIN" / "x")
    with pytest.raises(ValueError, match="name the folders to take in data.parts"):
        make_source(classes_of, "train", root=str(root), **(options | {"parts": ["train", "val"]}))


def test_a_run_of_an_earlier_version_goes_on(tmp_path, capsys):
    root = grown(tmp_path / "set", "train/x", "train/y", "val/x", "val/y")
    tiny = [*TINY_RUN, f"data.root={root}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert run_here(tmp_path / "run", *tiny) == 0
    saved = tmp_path / "run" / "config.yaml"
    assert "  splits: auto\n" in saved.read_text()
    saved.write_text(saved.read_text().replace("  splits: auto\n", ""))
    (tmp_path / "run" / "summary.json").unlink()
    assert read_config(tmp_path / "run").data.splits == "auto"
    capsys.readouterr()
    assert run_here(tmp_path / "run", *tiny) == 0
    said = capsys.readouterr().err
    assert "resumed at step 2" in said and "have changed" not in said  # the same images in the same order
    now = composed(*tiny)
    assert "data.splits" not in identity(now)  # so the same command comes back to the same directory
    assert identity(composed(*tiny, "data.splits=off"))["data.splits"] == "off"


def test_a_run_goes_on_where_its_folders_have_become_doubtful(tmp_path, capsys):
    root = grown(tmp_path / "set", "train", "val")
    run, command = tmp_path / "run", [*TINY_RUN, f"data.root={root}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert run_here(run, *command) == 0
    with pytest.raises(UserError, match="data.splits"):  # a finished run is of one reading
        run_here(run, *command, "data.splits=off")
    (run / "summary.json").unlink()
    images(root / "extra")
    with pytest.raises(ValueError, match=r"Type data.splits=\[train,val\] where"):
        run_here(run, *command)
    capsys.readouterr()
    assert run_here(run, *command, "data.splits=[train,val]") == 0
    said = capsys.readouterr().err
    assert "resumed at step 1" in said and "have changed" not in said
    typed = [f"resume={run}", "data.splits=[train,val]"]
    merged, _ = resumed(composed(*command, *typed), typed)
    assert merged.data.splits == ["train", "val"]
