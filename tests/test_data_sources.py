"""Data sets known by name, class folders, tables."""

import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.datasets
from conftest import ROOT, labels_of, make_source
from omegaconf import OmegaConf
from PIL import Image

from mae.data import SOURCES
from mae.data.sources import table as lists
from mae.data.sources.folder import classes_of
from mae.data.sources.table import table
from mae.errors import UserError
from mae.tasks.labels import need_labels

FILES = {"in_chans": 3, "exif_orientation": False, "max_pixels": 10**7, "follow_links": False}


@pytest.fixture
def root(tmp_path):
    """train and val folders of three classes, four and two images each."""
    for part, count in (("train", 4), ("val", 2)):
        for k, name in enumerate(("ant", "bee", "cow")):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((20, 30, 3), 50 * k + i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / part / name / f"{i}.png")
    return tmp_path / "set"


# ---------------------------------------------------------------- torchvision's

SETS = {
    "cifar10": ("CIFAR10", np.zeros((6, 32, 32, 3), np.uint8), 10),
    "cifar100": ("CIFAR100", np.zeros((6, 32, 32, 3), np.uint8), 100),
    "stl10": ("STL10", np.zeros((6, 3, 96, 96), np.uint8), 10),
    "fashion_mnist": ("FashionMNIST", torch.zeros(6, 28, 28, dtype=torch.uint8), 10),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_torchvision_sets(name, in_chans, tmp_path, monkeypatch):
    theirs, data, count = SETS[name]
    labels = [3, 1, 2, 0, 1, 2]
    found = SimpleNamespace(data=data, targets=labels, labels=np.array(labels), classes=[*map(str, range(count))])
    monkeypatch.setattr(torchvision.datasets, theirs, lambda *a, **k: found)
    options = {"root": str(tmp_path), "in_chans": in_chans, "download": False}
    options |= {"unlabelled": False} if name == "stl10" else {}
    if in_chans == 1 and name != "fashion_mnist":
        with pytest.raises(ValueError, match="data.in_chans=1, but the images of .* have 3 channels"):
            SOURCES[name]("train", **options)
        return
    source = SOURCES[name]("train", **options)
    image, label = source[0]
    assert image.dtype == torch.uint8 and image.shape[0] == in_chans and label == 3
    assert source.labels.tolist() == labels and len(source.classes) == count


@pytest.mark.parametrize("name", SETS)
def test_torchvision_sets_that_are_not_there(name, tmp_path):
    options = {"root": str(tmp_path), "in_chans": 3, "download": False}
    options |= {"unlabelled": False} if name == "stl10" else {}
    with pytest.raises(ValueError, match=r"was not found in data.root=.*data.download=true") as error:
        SOURCES[name]("train", **options)
    assert "\n" not in str(error.value)


def test_stl10_may_be_unlabelled(tmp_path, monkeypatch):
    found = SimpleNamespace(data=np.zeros((2, 3, 9, 9), np.uint8), labels=np.array([0, -1]), classes=["a"])
    parts = []
    monkeypatch.setattr(torchvision.datasets, "STL10", lambda *a, split, **k: parts.append(split) or found)
    options = {"root": str(tmp_path), "in_chans": 3, "download": False, "unlabelled": True}
    assert SOURCES["stl10"]("train", **options).labels is None
    assert SOURCES["stl10"]("val", **options).labels is not None
    assert parts == ["train+unlabeled", "test"]


# ---------------------------------------------------------------- class folders


def classes(root, split="train", **changes):
    options = FILES | {"parts": ["train", "val"], "classes": None, "cache_dir": str(root.parent / "cache")}
    return make_source(classes_of, split, root=str(root), **(options | changes))


def test_class_folders(root):
    train, val = classes(root), classes(root, "val")
    assert train.classes == val.classes == ["ant", "bee", "cow"]
    assert len(train) == 12 and len(val) == 6
    assert val[5][1] == 2 and val[5][0][0, 0, 0] == 101


def test_some_classes_of_a_folder(root):
    (root.parent / "two.txt").write_text("cow\nant\n")
    for split, count in (("train", 8), ("val", 4)):
        part = classes(root, split, classes=str(root.parent / "two.txt"))
        assert part.classes == ["ant", "cow"] and len(part) == count
        assert sorted({label for _, label in part}) == [0, 1]
        assert all(part.name(i).startswith(part.classes[part[i][1]]) for i in range(len(part)))


def test_faults_of_class_folders(root):
    with pytest.raises(ValueError, match="has no folder 2021_train"):
        classes(root, parts=["2021_train", "2021_valid"])
    (root.parent / "bad.txt").write_text("ant yak")
    with pytest.raises(ValueError, match="data.classes=.*names yak, which is no class"):
        classes(root, classes=str(root.parent / "bad.txt"))
    (root.parent / "bad.txt").write_text("")
    with pytest.raises(ValueError, match="data.classes=.*is empty"):
        classes(root, classes=str(root.parent / "bad.txt"))
    with pytest.raises(ValueError, match="data.classes=.*cannot be read"):
        classes(root, classes="nowhere.txt")
    (root.parent / "bad.txt").write_text("Käfer", encoding="latin-1")
    with pytest.raises(ValueError, match=r"data.classes=.*bad.txt is not UTF-8 \(invalid.*\): save it as such\."):
        classes(root, classes=str(root.parent / "bad.txt"))
    (root / "train" / "empty").mkdir()
    (root.parent / "bad.txt").write_text("empty")
    with pytest.raises(UserError, match=r"data.classes=.*bad.txt: no image of these classes lies under .*train\."):
        classes(root, classes=str(root.parent / "bad.txt"))
    with pytest.raises(ValueError, match="holds no folders of classes"):
        classes(root / "train", parts=["ant", "bee"])


# ---------------------------------------------------------------- tables


def written(frame, root, kind):
    path = root.parent / f"list.{kind}"
    if kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return str(path)


def listed(root, file, split="train", **changes):
    given = FILES | {"val_fraction": 0.5, "cache_dir": str(root.parent / "cache")} | changes
    return make_source(table, split, root=str(root), file=file, **given)


FRAME = pd.DataFrame(
    {
        "label": ["zebra", "ant", "zebra", "moth"],
        "path": ["train/cow/0.png", "train/ant/1.png", "train/cow/2.png", "val/bee/0.png"],
        "split": ["train", "train", "val", "test"],
    }
)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables(root, kind):
    file = written(FRAME, root, kind)
    train, val = listed(root, file), listed(root, file, "val")
    assert train.classes == ["ant", "moth", "zebra"]
    assert [train.name(i) for i in range(len(train))] == FRAME.path[:2].tolist()
    assert labels_of(train).tolist() == [2, 0] and labels_of(val).tolist() == [2, 1]
    assert train[0][0][0, 0, 0] == 100 and train[0][1] == 2
    plain = written(FRAME[["path"]], root, kind)
    parts = [listed(root, plain, s) for s in ("train", "val")]
    assert parts[0].labels is None and [len(p) for p in parts] == [2, 2]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_is_read_once_and_again_where_it_or_a_folder_changes(root, kind, monkeypatch):
    file, read, times = written(FRAME, root, kind), lists.rows, []
    monkeypatch.setattr(lists, "rows", lambda path: times.append(path) or read(path))
    for path in [root, *root.rglob("*"), root.parent / f"list.{kind}"]:
        os.utime(path, (1, 1))  # long ago
    first, again, val = listed(root, file), listed(root, file), listed(root, file, "val")
    assert len(times) == 1 and labels_of(again).tolist() == labels_of(first).tolist() == [2, 0]
    assert [again.name(i) for i in range(2)] == FRAME.path[:2].tolist() and labels_of(val).tolist() == [2, 1]
    assert again.classes == first.classes and not list(root.rglob("*.bin"))
    (root / "train" / "cow" / "0.png").unlink()
    (root / "train" / "cow" / "0.png").symlink_to("/etc/hosts")
    with pytest.raises(ValueError, match="which leads out of data.root"):
        listed(root, file)
    (root / "link").symlink_to("/etc")
    for path in (["link/ssl/x.png", "link/hosts"], ["link/hosts", "link/ssl/x.png"]):
        with pytest.raises(ValueError, match=f"names {path[0]}, which leads out of data.root"):
            listed(root, written(pd.DataFrame({"path": path}), root, kind))
    times.pop()
    times.pop()
    written(FRAME[1:], root, kind)
    assert len(listed(root, file)) == 1 and len(times) == 3


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_without_a_label_have_none(root, kind):
    train = listed(root, written(FRAME.assign(label=["zebra", None, "ant", "ant"]), root, kind))
    assert train.classes == ["ant", "zebra"] and labels_of(train).tolist() == [1, -1]
    cfg = OmegaConf.create({"task": {"name": "finetune"}, "data": {"name": "table"}})
    with pytest.raises(ValueError, match=r"1 of the training images of data.name=table have none, such as train/ant/1"):
        need_labels(cfg, train, "training")


def test_a_label_that_is_no_number_is_missing(root):
    file = root.parent / "list.parquet"
    pq.write_table(pa.table({"path": FRAME.path.tolist(), "label": [2.0, float("nan"), 1.0, None]}), file)
    train, val = (listed(root, str(file), split) for split in ("train", "val"))
    assert train.classes == ["1.0", "2.0"]
    labels = {part.name(k): int(labels_of(part)[k]) for part in (train, val) for k in range(len(part))}
    assert [labels[path] for path in FRAME.path] == [1, -1, 0, -1]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_without_a_row_for_training_serves_evaluation_alone(root, kind):
    file = written(FRAME.assign(split="val"), root, kind)
    assert len(listed(root, file, "val")) == 4
    with pytest.raises(UserError, match=r"data\.file=.* has no row for training, only split=val: give"):
        listed(root, file)


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("split", [0, 0, 1, 1], "split holds int64, and it must be text: train or val."),
        ("split", [True, False, True, False], "split holds bool, and it must be text: train or val."),
        ("path", [1, 2, 3, 4], "path holds int64, and it must be text: file names relative to data.root."),
        ("path", [b"a", b"b", b"c", b"d"], "path holds binary, and it must be text: file names relative to data.root."),
    ],
)
def test_columns_of_a_parquet_table_that_hold_no_text_are_named(root, column, values, said):
    file = root.parent / "list.parquet"
    pq.write_table(pa.table(FRAME.to_dict("list") | {column: values}), file)
    with pytest.raises(UserError) as caught:
        listed(root, str(file))
    assert str(caught.value) == f"data.file={file}: the column {said}"


def test_columns_of_repeated_words_are_text(root):
    file = root.parent / "list.parquet"
    columns = {name: pa.array(values).dictionary_encode() for name, values in FRAME.to_dict("list").items()}
    pq.write_table(pa.table(columns | {"none": pa.nulls(4)}), file)
    assert labels_of(listed(root, str(file))).tolist() == [2, 0]


def test_tables_as_spreadsheets_write_them(root):
    table = root.parent / "list.csv"
    table.write_text("\ufeffpath,label\ntrain/cow/0.png,Kuh\ntrain/ant/1.png,Käfer\n", encoding="utf-8")
    assert listed(root, str(table)).classes == ["Kuh", "Käfer"]
    table.write_text("path,label\ntrain/cow/0.png,Käfer\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"data\.file=.*list\.csv is not UTF-8 \(invalid.*\): save it as such\."):
        listed(root, str(table))
    table.write_text(f"path,label\n{'x' * 200_000},a\n")
    with pytest.raises(ValueError, match=r"data\.file=.*list\.csv is no CSV that can be read: field larger"):
        listed(root, str(table))


def test_rows_that_are_cut_short(root):
    (root.parent / "list.csv").write_text("path,label\ntrain/cow/0.png,zebra\ntrain/ant/1.png\ntrain/bee/1.png,ant\n")
    parts = [listed(root, str(root.parent / "list.csv"), split) for split in ("train", "val")]
    assert parts[0].classes == ["ant", "zebra"]
    assert {part.name(i): part[i][1] for part in parts for i in range(len(part))} == {
        "train/cow/0.png": 1,
        "train/ant/1.png": -1,
        "train/bee/1.png": 0,
    }
    (root.parent / "list.csv").write_text("label,path\nzebra,train/cow/0.png\nant\n")
    with pytest.raises(ValueError, match=r"data\.file=.*list\.csv names no path in row 2\.$"):
        listed(root, str(root.parent / "list.csv"))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_faults_of_tables(root, kind):
    with pytest.raises(ValueError, match="data.file=.*has no column path"):
        listed(root, written(FRAME[["label"]], root, kind))
    with pytest.raises(ValueError, match="data.file=.*has no rows"):
        listed(root, written(FRAME[:0], root, kind))
    with pytest.raises(ValueError, match="split=practice: it must be one of train, val"):
        listed(root, written(FRAME.assign(split="practice"), root, kind))
    for path in ("../list.csv", "/etc/hosts", "train/../../x.png"):
        with pytest.raises(ValueError, match="which leads out of data.root"):
            listed(root, written(FRAME.assign(path=path), root, kind))
    (root / "link.png").symlink_to("/etc/hosts")
    with pytest.raises(ValueError, match="which leads out of data.root"):
        listed(root, written(FRAME.assign(path="link.png"), root, kind))
    with pytest.raises(ValueError, match="data.file=.*names no path in row 2"):
        listed(root, written(FRAME.assign(path=["train/cow/0.png", None, *FRAME.path[2:]]), root, kind))
    with pytest.raises(ValueError, match="data.file=.*cannot be read"):
        listed(root, str(root / f"nowhere.{kind}"))
    with pytest.raises(ValueError, match="data.file is not set"):
        listed(root, None)
    if kind == "parquet":
        (root / "x.parquet").write_text("no")
        with pytest.raises(ValueError, match="is not a Parquet file"):
            listed(root, str(root / "x.parquet"))


def test_sources_and_shards_do_not_import_each_other():
    for room, other in (("sources", "shards"), ("shards", "sources")):
        texts = {path: path.read_text() for path in (ROOT / "mae" / "data" / room).glob("*.py")}
        assert texts and not [path for path, text in texts.items() if f"mae.data.{other}" in text]
