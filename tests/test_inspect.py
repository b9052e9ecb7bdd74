"""task=stats and task=inspect, as a user types them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import composed, of_type, run_cli, run_here
from PIL import Image
from test_evaluate import work_on

from mae.errors import UserError
from mae.launch import launch

QUICK = [
    "task=inspect",
    "device=cpu",
    "task.batches=2",
    "task.max_workers=2",
    "task.batch_size=8",
    "task.num_images=12",
]


def photos(root: Path) -> Path:
    """Two classes, red and blue, of different sizes; and a file that is no image."""
    for name, colour, count, size in (("red", (250, 0, 0), 9, (40, 20)), ("blue", (0, 9, 50), 6, (20, 30))):
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", size, colour).save(root / name / f"{k}.png")
    (root / "red" / "bad.jpg").write_bytes(b"nothing")
    return root


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def on(root: Path, *more: str) -> list[str]:
    changes = ("data.val_fraction=0.2", "data.img_size=16", "data.max_bad_fraction=0.5")
    return ["data=folder", f"data.root={root}", f"data.cache_dir={root.parent / 'cache'}", *changes, *more]


def measured(root: Path, run: Path) -> np.ndarray:
    """All pixels that are not held out, by another way."""
    from mae import data
    from mae.config.build import build

    cfg = composed("task=stats", *on(root))
    source = build(data.SOURCES, cfg.data, "train")
    bad = {row["name"] for row in rows(run / "bad_files.csv")}
    names = [source.name(k) for k in range(len(source)) if source.name(k) not in bad]
    return np.concatenate([np.array(Image.open(root / name)).reshape(-1, 3) for name in names]) / 255


def test_stats_of_a_folder_are_those_of_its_pixels_on_one_rank_and_two(tmp_path):
    root, run = photos(tmp_path / "photos"), tmp_path / "run"
    (root / "red" / "also.jpg").write_bytes(b"")
    assert run_here(run, "task=stats", *on(root, "device=cpu")) == 0
    values, found = measured(root, run), summary(run)
    assert np.allclose(found["mean"], values.mean(0), rtol=1e-12) and np.allclose(found["std"], values.std(0))
    assert found["task"] == "stats" and found["images_seen"] == 14 and found["values"] == "uint8"
    listed = rows(run / "bad_files.csv")
    assert found["bad"] == len(listed) > 0 and {r["name"] for r in listed} <= {"red/bad.jpg", "red/also.jpg"}
    again = composed("task=stats", *on(root), *found["use"].split())  # is taken as it was said
    assert np.allclose(again.data.mean, found["mean"], atol=1e-5)

    other = tmp_path / "two"
    command = ["task=stats", *on(root, "device=cpu")]
    launch.prepare(composed(*command, f"output_dir={other}"), command)
    work_on(2, other)
    both = summary(other)
    assert both["mean"] == pytest.approx(found["mean"], rel=1e-12) and both["bad"] == found["bad"]
    assert both["images_seen"] == 14 and len(rows(other / "bad_files.csv")) == both["bad"]


def test_stats_as_a_user_types_it(tmp_path):
    ended = run_cli("task=stats", *on(photos(tmp_path / "photos")), "output_dir=run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = summary(tmp_path / "run")
    assert ended.stdout.strip().splitlines()[-1] == f"use {found['use']}  run" and "data.mean=[" in found["use"]
    assert "1 of 13 images cannot be read" in ended.stderr or not found["bad"]


def test_stats_of_a_channel_that_never_changes(tmp_path):
    (tmp_path / "grey").mkdir()
    for k in range(4):
        Image.new("L", (8, 8), 40).save(tmp_path / "grey" / f"{k}.png")
    assert run_here(tmp_path / "run", "task=stats", "device=cpu", *on(tmp_path / "grey", "data.in_chans=1")) == 0
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "channel 0 has one value in all images, and data.std must be greater than 0" in said


def test_stats_of_files_none_of_which_can_be_read(tmp_path):
    root = photos(tmp_path / "photos")
    for path in root.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="^none of the 13 images of data.name=folder can be read.$"):
        run_here(tmp_path / "run", "task=stats", "device=cpu", *on(root))
    with pytest.raises(ValueError, match="images in a row cannot be used"):
        run_here(tmp_path / "other", *QUICK, *on(root))


def test_inspect_looks_at_the_training_images_that_are_chosen(tmp_path):
    chosen = ["data.fraction=0.5", "data.per_class=3"]
    assert run_here(tmp_path, "task=inspect", "device=cpu", *QUICK, *chosen) == 0
    figures, classes = summary(tmp_path), rows(tmp_path / "classes.csv")
    assert figures["train_images"] == figures["measured_images"] == 30
    assert {row["train"] for row in classes} == {"3"} and sum(int(row["val"]) for row in classes) > 300


@pytest.mark.parametrize("step", ["pretrain", "finetune", "null"])
def test_inspect_shows_samples_classes_sizes_and_speeds(step, tmp_path, capsys):
    root, run = photos(tmp_path / "photos"), tmp_path / "run"
    assert run_here(run, *QUICK, *on(root), f"task.step={step}", "data.mean=[0.9]", "data.std=[0.1]") == 0
    found = summary(run)
    sheet = np.array(Image.open(run / "images" / "samples.png"))
    assert sheet.shape == (2 * 18 + 2, 8 * 18 + 2, 3)
    colours = {tuple(c) for c in sheet.reshape(-1, 3).tolist()}
    assert colours == {(255, 255, 255), (250, 0, 0), (0, 9, 50)}  # the gaps and two classes, no bad image
    assert Image.open(run / "images" / "sizes.png").size[0] > 500
    counts = {row["class"]: (int(row["train"]), int(row["val"])) for row in rows(run / "classes.csv")}
    assert counts == {"blue": (5, 1), "red": (8, 2)}
    assert found["train_images"] == 13 and found["val_images"] == 3 and found["classes"] == 2
    assert found["smallest_class"] == ["blue", 5] and found["largest_class"] == ["red", 8]
    assert found["height"] == [20, 20, 30] and found["width"] == [20, 40, 40]
    assert list(found["loading"]) == ["1", "2"] and all(speed > 0 for speed in found["loading"].values())
    if step != "null":
        for count, share in found["data_wait"].items():
            assert share == pytest.approx(
                max(0.0, 1 - found["loading"][count] / found["step_images_per_second"]), abs=1e-3
            )
    said = (run / "log.txt").read_text()
    assert "2 classes, from 5 images (blue) to 8 (red)" in said and "2 workers load" in said
    assert ("the step would wait" in said) == (step != "null")
    assert "data.mean and data.std are not those of these images: data.mean=[" in said
    assert capsys.readouterr().out.splitlines()[-1].startswith("files images/samples.png images/sizes.png classes.csv")


def test_inspect_shows_what_fine_tuning_will_see(tmp_path):
    root, plain, strong = photos(tmp_path / "photos"), tmp_path / "plain", tmp_path / "strong"
    assert run_here(plain, *QUICK, *on(root), "task.step=null", "task.max_workers=1") == 0
    assert run_here(strong, *QUICK, *on(root), "task.step=null", "task.max_workers=1", "augmentation=finetune") == 0
    sheets = [Image.open(run / "images" / "samples.png") for run in (plain, strong)]
    plain_colours, strong_colours = (of_type(list, sheet.getcolors(10000)) for sheet in sheets)
    assert len(strong_colours) > len(plain_colours)


def test_inspect_of_five_channels(tmp_path):
    for k in range(12):
        path = tmp_path / "bands" / f"{k}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, np.random.default_rng(k).integers(0, 60000, (5, 24, 20)).astype(np.uint16))
    more = ["data=scientific", f"data.root={tmp_path / 'bands'}", "data.img_size=16", f"data.cache_dir={tmp_path}"]
    assert run_here(tmp_path / "run", *QUICK, *more) == 0
    found = summary(tmp_path / "run")
    assert len(found["mean"]) == 5 and found["values"] == "uint16" and found["classes"] == 0
    assert rows(tmp_path / "run" / "classes.csv") == []


def test_what_inspect_refuses():
    for values, says in (
        (["task.batches=0"], "task.batches must be 1 or more, got 0."),
        (["task.max_workers=0"], "task.max_workers must be 1 or more, got 0."),
        (["task.measured_images=0"], "task.measured_images must be 1 or more, got 0."),
        (["task.step=finetuning"], "task.step must be one of pretrain, finetune or null"),
    ):
        with pytest.raises(UserError) as caught:
            composed("task=inspect", *values)
        assert says in str(caught.value)
