"""Tar shards: their order, reading, fetching, and the program that packs them."""

import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import first_digits, labels_of, make_loader, make_source, of_type, undivided
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae.data import flat, pack, remote, store, transforms
from mae.data.decode import Decoder
from mae.data.sampler import Batches, Sampler
from mae.data.shards import index as shard_index
from mae.data.shards import packing
from mae.data.shards import source as shards
from mae.data.shards.index import Index
from mae.data.shards.source import Shards
from mae.data.shards.tar import Members, members
from mae.data.source import Arrays, BadImage, Source
from mae.data.sources import folder
from mae.data.sources.folder import image_folder
from mae.data.subsets import Subset

KEEP = pack.Form(size=None, quality=90)
OPTIONS = {
    "in_chans": 3,
    "val_fraction": 0.2,
    "exif_orientation": False,
    "max_pixels": 10**7,
    "cache_gb": 1.0,
    "retry_s": 2.0,
    "lanes": 4,
    "window": 2,
    "follow_links": False,
    "image_key": None,
    "label_key": None,
    "sample_key": "first_dot",
    "splits": "auto",
}
LOADING = {"prefetch": 2, "timeout_s": 60.0, "workers": "process", "repeats": 1, "fraction": 1.0, "per_class": None}


@pytest.fixture(scope="module")
def source():
    return first_digits(110)


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed")
    for split in ("train", "val"):
        pack.pack(source, out / split, KEEP, per_shard=12, workers=1)
    return out


def opened(root, tmp_path, split="train", **changes):
    return make_source(
        shards.tar_shards, split, root=str(root), cache_dir=str(tmp_path / "cache"), **(OPTIONS | changes)
    )


def fetching(packed, tmp_path, **changes) -> tuple[Shards, remote.Remote]:
    """The training images by a URL, and the store that fetches their shards."""
    source = of_type(Shards, opened(f"file://{packed}", tmp_path, **changes))
    return source, of_type(remote.Remote, source.store)


def order_of(source: Source, epoch: int = 0) -> np.ndarray:
    """In which an epoch reads a source that has an order of its own."""
    return of_type(np.ndarray, source.order(0, epoch))


def made_up(counts):
    """Shards without files, for what depends on their index alone."""
    total = sum(counts)
    nothing = Members(*(np.zeros(total, np.int64) for _ in range(5)))
    index = Index([f"{k}.tar" for k in range(len(counts))], [0] * len(counts), counts, nothing, [])
    return lambda lanes, window: Shards(index, store.Local(Path("/")), Decoder(3, False, 1), lanes, window)


# ---------------------------------------------------------------- order


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    lanes=st.integers(1, 8),
    window=st.integers(1, 4),
    world=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=100)
def test_each_image_once_over_ranks(counts, lanes, window, world, seed):
    source = made_up(counts)(lanes, window)
    seen = []
    for rank in range(world):
        sampler = Sampler(len(source), Batches(4 * world, 2, seed, rank, world), source.order)
        for step in range(sampler.steps_per_epoch):
            seen += [i for t in sampler.micro_batches(1, step) if t.weight for i in t.indices.tolist()]
    assert sorted(seen) == list(range(sum(counts)))
    assert [source.index.shard(i) for i in range(sum(counts))] == [k for k, n in enumerate(counts) for _ in range(n)]


def test_ranks_stay_on_their_shards_and_windows_mix():
    source = made_up([50] * 40)(4, 3)
    order = source.order(0, 0)
    per_rank = [{source.index.shard(i) for i in order[r::4].tolist()} for r in range(4)]
    assert sum(len(s) for s in per_rank) <= 40 + 3  # no shard is read by two, but for those on a lane's edge
    first = [source.index.shard(i) for i in order[0::4][:150].tolist()]
    assert 3 <= len(set(first)) <= 4 and first != sorted(first)
    assert not np.array_equal(order, source.order(0, 1))


def test_a_part_of_the_images_keeps_ranks_on_their_shards():
    source = made_up([50] * 64)(16, 3)
    part = Subset(Subset(source, np.flatnonzero(np.arange(3200) % 10)), np.arange(5, 2880))  # held out, then a fraction
    order = order_of(part)
    assert sorted(order) == list(range(len(part))) and not np.array_equal(order, order_of(part, 1))
    numbers = of_type(Subset, part.source).indices[part.indices[order]]
    per_rank = [{source.index.shard(i) for i in numbers[r::4].tolist()} for r in range(4)]
    assert sum(len(shards) for shards in per_rank) <= 64 + 16


def test_a_name_that_is_no_utf_8_can_be_told(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("caf\udce9.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(image.getvalue())
            tar.addfile(member, io.BytesIO(image.getvalue()))
    found = opened(tmp_path, tmp_path, val_fraction=0.5)
    names = {found.name(0), opened(tmp_path, tmp_path, "val", val_fraction=0.5).name(0)}
    assert names == {"a.tar/caf\\xe9", "a.tar/b"}


# ---------------------------------------------------------------- reading


def test_shards_hold_what_was_packed(source, packed, tmp_path):
    found = opened(packed, tmp_path)
    assert len(found) == len(source) and found.classes == source.classes
    for i in range(len(found)):
        number = int(found.name(i).split("/")[1])
        image, label = found[i]
        assert torch.equal(image, source[number][0]) and label == source[number][1]


def transform():
    return transforms.RandomResizedCrop(img_size=8, scale=[0.2, 1.0], ratio=[0.75, 1.33], min_crop=0.0, hflip=True)


def loaded(source, count, epochs=(0, 1), start=0, **changes):
    loader = make_loader(source, transform(), 16, 8, 0, num_workers=count, max_bad_fraction=0.3, **(LOADING | changes))
    found = []
    for epoch in epochs:
        for step in loader.steps(epoch, start if epoch == epochs[0] else 0):
            found.append([{k: v for k, v in b.items()} for b in step])
    loader.close()
    return found


def same(a, b):
    flat = [[x for step in side for x in step] for side in (a, b)]
    assert len(flat[0]) == len(flat[1])
    for x, y in zip(*flat, strict=True):
        assert all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("fraction", [1.0, 0.7])
def test_batches_do_not_depend_on_workers_or_restarts(packed, tmp_path, fraction):
    whole = loaded(opened(packed, tmp_path), 0, fraction=fraction)
    same(whole, loaded(opened(packed, tmp_path), 2, fraction=fraction))
    same(whole[3:], loaded(opened(packed, tmp_path), 1, start=3, fraction=fraction))


def test_foreign_shards_are_indexed_once(tmp_path, monkeypatch):
    root = tmp_path / "foreign"
    root.mkdir()
    for shard in range(3):
        with tarfile.open(root / f"{shard}.tar", "w") as archive:
            for k in range(5):
                out = io.BytesIO()
                Image.fromarray(np.full((9, 9, 3), 20 * shard + k, np.uint8)).save(out, "PNG")
                number = str(k % 2).encode()
                for name, data in ((f"a/{k}.seg.png", b"no"), (f"a/{k}.json", b"{}"), (f"a/{k}.cls", number)):
                    entry = tarfile.TarInfo(name if "seg" not in name else f"a/{k}.jpg")
                    data = out.getvalue() if "seg" in name else data
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
            evil = tarfile.TarInfo("../../evil.png")
            evil.type, evil.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(evil)
    whole = undivided(opened(root, tmp_path, val_fraction=0.01))
    assert len(whole) == 15 and whole.classes == ["0", "1"]
    assert [int(whole[i][0][0, 0, 0]) for i in range(15)] == [20 * s + k for s in range(3) for k in range(5)]
    assert labels_of(whole).tolist() == [0, 1, 0, 1, 0] * 3
    monkeypatch.setattr(shard_index, "members", None)  # not called again
    assert len(opened(root, tmp_path)) == 12


def test_shards_that_are_cut_short(packed, tmp_path, caplog):
    data = (packed / "train" / "shard-000000.tar").read_bytes()
    found = members(io.BytesIO(data[: len(data) // 2]), "x.tar")
    assert len(found.offsets) == 6 and "is cut short" in caplog.text
    with pytest.raises(ValueError, match="the shard x.tar is not a tar file of images"):
        members(io.BytesIO(b"no tar" * 1000), "x.tar")


def test_faults_of_shards_are_named(packed, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data.root=.*holds no shard"):
        opened(tmp_path / "empty", tmp_path)
    (tmp_path / "damaged").mkdir()
    index = (packed / "train" / "index.bin").read_bytes()
    for data in (index[:-50], b"{}", b"\xff"):
        (tmp_path / "damaged" / "index.bin").write_bytes(data)
        with pytest.raises(ValueError, match="index.bin is damaged"):
            opened(tmp_path / "damaged", tmp_path)
    (tmp_path / "damaged" / "index.bin").write_bytes(index)
    with pytest.raises(BadImage, match="cannot be read"):
        opened(tmp_path / "damaged", tmp_path)[0]


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("names", [5] * 10, "TypeError: expected str"),
        ("names", None, "TypeError"),
        ("names", [""] * 10, "a shard has no name"),
        ("names", ["a/."] * 10, "a shard has no name"),
        ("sizes", [], "its columns do not belong together"),
        ("counts", [12] * 10, "its columns do not belong together"),
        ("counts", [122, *[12] * 8, -108], "its columns do not belong together"),
        ("format", "other", "it is not an index of shards"),
        ("classes", ["0", "1"], "it holds the label 9 of 2 classes"),
    ],
)
def test_an_index_whose_parts_do_not_fit_is_damaged(packed, tmp_path, part, value, says):
    head, arrays = flat.read(packed / "train" / "index.bin")
    assert len(head["names"]) == 10
    flat.write(tmp_path / "set" / "index.bin", head | {part: value}, arrays)
    with pytest.raises(ValueError, match=rf"index\.bin is damaged \({says}.*\): pack the shards anew\.$"):
        opened(tmp_path / "set", tmp_path)


def test_an_index_is_made_anew_where_the_one_kept_is_damaged_or_none_can_be_kept(packed, tmp_path, caplog):
    caplog.set_level("WARNING")
    root = shutil.copytree(packed / "train", tmp_path / "foreign")
    (root / "index.bin").unlink()
    assert len(undivided(opened(root, tmp_path))) == 110
    (kept,) = (tmp_path / "cache" / "indices").iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:-50], b"", b"[]\n", b'{"arrays": 5}\n', whole.replace(b'"names"', b'"nones"')):
        kept.write_bytes(damaged)
        assert len(undivided(opened(root, tmp_path))) == 110 and kept.read_bytes() == whole
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "cache").write_text("not a folder")
    caplog.clear()
    assert len(undivided(opened(root, tmp_path / "none"))) == 110
    assert "is not kept: " in caplog.text and "(data.cache_dir)" in caplog.text
    caplog.clear()
    caplog.set_level(logging.WARNING)  # which splits are there is said too
    assert len(opened(packed, tmp_path / "none")) == 110 and not caplog.text  # what was packed needs no cache


@pytest.mark.parametrize("name", ["/etc/passwd", "../other.tar", "a/../../other.tar", "a\0.tar"])
@pytest.mark.parametrize("remote", [False, True])
def test_an_index_that_leads_out_of_the_root_is_refused(packed, tmp_path, name, remote):
    root, index = tmp_path / "set", Index.load(packed / "train" / "index.bin")
    root.mkdir()
    index.names[3] = name
    index.save(root / "index.bin")
    with pytest.raises(ValueError, match=r"name '.*', which leads out of data\.root"):
        opened(f"file://{root}" if remote else root, tmp_path)


def test_a_link_that_leads_out_of_the_root_is_refused(packed, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x.tar").symlink_to(packed / "train" / "shard-000000.tar")
    with pytest.raises(ValueError, match=r"the shard x\.tar in .* is a link that leads out of data\.root"):
        opened(tmp_path / "set", tmp_path)
    with pytest.raises(ValueError, match=r"^data\.follow_links=true is needed: the shard"):
        opened(tmp_path / "set", tmp_path)
    assert len(undivided(opened(tmp_path / "set", tmp_path, follow_links=True))) == 12


def test_links_of_the_hubs_cache_are_read(packed, tmp_path):
    repository = tmp_path / "datasets--some--set"
    (repository / "blobs").mkdir(parents=True)
    shutil.copy(packed / "train" / "shard-000000.tar", repository / "blobs" / "1234")
    (repository / "other").write_bytes(b"")
    for below, blob in (("", "../../blobs/1234"), ("data", "../../../blobs/1234")):
        (repository / "snapshots" / "rev" / below).mkdir(parents=True, exist_ok=True)
        (repository / "snapshots" / "rev" / below / "a.tar").symlink_to(blob)
        assert len(undivided(opened(repository / "snapshots" / "rev" / below, tmp_path))) == 12
    for blob in ("../../other", "../../../blobs/1234"):  # beside the blobs, and of another repository
        (tmp_path / "blobs").mkdir(exist_ok=True)
        (repository / "snapshots" / "rev" / "a.tar").unlink()
        (repository / "snapshots" / "rev" / "a.tar").symlink_to(blob)
        with pytest.raises(ValueError, match=r"a\.tar in .* is a link that leads out of data\.root"):
            opened(repository / "snapshots" / "rev", tmp_path)


# ---------------------------------------------------------------- samples of several files


def encoded(value):
    out = io.BytesIO()
    Image.fromarray(np.full((9, 9, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def tar(path, files):
    """A tar file of (name, bytes, or a grey value for a picture)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            data = encoded(data) if isinstance(data, int) else data
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def everything(root, tmp_path, **changes):
    """(grey value, label) of each image, in the order of the shards."""
    source = undivided(opened(root, tmp_path, "val", val_fraction=1.0, **changes))
    return [(int(source[i][0][0, 0, 0]), source[i][1]) for i in range(len(source))]


def test_the_image_of_a_sample_is_the_file_of_its_exact_suffix(tmp_path, caplog):
    files = [(f"a/{k:02}.{kind}", value) for k in range(5) for kind, value in (("depth.png", 200), ("JPG", k))]
    tar(tmp_path / "set" / "a.tar", files)
    assert everything(tmp_path / "set", tmp_path) == [(k, -1) for k in range(5)]
    assert "files beside the image of a sample are not read: depth.png (5) (data.image_key)" in caplog.text
    assert everything(tmp_path / "set", tmp_path, image_key="depth.png") == [(200, -1)] * 5
    assert everything(tmp_path / "set", tmp_path, image_key=".jpg") == [(k, -1) for k in range(5)]
    caplog.clear()
    everything(tmp_path / "set", tmp_path)  # from the cache
    assert "depth.png (5)" in caplog.text
    with pytest.raises(
        ValueError, match=r"no shard \(\*\.tar\) holds an image \(looked for KEY\.rgb\.png \(data\.image"
    ):
        everything(tmp_path / "set", tmp_path, image_key="rgb.png")


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("suffixes", "says"), [
    (("jpg", "png"), r"the sample 0 of the shard a\.tar has several images \(0\.jpg, 0\.png\): choose by "
     r"data\.image_key=jpg\.$"),
    (("left.png", "right.png"), r"several images \(0\.left\.png, 0\.right\.png\): choose by "
     r"data\.image_key=left\.png, or data\.sample_key=last_dot if each image is a sample of its own .*\.$"),
])  # fmt: skip
def test_a_sample_of_several_images_is_refused(tmp_path, suffixes, says, apart):
    files = [(f"{k}.{suffix}", n) for k in range(4) for n, suffix in enumerate(suffixes)]
    tar(tmp_path / "set" / "a.tar", sorted(files, key=lambda file: file[1]) if apart else files)
    with pytest.raises(ValueError, match=says):
        everything(tmp_path / "set", tmp_path)
    assert everything(tmp_path / "set", tmp_path, image_key=suffixes[1]) == [(1, -1)] * 4


def test_names_with_dots_are_samples_of_their_own_with_last_dot(tmp_path):
    files = [
        (f"n{k // 4}.{k}.{kind}", k if kind == "jpg" else b"%d" % (k // 4)) for k in range(8) for kind in ("jpg", "cls")
    ]
    tar(tmp_path / "set" / "a.tar", files)
    with pytest.raises(ValueError, match=r"n0\.0\.jpg, n0\.1\.jpg, n0\.2\.jpg and 1 more.*data\.sample_key=last_dot"):
        everything(tmp_path / "set", tmp_path)
    assert everything(tmp_path / "set", tmp_path, sample_key="last_dot") == [(k, k // 4) for k in range(8)]
    tar(
        tmp_path / "one" / "a.tar",
        [(f"n{k}.x.{kind}", k if kind == "jpg" else b"1") for k in range(4) for kind in ("jpg", "cls")],
    )
    with pytest.raises(
        ValueError, match=r"the label n0\.x\.cls and no n0\.cls: set data\.label_key=x\.cls, or data\.sample"
    ):
        everything(tmp_path / "one", tmp_path)
    for changes in ({"sample_key": "last_dot"}, {"label_key": "x.cls"}):
        assert everything(tmp_path / "one", tmp_path, **changes) == [(k, 1) for k in range(4)]


def test_a_label_of_another_suffix(tmp_path):
    files = [
        (f"{k}.{kind}", data)
        for k in range(4)
        for kind, data in (("jpg", k), ("coarse.cls", b"0"), ("fine.cls", b"%d" % k))
    ]
    tar(tmp_path / "set" / "a.tar", files)
    with pytest.raises(
        ValueError, match=r"has the label 0\.coarse\.cls and no 0\.cls: set data\.label_key=coarse\.cls"
    ):
        everything(tmp_path / "set", tmp_path)
    assert everything(tmp_path / "set", tmp_path, label_key="fine.cls") == [(k, k) for k in range(4)]
    with pytest.raises(ValueError, match=r"data\.label_key=txt: no image in data\.root=.* has such a file"):
        everything(tmp_path / "set", tmp_path, label_key="txt")


def test_files_of_a_sample_that_stand_apart_belong_together(tmp_path, caplog):
    images, labels = [(f"{k}.jpg", k) for k in range(4)], [(f"{k}.cls", b"%d" % (k % 2)) for k in range(5)]
    tar(tmp_path / "set" / "a.tar", [*images, *labels])
    assert everything(tmp_path / "set", tmp_path) == [(k, k % 2) for k in range(4)]
    assert "1 labels belong to no image: they are left out" in caplog.text
    tar(tmp_path / "depth" / "a.tar", [*((f"{k}.depth.png", 200) for k in range(5)), *images])
    assert everything(tmp_path / "depth", tmp_path) == [(k, -1) for k in range(4)]
    assert "1 samples lack the image that others have: they are left out" in caplog.text
    tar(tmp_path / "again" / "a.tar", [*images, ("0.jpg", 9)])  # as `tar -r` adds a file once more
    assert everything(tmp_path / "again", tmp_path) == [(0, -1), (1, -1), (2, -1), (3, -1), (9, -1)]
    tar(tmp_path / "twice" / "a.tar", [("0.jpg", 1), ("0.jpg", 2)])
    with pytest.raises(ValueError, match=r"the shard a\.tar holds 0\.jpg twice: pack it anew\."):
        everything(tmp_path / "twice", tmp_path)


def test_what_macos_and_webdataset_leave_in_archives_is_no_image(tmp_path):
    files = []
    for k in range(4):
        for kind, data in (("jpg", k), ("cls", b"%d" % (k % 2))):
            files += [
                (f"./._{k}.{kind}", b"\0\5\x16\7"),
                (f"__MACOSX/{k}.{kind}", b"\0\5\x16\7"),
                (f"./{k}.{kind}", data),
            ]
    files += [("__meta__", b"{}"), ("__meta__/0.jpg", b"{}"), (".thumbs/0.jpg", 9)]
    tar(tmp_path / "set" / "a.tar", files)
    (tmp_path / "set" / "._a.tar").write_bytes(b"\0\5\x16\7" + bytes(1000))
    assert everything(tmp_path / "set", tmp_path) == [(k, k % 2) for k in range(4)]
    assert everything(f"file://{tmp_path}/set", tmp_path) == [(k, k % 2) for k in range(4)]


def test_keys_do_not_go_with_an_index(packed, tmp_path):
    with pytest.raises(
        ValueError, match=r"index\.bin says which files are the images and labels: leave out data\.image"
    ):
        opened(packed, tmp_path, image_key="jpg")


def test_an_index_that_an_earlier_version_kept_is_not_used(tmp_path):
    shard = tar(
        tmp_path / "set" / "a.tar",
        [(f"{k}.{kind}", 200 if "d" in kind else k) for k in range(3) for kind in ("d.png", "jpg")],
    )
    stamps = json.dumps(
        [shard_index.FORMAT, str(tmp_path / "set"), [["a.tar", store.Local(shard.parent).stamp("a.tar")]]]
    )
    kept = tmp_path / "cache" / "indices" / f"{hashlib.sha256(stamps.encode()).hexdigest()[:20]}.bin"
    row = Members(*(np.array([3], kind) for kind in ("i8", "i8", "i4", "u1", "i8")))
    Index(["a.tar"], [shard.stat().st_size], [1], row._replace(labels=np.array([-1], "i4")), []).save(kept)
    assert len(everything(tmp_path / "set", tmp_path)) == 3


@pytest.mark.parametrize(("files", "says"), [
    ({"a.tar": [("0.txt", b"x"), ("b.tar", b"x")]}, r"no shard \(\*\.tar\) holds an image \(looked for \.jpg "),
    ({"a.tar": []}, r"no shard \(\*\.tar\) holds an image"),
    ({"a.tar": [("0.jpg", 1)]}, r"data\.root holds one image only: two are needed, to train and to validate\."),
    ({"a.tar": b""}, r"the shard a\.tar is not a tar file of images \(empty file\)"),
    ({"a.tar": b"<html>"}, r"the shard a\.tar is not a tar file of images"),
    ({"a.tar": None}, r"the shard a\.tar in data\.root=.* cannot be read: it is not a regular file"),
    ({"a.tar.gz": b""}, r"holds no shard \(\*\.tar\)"),
])  # fmt: skip
def test_odd_shards_are_refused_in_words(tmp_path, files, says):
    for name, content in files.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(exist_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content) if isinstance(content, bytes) else tar(path, content)
    with pytest.raises(ValueError, match=says):
        opened(tmp_path / "set", tmp_path)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(("train", "val", "others"), [
    ("train/{}", "val/{}", ["extra/{}"]),
    ("train/{}", "validation/{}", []),
    ("Train/{}", "Valid/{}", []),
    ("training/{}", "test/{}", []),
    ("train-{}", "val-{}", ["test-{}"]),
    ("imagenet1k-train-000{}", "imagenet1k-validation-0{}", []),
])  # fmt: skip
def test_shards_of_training_and_validation_are_told_by_folders_and_names(tmp_path, train, val, others, remote, caplog):
    caplog.set_level("INFO")
    for value, name in enumerate((train, val, *others)):
        for number in range(2):
            tar(tmp_path / "set" / f"{name.format(number)}.tar", [("0.jpg", value), ("1.jpg", value)])
    root = f"file://{tmp_path}/set" if remote else tmp_path / "set"
    for split, value in (("train", 0), ("val", 1)):
        source = opened(root, tmp_path, split)
        assert [int(source[i][0][0, 0, 0]) for i in range(len(source))] == [value] * 4
    assert "is for training: 4 images" in caplog.text and "is for validation: 4 images" in caplog.text


def test_shards_of_splits_that_can_be_read_in_two_ways(tmp_path):
    for value, name in enumerate(("train-0", "val-0", "more-0")):
        tar(tmp_path / "set" / f"{name}.tar", [("0.jpg", value), ("1.jpg", value)])
    says = (
        r"shards of train and val beside more-0\.tar, which can be read in two ways\. Type data\.splits=\[train,val\] "
    )
    with pytest.raises(ValueError, match=f"{says}to leave the others out, or data\\.splits=off"):
        opened(tmp_path / "set", tmp_path)
    assert len(opened(tmp_path / "set", tmp_path, splits=["train", "val"])) == 2
    assert len(opened(tmp_path / "set", tmp_path, "val", splits=["train", "val"])) == 2
    assert len(undivided(opened(tmp_path / "set", tmp_path, splits="off"))) == 6
    tar(tmp_path / "one" / "train" / "0.tar", [(f"{k}.jpg", k) for k in range(10)])
    assert [len(opened(tmp_path / "one", tmp_path, split)) for split in ("train", "val")] == [8, 2]
    tar(tmp_path / "classes" / "train_station-0.tar", [("0.jpg", 0), ("1.jpg", 1)])  # of no split
    tar(tmp_path / "classes" / "test_tube-0.tar", [("0.jpg", 0), ("1.jpg", 1)])
    assert len(undivided(opened(tmp_path / "classes", tmp_path))) == 4


def test_a_shard_without_images_among_others(tmp_path):
    for name, files in (("a", []), ("b", [("0.jpg", 0), ("1.jpg", 1)]), ("c", [("x.txt", b"")])):
        tar(tmp_path / "set" / f"{name}.tar", files)
    source = opened(tmp_path / "set", tmp_path, "val", val_fraction=1.0)
    assert [source.name(i) for i in range(2)] == ["b.tar/0", "b.tar/1"] and sorted(order_of(source)) == [0, 1]


def test_members_that_are_no_images_are_refused(tmp_path, monkeypatch):
    def shard(label, size):
        (tmp_path / "set").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "set" / "x.tar", "w") as archive:
            for name, data in (("a.jpg", bytes(size)), ("a.cls", label)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))

    for label in (b"2000000000", b"-1", b"99999999999999"):
        shard(label, 10)
        with pytest.raises(ValueError, match=r"a\.cls holds the label .*: it must be from 0 to 999999"):
            opened(tmp_path / "set", tmp_path)
    with tarfile.open(tmp_path / "set" / "x.tar", "w") as archive:
        for name, kind in (("a.jpg", tarfile.GNUTYPE_SPARSE), ("b.jpg", tarfile.REGTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type = kind
            archive.addfile(entry)
    with open(tmp_path / "set" / "x.tar", "rb") as file:
        assert members(file, "x.tar").text.tobytes() == b"b"
    shard(b"1", 1000)
    monkeypatch.setattr(Decoder, "most_bytes", 999)
    source = undivided(opened(tmp_path / "set", tmp_path, "val", val_fraction=1.0))
    with pytest.raises(BadImage, match="1000 bytes are more than an image of data.max_pixels takes"):
        source[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_five_thousand_images_over_ranks_and_workers(tmp_path):
    pixels = torch.arange(5_000)[:, None, None, None] % 251
    whole = Arrays(pixels.to(torch.uint8).expand(-1, 1, 8, 8), None, [], "made")
    (tmp_path / "packed" / "val").mkdir(parents=True)
    pack.pack(whole, tmp_path / "packed" / "train", KEEP, per_shard=125, workers=2)
    chance, plain = np.random.default_rng(0), {}

    def sequence(world, workers, kind, start):
        source = opened(tmp_path / "packed", tmp_path, in_chans=1)
        found = []
        for rank in range(world):
            options = LOADING | {"workers": kind, "num_workers": workers, "max_bad_fraction": 0.0}
            loader = make_loader(source, transform(), 256, 64, 0, rank, world, **options)
            batches = [b["index"] for step in loader.steps(0, start) for b in step if b["weight"] > 0]
            loader.close()
            found.append(torch.cat(batches).tolist())
        return found

    for world in (1, 2, 4):
        for workers, kind in ((0, "auto"), (3, "thread"), (1, "process"), (3, "process")):
            found = sequence(world, workers, kind, 0)
            assert sorted(i for rank in found for i in rank) == list(range(5_000))
            assert plain.setdefault(world, found) == found
            start = int(chance.integers(1, 19))  # killed here, and started again
            for rank, tail in zip(found, sequence(world, workers, kind, start), strict=True):
                assert rank[start * 256 // world :] == tail


# ---------------------------------------------------------------- fetching


def test_remote_shards_are_fetched_once_and_room_is_made(packed, tmp_path):
    plain = loaded(opened(packed, tmp_path), 0)
    size = (packed / "train" / "shard-000000.tar").stat().st_size
    source = opened(f"file://{packed}", tmp_path, cache_gb=4.5 * size / 1e9)
    same(plain, loaded(source, 0))
    kept = list((tmp_path / "cache" / "shards").rglob("*.tar"))
    assert 0 < sum(path.stat().st_size for path in kept) <= 4.5 * size
    same(plain, loaded(opened(f"file://{packed}", tmp_path), 2))


def test_a_lock_is_let_go_of_though_a_process_was_forked_meanwhile(tmp_path):
    from multiprocessing import get_context

    fork, path = get_context("fork"), tmp_path / "x.tar"
    with remote.locked(path):
        child = fork.Process(target=time.sleep, args=(60,))  # has a copy of the lock's file
        child.start()
    other = threading.Thread(target=lambda: remote.locked(path).__enter__(), daemon=True)
    other.start()
    other.join(5)
    free = not other.is_alive()
    child.kill()
    child.join()
    assert free


def test_what_comes_next_is_fetched_meanwhile(packed, tmp_path):
    source, remote_store = fetching(packed, tmp_path, lanes=1, window=1)
    order = source.order(0, 0)
    source.prefetch(0, 0, order[:4])
    (future,) = remote_store._coming.values()
    future.result()
    (fetched,) = (p.name for p in (tmp_path / "cache" / "shards").rglob("*.tar"))
    assert fetched == source.index.names[source.index.shard(int(order[12]))]


def test_a_fetch_that_hangs_does_not_keep_the_program_from_ending(packed, tmp_path):
    class Hangs:
        def __init__(self):
            self.begun, self.go_on = threading.Event(), threading.Event()

        def open(self, *given, **options):
            self.begun.set()
            self.go_on.wait(60)
            raise FileNotFoundError

        def invalidate_cache(self):
            pass

    source, remote_store = fetching(packed, tmp_path, lanes=1, window=1, retry_s=0.0)
    before = set(threading.enumerate())
    hangs = Hangs()
    remote_store._fs, remote_store._fs_owner = hangs, os.getpid()
    source.prefetch(0, 0, source.order(0, 0)[:4])
    assert hangs.begun.wait(10)
    begun = set(threading.enumerate()) - before
    hangs.go_on.set()
    assert begun and all(thread.daemon for thread in begun)
    for thread in begun:
        thread.join()


class Flaky:
    """A file system whose every second reading breaks off, or all of one file."""

    def __init__(self, fs, lost=None):
        self.fs, self.lost, self.count = fs, lost, 0

    def __getattr__(self, name):
        return getattr(self.fs, name)

    def open(self, path, *args, **options):
        self.count += 1
        if self.count % 2 or path.endswith(str(self.lost)):
            raise ConnectionResetError("the other side went away")
        return self.fs.open(path, *args, **options)


def test_a_place_that_fails_now_and_then_loses_nothing(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    source, remote_store = fetching(packed, tmp_path)
    flaky = remote_store._fs = Flaky(remote_store.fs)
    same(loaded(opened(packed, tmp_path), 0), loaded(source, 0))
    assert flaky.count > 10 and remote_store.fs is flaky


def test_shards_without_an_index_are_read_through_in_spite_of_failures(packed, tmp_path, monkeypatch):
    root = shutil.copytree(packed / "train", tmp_path / "foreign")
    (root / "index.bin").unlink()
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    plain = remote.Remote(f"file://{root}", tmp_path / "cache", 1.0, 1.0).fs
    monkeypatch.setattr(remote.Remote, "fs", Flaky(plain))
    shard_index = of_type(Shards, undivided(opened(f"file://{root}", tmp_path))).index
    assert shard_index.names == Index.load(packed / "train" / "index.bin").names and shard_index.counts.sum() == 110
    monkeypatch.setattr(remote.Remote, "fs", Flaky(plain, lost="shard-000003.tar"))
    with pytest.raises(ValueError, match="the shard shard-000003.tar in data.root=.* cannot be read: .*went away"):
        opened(f"file://{root}", tmp_path / "other", retry_s=0.1)


def test_a_shard_that_cannot_be_fetched_is_passed_over(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    source, remote_store = fetching(packed, tmp_path, retry_s=0.1)
    remote_store._fs = Flaky(remote_store.fs, lost="shard-000002.tar")
    batches = loaded(source, 0, epochs=(0,))
    seen = [i for step in batches for b in step for i in b["index"].tolist()]
    assert len(seen) == 110 and not any(source.index.shard(i) == 2 for i in seen)
    with pytest.raises(BadImage, match="the shard shard-000002.tar cannot be fetched: .*went away"):
        source[30]


def test_threads_that_want_a_shard_which_fails_wait_for_one_try(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    source, remote_store = fetching(packed, tmp_path, retry_s=0.3)
    remote_store._fs = Flaky(remote_store.fs, lost="shard-000002.tar")
    tries = []
    plain = remote_store._tried
    remote_store._tried = lambda *given, **more: tries.append(given[0]) or plain(*given, **more)
    refused = []

    def want():
        with pytest.raises(BadImage, match="the shard shard-000002.tar cannot be fetched"):
            source[30]
        refused.append(1)

    threads = [threading.Thread(target=want) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3 and tries == ["shard-000002.tar"]
    del remote_store._tried
    other = pickle.loads(pickle.dumps(remote_store))  # of another process: its own way there is sound, but it is told
    with pytest.raises(BadImage, match="the shard shard-000002.tar cannot be fetched: .*went away"):
        other.path("shard-000002.tar", source.index.sizes[2])
    later = opened(f"file://{packed}", tmp_path)  # a new start tries again
    assert later[30][1] == labels_of(source)[30]


@pytest.mark.parametrize("root", ["nonsense://x", "file:///nowhere/at/all"])
def test_places_that_are_not_there(root, tmp_path):
    with pytest.raises(ValueError, match="data.root="):
        opened(root, tmp_path)


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_packing_goes_on_where_it_was_stopped(source, tmp_path, monkeypatch, kind):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pack.pack(source, whole, KEEP, 25, workers=2, kind=kind)
    write, count = pack.write_file, []

    def stops(*args):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(1)
        return write(*args)

    monkeypatch.setattr(pack, "write_file", stops)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(source, broken, KEEP, 25, workers=1, kind=kind)
    assert not (broken / "index.bin").exists()
    (broken / f"shard-000001.{kind}").write_bytes(b"cut")
    monkeypatch.setattr(pack, "write_file", write)
    with pytest.raises(ValueError, match="was begun with another source or other options"):
        pack.pack(source, broken, KEEP, 24, workers=1, kind=kind)
    made = pack.pack(source, broken, KEEP, 25, workers=1, kind=kind)
    assert made == {"images": 110, "bad": 0, "shards": 5, "bytes": made["bytes"]}
    for path in whole.iterdir():
        assert path.read_bytes() == (broken / path.name).read_bytes()
    with pytest.raises(ValueError, match="is packed already"):
        pack.pack(source, whole, KEEP, 25, workers=1, kind=kind)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty, and nothing is overwritten"):
        pack.pack(source, tmp_path / "other", KEEP, 25, workers=1, kind=kind)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_what_is_written_is_verified(source, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(packing, "digest", lambda path: "other")
    with pytest.raises(ValueError, match="is not what was written, and was removed"):
        pack.pack(source, tmp_path / "out", KEEP, 60, workers=1, kind=kind)
    monkeypatch.undo()
    assert pack.pack(source, tmp_path / "out", KEEP, 60, workers=1, kind=kind)["shards"] == 2


def test_files_keep_their_bytes_or_are_made_smaller(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    rng = np.random.default_rng(0)
    for k in range(4):
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(root / f"{k}.jpg")
    (root / "bad.jpg").write_bytes(b"nothing")
    options = {k: OPTIONS[k] for k in ("in_chans", "exif_orientation", "max_pixels")}
    options |= {"val_fraction": 0.2, "follow_links": False, "cache_dir": str(tmp_path / "cache"), "splits": "auto"}
    source = make_source(image_folder, "train", root=str(root), **options)
    made = pack.pack(source, tmp_path / "kept", KEEP, 9, workers=1)
    assert made["images"] + made["bad"] == len(source)
    kept = undivided(opened(tmp_path / "kept", tmp_path, val_fraction=0.3))
    for i in range(len(kept)):
        number = int(kept.name(i).split("/")[1])
        assert kept.raw(i) == (root / source.name(number)).read_bytes()
    if made["bad"]:
        assert "bad.jpg" in (tmp_path / "kept" / "bad_files.csv").read_text()
    pack.pack(source, tmp_path / "small", pack.Form(60, 90), 9, workers=1)
    assert opened(tmp_path / "small", tmp_path, val_fraction=0.3)[0][0].shape == (3, 60, 80)


def test_a_place_that_cannot_be_read_is_not_packed_as_if_it_were_empty(tmp_path, capsys, monkeypatch):
    root = tmp_path / "photos"
    root.mkdir()
    for k in range(30):
        Image.new("RGB", (9, 9), (k, k, k)).save(root / f"{k}.png")
    command = [str(tmp_path / "out"), "data=folder", f"data.root={root}", f"data.cache_dir={tmp_path / 'cache'}"]
    command += ["--workers", "1", "--per-shard", "10"]
    plain = folder.read

    def stale(path, most):  # as of a mount whose server is gone
        raise OSError(116, "Stale file handle", path)

    monkeypatch.setattr(folder, "read", stale)
    assert pack.main(command) == 1
    text = capsys.readouterr().err
    assert "27 of 27 images cannot be used, more than data.max_bad_fraction=0.01" in text and "Stale file" in text
    monkeypatch.setattr(folder, "read", plain)
    assert pack.main(command) == 0 and "27 images in 3 shards" in capsys.readouterr().out


def test_what_cannot_be_packed_is_said(tmp_path, capsys):
    assert pack.main([str(tmp_path / "a"), "data=scientific", f"data.root={tmp_path}"]) == 1
    assert "data=scientific cannot be packed" in capsys.readouterr().err
    for option in (["--per-shard", "0"], ["--size", "-1"], ["--quality", "200"], ["--workers", "0"]):
        with pytest.raises(SystemExit):
            pack.main([str(tmp_path / "a"), "data=digits", *option])
        assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_is_full_is_one_sentence(source, tmp_path, monkeypatch, workers):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack, "write_file", full)
    with pytest.raises(ValueError, match=r"shard-000000\.tar cannot be written: No space left on device\.$"):
        pack.pack(source, tmp_path / "out", KEEP, 60, workers=workers)


def test_the_program(tmp_path, capsys):
    arguments = [str(tmp_path / "out"), "data=digits", "--per-shard", "600", "--workers", "1"]
    assert pack.main(arguments) == 0
    assert "1438 images in 3 shards" in capsys.readouterr().out
    assert len(opened(tmp_path / "out", tmp_path, "val")) == 359
    with tarfile.open(tmp_path / "out" / "val" / "shard-000000.tar") as archive:
        assert archive.getnames()[1].endswith(".cls")
    for bad in (arguments, [str(tmp_path / "b"), "data=folder"], [str(tmp_path / "b"), "data.rot=1"]):
        assert pack.main(bad) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and len(error) > 20
    assert json.loads((tmp_path / "out" / "val" / "index.bin").open("rb").readline())["counts"] == [359]
