"""Hugging Face datasets, read from folders; Parquet files as a stream."""

import hashlib
import io
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, labels_of, make_loader, make_source, of_type, run_here, undivided
from PIL import Image

from mae.data import flat, pack, remote
from mae.data.source import BadImage, Source, fingerprint
from mae.data.sources import huggingface, parquet_files
from mae.data.sources.huggingface import hf
from mae.data.sources.row_groups import RowGroups
from mae.data.subsets import Subset
from tests.test_data_shards import Flaky, loaded, same

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PICTURES = [np.full((9, 12, 3), 10 * k, np.uint8) for k in range(10)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Ten images of two classes: as saved by datasets, and as Parquet."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("hub")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "kind": datasets.Value("string"),
        }
    )
    rows = {"image": [Image.fromarray(p) for p in PICTURES], "label": [k % 2 for k in range(10)]}
    rows["kind"] = [("zoo", "bar", "bar")[k % 3] for k in range(10)]
    whole = datasets.Dataset.from_dict(rows, features=features)
    parts = datasets.DatasetDict({"train": whole, "test": whole.select([1, 3])})
    parts.save_to_disk(str(folder / "arrow"))
    whole.save_to_disk(str(folder / "one"))
    (folder / "parquet").mkdir()
    for name, part in parts.items():
        part.to_parquet(str(folder / "parquet" / f"{name}-00000-of-00001.parquet"))
    return folder


OPTIONS = {
    "subset": None,
    "image_column": "image",
    "label_column": "label",
    "train_split": "train",
    "val_split": "test",
    "in_chans": 3,
    "val_fraction": 0.2,
    "exif_orientation": False,
    "max_pixels": 10**6,
    "streaming": False,
    "cache_gb": 1.0,
    "retry_s": 1.0,
    "lanes": 4,
    "window": 2,
    "follow_links": False,
}


def opened(root, split="train", **changes):
    return make_source(hf, split, root=str(root), **(OPTIONS | {"cache_dir": str(root.parent / "cache")} | changes))


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_rows(made, kind):
    train, val = opened(made / kind), opened(made / kind, "val")
    assert len(train) == 10 and len(val) == 2 and train.classes == ["cat", "dog"]
    for k in range(10):
        image, label = train[k]
        assert torch.equal(image, torch.from_numpy(PICTURES[k]).permute(2, 0, 1)) and label == k % 2
    assert labels_of(val).tolist() == [1, 1]
    words = opened(made / kind, label_column="kind")
    assert words.classes == ["bar", "zoo"] and labels_of(words)[:3].tolist() == [1, 0, 0]
    assert opened(made / kind, label_column=None)[0][1] == -1


def test_a_row_that_names_a_file_elsewhere_is_a_bad_image(tmp_path):
    import pandas as pd

    root = tmp_path / "set"
    root.mkdir()
    for place in (root, tmp_path):
        Image.fromarray(PICTURES[0]).save(place / "x.png")
    paths = ["x.png", str(root / "x.png"), str(tmp_path / "x.png"), "../x.png", "x\0.png", None]
    rows = pd.DataFrame({"image": [{"bytes": None, "path": path} for path in paths], "label": [0, 1] * 3})
    rows.to_parquet(root / "train.parquet")
    source = undivided(opened(root, val_split=None, val_fraction=0.5))
    for k in (0, 1):
        assert torch.equal(source[k][0], torch.from_numpy(PICTURES[0]).permute(2, 0, 1))
    for k in (2, 3):
        with pytest.raises(BadImage, match="which leads out of"):
            source[k]
    for k in (4, 5):
        with pytest.raises(BadImage, match="no image in its column image"):
            source[k]


@pytest.mark.parametrize("given", [False, True])
def test_files_of_a_set_on_the_hub_lie_in_the_caches_alone(tmp_path, monkeypatch, given):
    own, fetched, other = (tmp_path / name for name in ("datasets", "hub", "other"))
    for place in (own, fetched, other):
        place.mkdir()
        Image.fromarray(PICTURES[1]).save(place / "x.png")
    rows = datasets.Dataset.from_dict({"image": [str(place / "x.png") for place in (own, fetched, other)]})
    monkeypatch.setattr(huggingface, "_loaded", lambda *given: rows.cast_column("image", datasets.Image()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(fetched))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(other if given else own))
    cache = str(own) if given else None
    source = make_source(hf, "train", root="hf://some/set", **(OPTIONS | {"cache_dir": cache, "label_column": None}))
    assert all(torch.equal(source[k][0], torch.from_numpy(PICTURES[1]).permute(2, 0, 1)) for k in (0, 1))
    with pytest.raises(BadImage, match="names .*other/x.png, which leads out of .*datasets"):
        source[2]


def test_a_part_is_held_out_where_there_is_no_second_split(made):
    parts = [opened(made / "one", s, val_split=None) for s in ("train", "val")]
    assert [len(p) for p in parts] == [8, 2] and sorted(labels_of(parts[1])) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_column": "img"}, "data.image_column=img is not one of its columns: image, label, kind"),
        ({"label_column": "fine"}, "data.label_column=fine is not one of its columns"),
        ({"train_split": "training"}, "data.root=.*cannot be opened as a data set, split training"),
    ],
)
def test_faults_are_named(made, changes, says):
    for kind in ("arrow", "parquet"):
        with pytest.raises(ValueError, match=says):
            opened(made / kind, **changes)
    with pytest.raises(ValueError, match="cannot be opened .*there is no such folder"):
        opened(made / "nowhere")


def jpeg():
    out = io.BytesIO()
    Image.fromarray(PICTURES[3]).save(out, "JPEG")
    return out.getvalue()


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGES = [{"bytes": jpeg(), "path": "a.jpg"}] * 10
NAMES = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}}}'


def parquet(root, *columns, metadata=None):
    """A Parquet file of the training split for each (images, labels)."""
    root.mkdir(exist_ok=True)
    for number, (images, labels) in enumerate(columns):
        rows = {"image": images} | ({} if labels is None else {"label": labels})
        pq.write_table(pa.table(rows).replace_schema_metadata(metadata), root / f"train-{number}.parquet")
    return root


LISTED = "and a label is one number or word: choose another column, or data.label_column=null to read no labels"
BY_PATH = r"holds string, and not encoded images: .* Images that a table names by their paths are read with data=table"


@pytest.mark.parametrize(("columns", "says"), [
    ((pa.array([], STRUCT), pa.array([], pa.int64())), "holds no rows"),
    ((IMAGES, [[0], [1]] * 5), f"data.label_column=label.* holds list<.*>, {LISTED}"),
    ((IMAGES, [{"a": 1}] * 10), f"data.label_column=label.* holds struct<a: int64>, {LISTED}"),
    ((IMAGES, [b"a", b"b"] * 5), f"data.label_column=label.* holds binary, {LISTED}"),
    ((IMAGES, None), "data.label_column=label is not one of .*columns.*: image"),
    ((["a.jpg"] * 10, [0, 1] * 5), f"data.image_column=image.* {BY_PATH}"),
    (([1] * 10, [0, 1] * 5), "data.image_column=image.* holds int64, and not encoded images"),
    (([[1, 2]] * 10, [0, 1] * 5), "data.image_column=image.* holds list<.*>, and not encoded images"),
    (([{"x": 1}] * 10, [0, 1] * 5), "data.image_column=image.* holds struct<x: int64>, and not encoded images"),
    (([{"bytes": None, "path": 3}] * 10, [0, 1] * 5), "holds struct<bytes: null, path: int64>, and not encoded images"),
    ((IMAGES[:1], [0]), "data.root holds one image only: two are needed"),
])  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_hold_no_images_or_labels_are_refused(tmp_path, columns, says, streaming):
    root = parquet(tmp_path / "set", columns)
    with pytest.raises(ValueError, match=says):
        opened(root, streaming=streaming, val_split=None)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_and_the_names_of_their_classes(tmp_path, streaming):
    words = parquet(tmp_path / "words", (IMAGES, ["b", "a"] * 5), metadata={b"huggingface": NAMES})
    source = undivided(opened(words, streaming=streaming, val_split=None))
    assert labels_of(source).tolist() == [1, 0] * 5 and source.classes == ["a", "b"]
    strange = parquet(tmp_path / "strange", (IMAGES, [0, 7] * 5), metadata={b"huggingface": NAMES})
    with pytest.raises(ValueError, match="data.label_column: the label 7 is none of the 2 classes"):
        opened(strange, streaming=streaming, val_split=None)
    mixed = parquet(tmp_path / "mixed", (IMAGES, [0, 1] * 5), (IMAGES, ["a", "b"] * 5))
    with pytest.raises(
        ValueError, match="has labels of another kind than train-0" if streaming else "cannot be opened"
    ):
        opened(mixed, streaming=streaming, val_split=None)
    nulls = parquet(tmp_path / "nulls", (pa.array([None] * 10, STRUCT), [0, 1] * 5))
    with pytest.raises(BadImage, match="no image in its column image"):
        opened(nulls, streaming=streaming, val_split=None)[0]


def test_files_agree_on_their_classes(tmp_path):
    root = parquet(tmp_path / "set", (IMAGES, [0, 1] * 5), metadata={b"huggingface": NAMES})
    other = pa.table({"image": IMAGES, "label": [0, 1] * 5})
    swapped = other.replace_schema_metadata({b"huggingface": NAMES.replace(b'"a", "b"', b'"b", "a"')})
    pq.write_table(swapped, root / "train-1.parquet")
    for streaming in (True, False):
        with pytest.raises(ValueError, match=r"train-1\.parquet has other classes than train-0\.parquet"):
            opened(root, streaming=streaming, val_split=None)
    for damaged in (b"{", b"[]"):
        pq.write_table(other.replace_schema_metadata({b"huggingface": damaged}), root / "train-1.parquet")
        with pytest.raises(ValueError, match=r"what train-1\.parquet says of its features .* cannot be read"):
            opened(root, streaming=True)
    paths = parquet(tmp_path / "paths", (pa.array([{"bytes": None, "path": "a.jpg"}] * 4, STRUCT), [0, 1] * 2))
    with pytest.raises(BadImage, match="names a file, which data.streaming=false reads"):
        opened(paths, streaming=True, val_split=None)[0]
    empty = parquet(tmp_path / "empty", (IMAGES, [0, 1] * 5), (pa.array([], STRUCT), pa.array([], pa.int64())))
    with pytest.raises(ValueError, match="holds no rows: remove it, or set data.streaming=true"):
        opened(empty)
    assert len(undivided(opened(empty, streaming=True, val_split=None))) == 10


@pytest.mark.parametrize("streaming", [False, True])
def test_links_of_the_hubs_cache_are_read(stream, tmp_path, streaming):
    snapshot = tmp_path / "datasets--some--set" / "snapshots" / "rev"
    (tmp_path / "datasets--some--set" / "blobs").mkdir(parents=True)
    (snapshot / "data").mkdir(parents=True)
    shutil.copy(stream / "data" / "train-00000-of-00007.parquet", tmp_path / "datasets--some--set" / "blobs" / "12")
    (snapshot / "data" / "train-00000-of-00001.parquet").symlink_to("../../../blobs/12")
    assert len(undivided(opened(snapshot, streaming=streaming, val_split=None))) == 17
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").symlink_to(stream / "data" / "train-00000-of-00007.parquet")
    assert len(undivided(opened(tmp_path / "set", streaming=streaming, val_split=None, follow_links=True))) == 17


# ---------------------------------------------------------------- streams


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """120 images in seven Parquet files of row groups of five, as datasets writes them, and ten to validate."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("stream")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    images = [Image.fromarray(np.full((9, 12, 3), k, np.uint8)) for k in range(130)]
    whole = datasets.Dataset.from_dict({"image": images, "label": [k % 2 for k in range(130)]}, features=features)
    (folder / "set" / "data").mkdir(parents=True)
    for k in range(7):
        rows = range(120 * k // 7, 120 * (k + 1) // 7)
        path = folder / "set" / "data" / f"train-{k:05}-of-00007.parquet"
        whole.select(rows).to_parquet(str(path), batch_size=5)
    whole.select(range(120, 130)).to_parquet(str(folder / "set" / "data" / "test-00000-of-00001.parquet"))
    return folder / "set"


def streamed(root, cache, split="train", **changes) -> Source:
    return make_source(hf, split, root=str(root), **(OPTIONS | {"cache_dir": str(cache), "streaming": True} | changes))


def test_a_stream_holds_the_rows_of_the_data_set(stream, tmp_path):
    plain, rows = opened(stream), of_type(RowGroups, streamed(stream, tmp_path))
    assert len(rows) == len(plain) == 120 and rows.classes == plain.classes == ["even", "odd"]
    assert np.array_equal(labels_of(rows), labels_of(plain)) and len(np.unique(rows.groups.file)) == 7
    for k in range(120):
        assert torch.equal(rows[k][0], plain[k][0]) and rows[k][1] == plain[k][1]
    assert rows.name(20) == "data/train-00001-of-00007.parquet/row 3"
    assert [label for _, label in streamed(stream, tmp_path, "val")] == [0, 1] * 5
    parts = [streamed(stream, tmp_path, split, val_split=None) for split in ("train", "val")]
    assert [len(part) for part in parts] == [96, 24]
    assert streamed(stream, tmp_path, label_column=None).labels is None


NULLS = [1, None, 0, 1, None, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(("kind", "values", "classes"), [
    (datasets.ClassLabel(names=["cat", "dog"]), NULLS, ["cat", "dog"]),
    (datasets.Value("int64"), NULLS, ["0", "1"]),
    (datasets.Value("string"), [None if v is None else ("ant", "bee")[v] for v in NULLS], ["ant", "bee"]),
])  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_whose_label_is_null_have_none(tmp_path, kind, values, classes, streaming):
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = {"image": [Image.fromarray(picture) for picture in PICTURES], "label": values}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "set" / "train.parquet"))
    options = {"streaming": streaming, "val_split": None, "val_fraction": 0.5}
    both = [of_type(Subset, opened(tmp_path / "set", split, **options)) for split in ("train", "val")]
    assert all(part.classes == classes for part in both)
    label_by_index = {
        int(k): int(label) for part in both for k, label in zip(part.indices, labels_of(part), strict=True)
    }
    assert [label_by_index[k] for k in range(10)] == [-1 if v is None else v for v in NULLS]


def test_a_stream_reads_the_subset_alone(stream, tmp_path):
    for name, count in (("en", 3), ("fr", 4)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(count):
            source = stream / "data" / f"train-{k:05}-of-00007.parquet"
            shutil.copy(source, tmp_path / "set" / name / f"train-{k:05}.parquet")
    counts = []
    for name in ("en", "fr", None):
        training = streamed(tmp_path / "set", tmp_path, val_split=None, subset=name, val_fraction=0.1)
        counts.append(len(of_type(RowGroups, undivided(training)).names))
    assert counts == [3, 4, 7]
    with pytest.raises(ValueError, match=r"split train in a folder de \(data.subset\): train/"):
        streamed(tmp_path / "set", tmp_path, subset="de")


def test_a_file_is_of_one_split_as_datasets_reads_it(stream, tmp_path):
    names = ("train/train-0.parquet", "validation/train-0.parquet", "validation/part-train-1.parquet")
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stream / "data" / "train-00000-of-00007.parquet", tmp_path / "set" / name)
    for split, folder in (("train", "train"), ("val", "validation")):
        source = of_type(RowGroups, streamed(tmp_path / "set", tmp_path, split, val_split="validation"))
        expected = sorted(name for name in names if name.startswith(folder))
        assert source.names == expected
        rows = opened(tmp_path / "set", split, val_split="validation")
        assert len(rows) == len(source) == len(expected) * len(source) // len(source.names)


def test_a_fingerprint_tells_images_of_the_same_names_apart_and_stays_where_they_move(made, tmp_path):
    shutil.copytree(made / "parquet", tmp_path / "moved")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (9, 12, 3), np.uint8)) for k in range(10)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [k % 2 for k in range(10)]}, features=features)
    (tmp_path / "other").mkdir()
    rows.to_parquet(str(tmp_path / "other" / "train-00000-of-00001.parquet"))
    for streaming in (False, True):
        roots = made / "parquet", tmp_path / "moved", tmp_path / "other"
        sources = [opened(root, cache_dir=str(tmp_path), streaming=streaming, val_split=None) for root in roots]
        first, moved, other = map(fingerprint, sources)
        assert first == moved and [source.root for source in sources] == [str(root.resolve()) for root in roots]
        assert first != other and first.rpartition(", ")[0] == other.rpartition(", ")[0]


def test_what_is_remembered_of_a_remote_file_hangs_on_its_version(tmp_path):
    fetched = remote.Remote("memory://versions", tmp_path, 1.0, 0.1)
    stamps = []
    for tag in ("a", "b"):
        about = {"size": 3, "ETag": tag, "name": "x"}
        fetched._fs, fetched._fs_owner = SimpleNamespace(info=lambda path, about=about: about), os.getpid()
        stamps.append(fetched.stamp("x.tar"))
    assert stamps == ["3-a", "3-b"]


def test_a_stream_goes_file_by_file_and_mixes_within_a_window(stream, tmp_path):
    rows = of_type(RowGroups, streamed(stream, tmp_path, lanes=1, window=2))
    order = rows.order(0, 0)
    assert sorted(order) == list(range(120)) and not np.array_equal(order, rows.order(0, 1))
    files = rows.groups.file[np.searchsorted(rows.starts, order, side="right") - 1]
    changes = np.flatnonzero(np.diff(files))
    last = {int(f): np.flatnonzero(files == f)[-1] - np.flatnonzero(files == f)[0] for f in files}
    assert max(last.values()) < 17 + 3 * 10 and len(changes) > 6  # its own 17 rows, and a window on either side
    assert np.abs(np.diff(order)).mean() > 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("place", ["local", "url"])
def test_a_stream_gives_the_same_batches_with_any_workers_and_after_a_stop(stream, tmp_path, place):
    root = stream if place == "local" else f"file://{stream}"

    def source(name):
        changes = {"cache_gb": 5.5 * next(stream.rglob("train*")).stat().st_size / 1e9} if place == "url" else {}
        return streamed(root, tmp_path / name, **changes)

    whole = loaded(source("a"), 0)
    seen = [i for step in whole[:8] for batch in step for i in batch["index"].tolist()]
    assert sorted(seen) == list(range(120))
    for workers, kind in ((1, "thread"), (3, "thread"), (1, "process"), (3, "process")):
        same(whole, loaded(source("a"), workers, workers=kind))
    for start in (1, 5):  # stopped after so many steps, and started again
        same(whole[start:], loaded(source("b"), 2, start=start))
    kept = list((tmp_path / "a" / "shards").rglob("*.parquet"))
    assert (0 < len(kept) <= 5) if place == "url" else not kept


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_a_stream_without_a_duplicate(stream, tmp_path, world):
    from tests.test_data_shards import LOADING, transform

    seen, files = [], []
    for rank in range(world):
        rows = of_type(RowGroups, streamed(stream, tmp_path))
        options = LOADING | {"workers": "thread", "num_workers": 2, "max_bad_fraction": 0.0}
        loader = make_loader(rows, transform(), 16, 8 // world, 0, rank, world, **options)
        own = [i for step in loader.steps(0) for batch in step if batch["weight"] for i in batch["index"].tolist()]
        loader.close()
        seen += own
        files.append(set(rows.groups.file[np.searchsorted(rows.starts, own, side="right") - 1].tolist()))
    assert sorted(seen) == list(range(120))
    assert sum(map(len, files)) <= 7 + 2 * 3  # but for the files on a lane's edge each is read by one rank


def test_a_stream_from_a_place_that_fails_now_and_then_loses_nothing(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    rows = of_type(RowGroups, streamed(f"file://{stream}", tmp_path / "cache"))
    files = of_type(remote.Remote, rows.store)
    flaky = files._fs = Flaky(files.fs)
    same(loaded(streamed(stream, tmp_path), 0), loaded(rows, 0))
    assert flaky.count > 10 and files.fs is flaky


def test_a_damaged_file_of_a_stream_is_passed_over(stream, tmp_path):
    shutil.copytree(stream, tmp_path / "set")
    rows = of_type(RowGroups, streamed(tmp_path / "set", tmp_path / "cache"))
    path = tmp_path / "set" / "data" / "train-00003-of-00007.parquet"
    data = path.read_bytes()
    path.write_bytes(bytes(len(data) - 8) + data[-8:])  # as long as before
    batches = loaded(rows, 0, epochs=(0,))
    seen = [i for step in batches for batch in step for i in batch["index"].tolist()]
    files = rows.groups.file[np.searchsorted(rows.starts, seen, side="right") - 1]
    assert len(seen) == 120 and 3 not in files
    path.unlink()
    with pytest.raises(BadImage, match="cannot be read"):
        rows[int(rows.starts[np.searchsorted(rows.groups.file, 3)])]


def test_faults_of_a_stream_are_named(stream, tmp_path):
    for changes, says in (
        (
            {"image_column": "img"},
            "data.image_column=img is not one of the columns of data/train-00000.*: image",
        ),
        ({"label_column": "fine"}, "data.label_column=fine is not one of the columns of"),
        ({"train_split": "training"}, "holds no Parquet files of the split training: training/"),
    ):
        with pytest.raises(ValueError, match=says):
            streamed(stream, tmp_path / "cache", **changes)
    with pytest.raises(ValueError, match="data.root=.*does not exist"):
        streamed(stream / "nowhere", tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"nothing" * 9)
    with pytest.raises(ValueError, match="train.parquet under data.root is not a Parquet file"):
        streamed(tmp_path / "bad", tmp_path)


def test_files_that_lead_out_of_the_root_are_refused(stream, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").symlink_to(stream / "data" / "train-00000-of-00007.parquet")
    with pytest.raises(ValueError, match=r"the shard train\.parquet in .* is a link that leads out of data\.root\.$"):
        streamed(tmp_path / "set", tmp_path / "cache")
    says = r"name '.*\.\./train-0\.parquet', which leads out of data\.root\.$"
    monkeypatch.setattr(remote.Remote, "names", lambda self, pattern: ["a/../../train-0.parquet"])
    with pytest.raises(ValueError, match=says):  # as a server says
        streamed(f"file://{stream}", tmp_path / "cache")
    urls = [f"file://{stream}/data/{name}.parquet" for name in ("a/b", "../train-0")]
    monkeypatch.setattr(parquet_files, "hub_files", lambda *given: urls)
    with pytest.raises(ValueError, match=says):
        streamed("hf://some/set", tmp_path / "cache")


def test_what_datasets_saved_is_mapped_and_needs_no_stream(made, tmp_path):
    assert len(streamed(made / "arrow", tmp_path)) == 10


# ---------------------------------------------------------------- packed by us


@pytest.fixture
def folder(tmp_path):
    """JPEGs of two classes, one of them bad."""
    from PIL import Image

    chance = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(30):
            pixels = chance.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{k}.jpg")
    (tmp_path / "photos" / "ant" / "bad.jpg").write_bytes(b"nothing")
    return tmp_path / "photos"


def test_parquet_files_that_we_pack_are_read_by_datasets_as_a_stream_and_in_runs(folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(out), "data=folder", f"data.root={folder}", f"data.cache_dir={tmp_path / 'cache'}"]
    command += ["--format", "parquet", "--per-shard", "20", "--workers", "1"]
    assert pack.main(command) == 1
    assert "1 of 55 images cannot be used, more than data.max_bad_fraction=0.01 allows" in capsys.readouterr().err
    command.append("data.max_bad_fraction=0.05")
    assert pack.main(command) == 0
    assert "train: " in (text := capsys.readouterr().out) and "3 shards" in text
    head, _ = flat.read(out / "train" / "index.bin")
    assert head["format"] == "mae-parquet-1" and sum(head["counts"]) + text.count("1 bad") >= 54
    for name, digest in zip(head["names"], head["sha256"], strict=True):
        assert hashlib.sha256((out / "train" / name).read_bytes()).hexdigest() == digest

    theirs = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "theirs"))
    assert theirs["train"].features["label"].names == ["ant", "bee"]
    assert sum(map(len, theirs.values())) == 60
    row = theirs["train"].cast_column("image", datasets.Image(decode=False))[0]
    kept = {path.read_bytes() for path in folder.rglob("*.jpg")}
    assert row["image"]["bytes"] in kept  # the very bytes of a file
    assert theirs["train"][0]["image"].size == (24, 20)

    changes = {"val_split": "val", "label_column": "label"}
    rows, plain = streamed(out, tmp_path / "cache", **changes), opened(out, **changes)
    assert [rows.raw(k) for k in range(len(rows))] == [plain.raw(k) for k in range(len(plain))]
    assert np.array_equal(labels_of(rows), labels_of(plain)) and rows.classes == ["ant", "bee"]

    run = [*TINY, "data=hf", f"data.root={out}", "data.streaming=true", "data.val_split=val", "data.fraction=1.0"]
    run += [f"data.cache_dir={tmp_path / 'cache'}", "task=finetune", "task.batch_size=8", "task.epochs=1"]
    assert run_here(tmp_path / "run", *run, "task.warmup_epochs=0", "data.num_workers=2") == 0
    assert pack.main(command) == 1 and "is packed already" in capsys.readouterr().err


def test_parquet_without_pyarrow_is_said_in_a_sentence(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    command = [str(tmp_path / "out"), "data=folder", f"data.root={folder}", "--format", "parquet"]
    assert pack.main([*command, f"data.cache_dir={tmp_path / 'cache'}"]) == 1
    assert "--format parquet needs pyarrow: pip install pyarrow" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        (["bus", "car", "train"], "takes train for splits. Use data=folder"),
        (["bus", "car", "test"], "takes test for splits. Use data=folder"),
        (["Training/x", "Training/y", "Testing/x"], "takes none of them for a split. Use data=folder"),
        (["train/x", "train/y", "test/x", "test/y"], None),
        (["bus", "car"], None),
    ],
)
def test_folders_of_images_that_datasets_would_part_otherwise_are_refused(folders, says, tmp_path):
    for name in folders:
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(4):
            Image.fromarray(PICTURES[k]).save(tmp_path / "set" / name / f"{k}.png")
    split = "test" if "test/x" in folders else None
    options = OPTIONS | {"root": str(tmp_path / "set"), "val_split": split, "cache_dir": str(tmp_path / "cache")}
    if says is None:
        assert len(make_source(hf, "train", **options).classes) == 2
        return
    with pytest.raises(ValueError, match=says):
        make_source(hf, "train", **options)
