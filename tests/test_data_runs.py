"""Whole runs on difficult data: bad files, many channels, images that are not square."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import TINY, composed, run_cli, run_here
from PIL import Image
from test_data_files import bad_files, photo

from mae.errors import UserError

SMALL = [one for one in TINY if "img_size" not in one and "fraction" not in one]
PRETRAIN = [*SMALL, "task.batch_size=50", "task.epochs=1", "task.warmup_epochs=0", "data.num_workers=2"]
FINETUNE = [*SMALL, "task=finetune", "task.batch_size=8", "task.epochs=2", "task.warmup_epochs=0", "data.num_workers=2"]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "bad_files.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- bad files


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> Path:
    """400 training images, twelve of which (3 %) are bad, each of another kind, and 20 to validate, one bad."""
    root = tmp_path_factory.mktemp("spoilt")
    good = [photo((24 + k, 20)) for k in range(8)]
    for part, count in (("train", 388), ("val", 19)):
        (root / part).mkdir()
        for k in range(count):
            good[k % 8].save(root / part / f"good_{k:03}.jpg")
    kinds = bad_files()
    assert len(kinds) == 12
    for name, data in kinds.items():
        (root / "train" / name).write_bytes(data)
    (root / "val" / "truncated.jpg").write_bytes(kinds["truncated.jpg"])
    return root


def on_spoilt(root: Path) -> list[str]:
    return ["data=folder", f"data.root={root}", f"data.cache_dir={root}/../cache", "data.img_size=16"] + [
        "data.max_pixels=10000000"
    ]


def test_a_run_with_three_percent_bad_files_goes_on_and_reports_each_once(spoilt, tmp_path):
    command = [*PRETRAIN, *on_spoilt(spoilt), "data.max_bad_fraction=0.05", "task.epochs=2", "task.eval_every_epochs=1"]
    command += ["checkpoint.every_epochs=1", "checkpoint.keep=5"]
    assert run_here(tmp_path, *command) == 0
    assert summary(tmp_path)["steps"] == 16 and summary(tmp_path)["images_seen"] == 800
    first = rows(tmp_path)
    assert sorted(row["name"] for row in first if row["part"] == "train") == sorted(bad_files())
    assert [row["name"] for row in first if row["part"] == "val"] == ["truncated.jpg"]
    assert len(first) == 13 and all(row["reason"] for row in first)

    for path in (tmp_path / "summary.json", *sorted((tmp_path / "checkpoints").glob("*16/*"))):
        path.unlink()  # as if killed in the second epoch: it goes on, and reports nothing again
    assert run_here(tmp_path, *command) == 0
    assert "goes on from" in (tmp_path / "log.txt").read_text() and rows(tmp_path) == first


@pytest.mark.parametrize("task", ["knn", "linprobe"])
def test_neighbours_and_cached_features_leave_out_bad_images_and_list_them(task, tmp_path):
    for split, count in (("train", 33), ("val", 6)):
        for k in range(count):
            (tmp_path / "data" / split / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
            photo((24 + k, 20)).save(tmp_path / "data" / split / "ab"[k % 2] / f"{k:02}.jpg")
    (tmp_path / "data" / "train" / "a" / "00.jpg").write_bytes(b"damaged")
    command = [*on_spoilt(tmp_path / "data"), "data.max_bad_fraction=0.05"]
    assert run_here(tmp_path / "run", *PRETRAIN, *command, "task.batch_size=16", "task.max_steps=1") == 0
    command += [*SMALL, f"init={tmp_path / 'run'}", f"task={task}", "task.batch_size=16"]
    cached = ["task.cached_features=true", "task.batch_size=11", "task.epochs=3", "task.warmup_epochs=0"]
    command += ["task.k=[5]"] if task == "knn" else cached
    assert run_here(tmp_path / task, *command) == 0
    assert [(row["part"], row["name"]) for row in rows(tmp_path / task)] == [("train", "a/00.jpg")]
    assert task == "knn" or summary(tmp_path / task)["steps"] == 6  # of 32 images, not of 33


def test_the_loss_of_validation_leaves_out_bad_images_and_those_that_stand_in_for_them(tmp_path):
    losses = []
    for name in ("whole", "spoilt"):
        root = tmp_path / name
        for part, count in (("train", 16), ("val", 5)):
            (root / part).mkdir(parents=True)
            for k in range(count):
                photo((24 + k, 20)).save(root / part / f"good_{k:03}.png")
        if name == "spoilt":
            (root / "val" / "last.png").write_bytes(b"")
            (root / "val" / "later.png").write_bytes(b"")
        run = tmp_path / f"run_{name}"
        command = [*PRETRAIN, *on_spoilt(root), "data.max_bad_fraction=0.5", "task.batch_size=4", "task.max_steps=1"]
        assert run_here(run, *command, "task.rankme=9") == 0
        losses.append(summary(run)["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_default_stops_and_names_the_first(spoilt, tmp_path):
    ended = run_cli(*PRETRAIN, *on_spoilt(spoilt), f"output_dir={tmp_path / 'run'}")
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert "images read so far cannot be used, more than data.max_bad_fraction=0.01 allows; the first: " in last
    listed = rows(tmp_path / "run")
    assert 5 <= len(listed) <= 12
    for row in listed[:3]:
        assert f"{row['name']} ({row['reason']})" in last


# ---------------------------------------------------------------- five channels, sixteen bits


@pytest.fixture(scope="module")
def bands(tmp_path_factory) -> Path:
    """Two classes of 5-channel uint16 images, as .npy and TIFF, that differ in their brightest channel."""
    root = tmp_path_factory.mktemp("bands")
    chance = np.random.default_rng(0)
    for label, name in enumerate(("field", "town")):
        (root / name).mkdir()
        for k in range(20):
            values = chance.integers(0, 9000, (5, 36, 40)).astype(np.uint16)
            values[label] += 50_000
            if k % 2:
                np.save(root / name / f"{k}.npy", values)
            else:
                tifffile.imwrite(root / name / f"{k}.tif", values)
    return root


def test_a_five_channel_uint16_set_is_measured_pretrained_and_finetuned(bands, tmp_path):
    overrides = ["data=scientific", f"data.root={bands}", "data.img_size=[32,32]", f"data.cache_dir={tmp_path}"]
    assert run_here(tmp_path / "stats", "task=stats", "device=cpu", *overrides) == 0
    overrides += summary(tmp_path / "stats")["use"].split()
    assert run_here(tmp_path / "pretrain", *PRETRAIN, "task.batch_size=8", *overrides) == 0
    assert np.isfinite(summary(tmp_path / "pretrain")["val_loss"])
    assert list((tmp_path / "pretrain" / "images").glob("reconstruction_*.png"))
    fine = [*FINETUNE, *overrides, f"init={tmp_path / 'pretrain'}", "augmentation=linprobe", "task.epochs=8"]
    assert run_here(tmp_path / "finetune", *fine, "optimizer.base_lr=0.1") == 0
    assert summary(tmp_path / "finetune")["top1"] == 100.0
    probe = [
        *SMALL,
        "task=linprobe",
        "task.batch_size=8",
        "task.max_steps=2",
        *overrides,
        f"init={tmp_path / 'pretrain'}",
    ]
    assert run_here(tmp_path / "probe", *probe) == 0


def test_what_colours_need_is_said_before_a_run_on_five_channels_starts(bands):
    for task, more in (("finetune", []), ("pretrain", ["augmentation=color_jitter"])):
        with pytest.raises(UserError) as caught:
            composed(f"task={task}", "data=scientific", f"data.root={bands}", "data.img_size=32", *more)
        name = "color_jitter" if more else "rand_augment"
        assert str(caught.value) == (
            f"augmentation.name={name} needs 3 channels, and data.in_chans=5: choose augmentation=linprobe."
        )


# ---------------------------------------------------------------- images that are not square


def test_images_of_96_by_160_are_pretrained_and_finetuned_with_the_default_augmentations(tmp_path):
    chance = np.random.default_rng(0)
    for name, colour in (("red", 0), ("green", 1)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(20):
            pixels = chance.integers(0, 90, (100, 170, 3)).astype(np.uint8)
            pixels[..., colour] += 120
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{k}.png")
    overrides = ["data=folder", f"data.root={tmp_path / 'set'}", "data.img_size=[96,160]", "model.patch_size=16"]
    overrides += [f"data.cache_dir={tmp_path}"]
    assert run_here(tmp_path / "pretrain", *PRETRAIN, "task.batch_size=8", *overrides) == 0
    pictures = list((tmp_path / "pretrain" / "images").glob("reconstruction_*.png"))
    assert pictures and np.isfinite(summary(tmp_path / "pretrain")["val_loss"])
    fine = [*FINETUNE, *overrides, f"init={tmp_path / 'pretrain'}", "task.mixup=0.8", "task.cutmix=1.0"]
    assert run_here(tmp_path / "finetune", *fine) == 0
    assert 0 <= summary(tmp_path / "finetune")["top1"] <= 100
    assert composed(*fine).augmentation.name == "rand_augment"
