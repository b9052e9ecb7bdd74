"""Image files: decoding as Pillow does, listings, folders, bad files."""

import csv
import io
import multiprocessing
import os
import shutil
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from conftest import labels_of, make_eval_loader, make_loader, make_source, of_type, undivided
from PIL import Image

from mae.data import decode, jpeg, transforms
from mae.data.crops import cut
from mae.data.dataset import Bad, Loaded, Record
from mae.data.decode import Decoder, oriented
from mae.data.paths import given_root
from mae.data.source import BadImage, Source
from mae.data.sources import folder, listing
from mae.data.sources.folder import image_folder
from mae.data.sources.torchvision import cifar10
from mae.data.workers import naming_killed_workers

PHOTOS = Path(sklearn.datasets.__file__).parent / "images"  # china.jpg and flower.jpg
FOLDER = {
    "in_chans": 3,
    "val_fraction": 0.25,
    "exif_orientation": False,
    "max_pixels": 10**7,
    "splits": "auto",
    "follow_links": False,
}


def decoder(in_chans=3, exif=False, max_pixels=10**7):
    return Decoder(in_chans, exif, max_pixels)


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return bytearray(out.getvalue())


def pillow(data, mode="RGB"):
    pixels = np.array(Image.open(io.BytesIO(data)).convert(mode))
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)


def photo(size=None):
    image = Image.open(PHOTOS / "flower.jpg").convert("RGB")
    return image.resize(size) if size else image


@pytest.fixture
def tree(tmp_path):
    """Two classes of six images, and a hidden folder."""
    for name in ("cat", "dog"):
        (tmp_path / "set" / name / "deep").mkdir(parents=True)
        for k in range(6):
            place = tmp_path / "set" / name / ("deep" if k % 2 else "")
            photo((40 + k, 30)).save(place / f"{k}.jpg")
    (tmp_path / "set" / ".hidden").mkdir()
    (tmp_path / "set" / "cat" / "notes.txt").write_text("not an image")
    for path in [tmp_path / "set", *(tmp_path / "set").rglob("*")]:
        os.utime(path, (1e9, 1e9))  # not so new that the cache mistrusts it
    return tmp_path / "set"


def opened(root, split="train", **changes):
    return make_source(
        image_folder, split, root=str(root), cache_dir=str(Path(root).parent / "cache"), **(FOLDER | changes)
    )


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 0}, {"optimize": True}])
def test_jpegs_are_decoded_as_pillow_does(options):
    data = encoded(photo(), "JPEG", **options)
    assert jpeg.read_header(data) is not None
    assert torch.equal(decoder()(data), pillow(data))


@pytest.mark.parametrize("path", sorted(PHOTOS.glob("*.jpg")), ids=lambda p: p.name)
def test_real_photos_are_decoded_as_pillow_does(path):
    data = bytearray(path.read_bytes())
    assert torch.equal(decoder()(data), pillow(data))
    assert torch.equal(decoder(1)(data), pillow(data, "L"))
    assert torch.equal(decoder(4)(data), pillow(data, "RGBA"))


def some_box(height, width, chance):
    top, left = int(chance.integers(height)), int(chance.integers(width))
    return top, left, int(chance.integers(1, height - top + 1)), int(chance.integers(1, width - left + 1))


@pytest.mark.skipif(jpeg._library() is None, reason="nvImageCodec is not installed")
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("options", [{"subsampling": k} for k in range(3)] + [{"progressive": True}, {"restart": 2}])
def test_a_part_decoded_alone_is_what_the_whole_has_there(grey, options):
    chance = np.random.default_rng(0)
    keys = {"restart_marker_blocks" if key == "restart" else key: value for key, value in options.items()}
    for size in ((97, 75), (16, 16), (8, 200), (1, 1)):
        data = encoded(photo(size).convert("L" if grey else "RGB"), "JPEG", **keys)
        whole = jpeg.whole(data, grey)
        for _ in range(40):
            box = some_box(whole.shape[1], whole.shape[2], chance)
            part = jpeg.region(data, grey, box)
            assert part is not None and torch.equal(part, cut(whole, box))


@pytest.mark.skipif(jpeg._library() is None, reason="nvImageCodec is not installed")
def test_a_part_of_a_damaged_file_is_left_to_the_whole_or_has_its_size():
    chance = np.random.default_rng(0)
    sound = encoded(photo((80, 60)), "JPEG")
    files = [*map(bytearray, bad_files().values())] + [bytearray(p.read_bytes()) for p in PHOTOS.glob("*.jpg")]
    for _ in range(300):
        files.append(bytearray(sound))
        for place in chance.integers(2, len(sound) - 2, chance.integers(1, 4)).tolist():
            files[-1][place] = int(chance.integers(256))

    taken = 0
    for data in files:
        header = jpeg.read_header(data)
        if header is not None and header.height * header.width < 10**6 and header.components == 3:
            box = some_box(header.height, header.width, chance)
            part = jpeg.region(data, False, box)
            taken += part is not None
            assert part is None or part.shape == (3, *box[2:])
    assert 100 < taken < len(files)


@pytest.mark.parametrize("workers", [("thread", 2), ("process", 1)])
@pytest.mark.parametrize("exif", [False, True])
def test_batches_are_the_same_where_parts_cannot_be_decoded_alone(tree, workers, exif, monkeypatch):
    turned = Image.Exif()
    turned[decode.EXIF_ORIENTATION] = 6
    photo((64, 48)).save(tree / "cat" / "turned.jpg", exif=turned)
    transform = transforms.RandomResizedCrop(
        img_size=16, scale=[0.2, 1.0], ratio=[0.75, 1.33], min_crop=0.0, hflip=True
    )

    def images():
        source = opened(tree, exif_orientation=exif)
        options = {"num_workers": workers[1], "workers": workers[0], "repeats": 1, "max_bad_fraction": 0.0}
        options |= {"prefetch": 2, "timeout_s": 60.0, "fraction": 1.0, "per_class": None}
        loader = make_loader(source, transform, 4, 4, 0, **options)
        found = [batch["image"] for step in loader.steps(0) for batch in step]
        loader.close()
        return torch.cat(found)

    alone = images()
    monkeypatch.setattr(jpeg, "_library", lambda: None)
    assert torch.equal(alone, images()) and alone.unique().numel() > 50


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpegs_are_decoded_as_pillow_does(mode):
    data = encoded(photo().convert(mode), "JPEG")
    assert torch.equal(decoder()(data), pillow(data))
    assert torch.equal(decoder(1)(data), pillow(data, "L"))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"])
def test_other_kinds_go_through_pillow(kind):
    data = encoded(photo((50, 40)), kind)
    assert torch.equal(decoder()(data), pillow(data))


def test_palettes_and_sixteen_bits():
    data = encoded(photo((50, 40)).convert("P"), "PNG")
    assert torch.equal(decoder()(data), pillow(data))
    deep = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    image = decoder()(encoded(Image.fromarray(deep), "PNG"))
    assert image.shape == (3, 30, 40) and torch.equal(image[0], torch.from_numpy((deep >> 8).astype(np.uint8)))


def tiff(values, **options):
    tifffile = pytest.importorskip("tifffile")
    out = io.BytesIO()
    tifffile.imwrite(out, values, **options)
    return bytearray(out.getvalue())


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize(("kind", "says"), [
    ("float32", "its values are floating-point numbers, which have no fixed range to scale to 8 bits"),
    ("float64", "not a TIFF that Pillow reads"),
    ("float16", "not a TIFF that Pillow reads"),
    ("uint32", "its values are signed or 32-bit numbers, which have no fixed range"),
    ("int32", "its values are signed or 32-bit numbers"),
    ("int16", "its values are signed or 32-bit numbers"),
    ("int8", "its values are signed or 32-bit numbers"),
    ("uint64", "not a TIFF that Pillow reads"),
])  # fmt: skip
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_values_without_a_fixed_range_are_refused_by_name(kind, says, in_chans):
    for values in (RAMP.astype(kind), (RAMP * 100).astype(kind)):
        with pytest.raises(BadImage, match=f"{says}.*: use data=scientific, or convert the file$"):
            decoder(in_chans)(tiff(values))
    pfm = bytearray(b"Pf\n8 8\n-1.0\n" + RAMP.astype("<f4").tobytes())
    with pytest.raises(BadImage, match="its values are floating-point numbers"):
        decoder(in_chans)(pfm)


def test_values_of_a_fixed_range_are_scaled():
    deep = (RAMP * 65535).astype(np.uint16)
    wanted = torch.from_numpy((deep >> 8).astype(np.uint8))
    pgm = bytearray(b"P5 8 8 65535\n" + deep.astype(">u2").tobytes())
    big_endian = tiff(deep.astype(">u2"), byteorder=">")
    for data in (
        tiff(deep),
        big_endian,
        pgm,
        encoded(Image.fromarray(deep), "PNG"),
        encoded(Image.fromarray(deep), "TIFF"),
    ):
        assert torch.equal(decoder(1)(data)[0], wanted)
    values = np.arange(4096, dtype=np.uint16)[:: 4096 // 64]
    pixels = int("".join(f"{value:012b}" for value in values), 2).to_bytes(96, "big")
    tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 8, 279: 96}  # TIFF 6.0
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    packed = bytearray(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels)
    assert decoder(1)(packed)[0].flatten().tolist() == (values >> 4).tolist()


@pytest.mark.parametrize("kind", ["1", "L", "LA", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_other_modes_are_those_of_pillow(kind, in_chans):
    image = Image.fromarray((np.stack([RAMP, RAMP**2, 1 - RAMP], -1) * 255).astype(np.uint8)).convert(kind)
    if kind == "P":
        image.info["transparency"] = bytes(range(0, 256, 4))
    data = encoded(image, "TIFF" if kind == "CMYK" else "PNG")
    pixels = pillow(data, {1: "L", 3: "RGB", 4: "RGBA"}[in_chans])
    assert torch.equal(decoder(in_chans)(data), pixels) and pixels[0].unique().numel() > 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("block", [b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0MM"])
def test_a_damaged_exif_block_leaves_the_pixels(kind, block):
    data = encoded(photo((48, 32)), kind, exif=block)
    assert torch.equal(decoder(exif=True)(data), pillow(data))


def test_more_pixels_than_pillow_allows_by_itself(monkeypatch):
    data = encoded(photo((50, 40)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="50 x 40 is more than data.max_pixels=1999"):
        decoder(max_pixels=1999)(data)
    assert decoder(max_pixels=2000)(data).shape == (3, 40, 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decoder(max_pixels=2000)(data).shape == (3, 40, 50)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_an_option(orientation, kind):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[decode.EXIF_ORIENTATION] = orientation
    data = encoded(photo((48, 32)), kind, exif=exif)
    plain = Image.open(io.BytesIO(data))
    turned = torch.from_numpy(np.array(ImageOps.exif_transpose(plain))).permute(2, 0, 1)
    assert torch.equal(decoder(exif=True)(data), turned)
    assert torch.equal(decoder()(data), pillow(data))
    assert torch.equal(oriented(decoder()(data), orientation), turned)


def bad_files():
    """Name -> bytes of files that cannot be used."""
    jpg, png = encoded(photo(), "JPEG"), encoded(photo((60, 50)), "PNG")
    header = jpeg.read_header(jpg)
    assert header is not None
    size = header.height.to_bytes(2, "big") + header.width.to_bytes(2, "big")
    return {
        "empty.jpg": b"",
        "truncated.jpg": jpg[: len(jpg) // 2],
        "one_byte_short.png": png[: len(png) // 2],
        "head_only.jpg": jpg[:20],
        "text.jpg": b"<html>404 not found</html>",
        "zeros.png": bytes(1000),
        "noise.jpg": np.random.default_rng(0).bytes(5000),
        "cut_after_header.jpg": jpg[:700],
        "bomb.png": encoded(Image.new("1", (4000, 4000)), "PNG"),
        "bomb.jpg": encoded(Image.new("L", (4000, 4000)), "JPEG"),
        "lies_about_size.jpg": jpg.replace(size, b"\xff\xff\xff\xff", 1),
        "corrupt.png": png[:60] + bytes(200) + png[260:],
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_told_apart(name):
    with pytest.raises(BadImage) as error:
        decoder()(bytearray(bad_files()[name]))
    assert str(error.value) and "\n" not in str(error.value)


def test_channels_that_files_cannot_have():
    with pytest.raises(ValueError, match="data.in_chans=5"):
        decoder(5)


# ---------------------------------------------------------------- listing


def test_a_listing_is_sorted_labelled_and_cached(tree, monkeypatch):
    cache = str(tree.parent / "cache")
    first = listing.cached_scan(tree, ["cat", "dog"], False, cache)
    names = [first.name(i) for i in range(len(first))]
    assert names[:6] == [f"cat/{k}.jpg" for k in (0, 2, 4)] + [f"cat/deep/{k}.jpg" for k in (1, 3, 5)]
    assert first.labels.tolist() == [0] * 6 + [1] * 6
    assert not list(tree.rglob("*.bin"))

    monkeypatch.setattr(listing, "scan", None)  # not called again
    again = listing.cached_scan(tree, ["cat", "dog"], False, cache)
    assert [again.path(i) for i in range(12)] == [first.path(i) for i in range(12)]
    assert again.labels.tolist() == first.labels.tolist() and again.classes == ["cat", "dog"]


@pytest.mark.parametrize("change", ["add", "remove", "damage"])
def test_a_stale_or_damaged_cache_is_not_used(tree, change):
    cache = tree.parent / "cache"
    assert len(listing.cached_scan(tree, None, False, str(cache))) == 12
    if change == "add":
        photo((9, 9)).save(tree / "dog" / "deep" / "new.PNG")
    elif change == "remove":
        (tree / "dog" / "deep" / "1.jpg").unlink()
    else:
        (path,) = cache.glob("*.bin")
        path.write_bytes(path.read_bytes()[:-300])
    assert len(listing.cached_scan(tree, None, False, str(cache))) == {"add": 13, "remove": 11}.get(change, 12)


def test_a_cache_that_cannot_be_written_is_no_harm(tree, caplog):
    (tree.parent / "file").write_text("")
    assert len(listing.cached_scan(tree, None, False, str(tree.parent / "file"))) == 12
    assert "is not cached" in caplog.text


def test_links_do_not_lead_out_of_the_root(tree, caplog):
    outside = tree.parent / "outside"
    outside.mkdir()
    photo((9, 9)).save(outside / "secret.jpg")
    (tree / "cat" / "link").symlink_to(outside)
    (tree / "cat" / "link.jpg").symlink_to(outside / "secret.jpg")
    (tree / "cat" / "loop").symlink_to(tree)
    (tree / "cat" / "inside.jpg").symlink_to(tree / "dog" / "0.jpg")
    names = [listing.scan(tree, None, follow)[0] for follow in (False, True)]
    names = [[one.name(i) for i in range(len(one))] for one in names]
    assert len(names[0]) == 13 and "cat/inside.jpg" in names[0]
    assert "2 links lead out" in caplog.text
    assert len(names[1]) == 15


# ---------------------------------------------------------------- folders


def test_labelled_folder_is_split_by_class(tree):
    train, val = opened(tree), opened(tree, "val")
    assert train.classes == val.classes == ["cat", "dog"]
    assert np.bincount(labels_of(val)).tolist() == [2, 2] and np.bincount(labels_of(train)).tolist() == [4, 4]
    assert not {train.name(i) for i in range(8)} & {val.name(i) for i in range(4)}
    image, label = train[7]
    assert label == 1 and torch.equal(image, pillow((tree / train.name(7)).read_bytes()))


def test_train_and_val_folders_are_recognised(tree):
    for split in ("train", "val"):
        shutil.copytree(tree, tree.parent / "parted" / split)
    shutil.rmtree(tree.parent / "parted" / "val" / "cat")
    train, val = (opened(tree.parent / "parted", split) for split in ("train", "val"))
    assert len(train) == 12 and len(val) == 6 and labels_of(val).tolist() == [1] * 6
    (tree.parent / "parted" / "val" / "eel").mkdir()
    with pytest.raises(ValueError, match="has a class that the training images lack: eel"):
        opened(tree.parent / "parted", "val")


def test_flat_and_nested_folders_are_unlabelled(tree, caplog):
    photo((20, 20)).save(tree / "top.jpg")
    with caplog.at_level("INFO"):
        source = opened(tree)
    assert "images have no labels, since top.jpg lies beside the 2 folders. Move what lies there" in caplog.text
    assert source.classes == [] and source.labels is None and source[0][1] == -1
    assert len(source) + len(opened(tree, "val")) == 13


def test_faults_of_a_folder_are_named(tree, monkeypatch):
    with pytest.raises(ValueError, match="data.root=.*nowhere does not exist"):
        opened(tree / "nowhere")
    with pytest.raises(ValueError, match="data.root is not set"):
        given_root(None)
    with pytest.raises(ValueError, match="is a file, not a directory"):
        opened(tree / "cat" / "0.jpg")
    (tree / "empty").mkdir()
    with pytest.raises(ValueError, match="no image lies under"):
        opened(tree / "empty")
    photo((20, 20)).save(tree / "empty" / "one.jpg")
    with pytest.raises(ValueError, match="holds one image only"):
        opened(tree / "empty")
    with pytest.raises(ValueError, match="data.val_fraction"):
        opened(tree, val_fraction=0.0)
    with pytest.raises(ValueError, match="CIFAR-10 was not found in data.root"):
        cifar10("train", root=str(tree), in_chans=3, download=False)

    def refused(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ValueError, match="data.root.*cannot be read: Permission denied"):
        opened(tree)


# ---------------------------------------------------------------- bad files in a run


def load(source, tmp_path, workers=0, max_bad_fraction=0.01):
    transform = transforms.RandomResizedCrop(
        img_size=16, scale=[0.2, 1.0], ratio=[0.75, 1.33], min_crop=0.0, hflip=True
    )
    options = {"prefetch": 2, "timeout_s": 60.0, "workers": "process", "repeats": 1, "fraction": 1.0, "per_class": None}
    return make_loader(
        source,
        transform,
        8,
        8,
        0,
        bad_csv=tmp_path / "bad_files.csv",
        num_workers=workers,
        max_bad_fraction=max_bad_fraction,
        **options,
    )


@pytest.fixture
def spoilt(tmp_path):
    """Some good images and every kind of bad one."""
    root = tmp_path / "photos"
    root.mkdir()
    for k in range(30):
        photo((30, 30 + k)).save(root / f"good_{k:02}.jpg")
    for name, data in bad_files().items():
        (root / name).write_bytes(data)
    return root


def test_what_no_image_can_be_is_not_read(tmp_path, monkeypatch):
    root = tmp_path / "photos"
    root.mkdir()
    for k in range(4):
        photo((30, 30)).save(root / f"{k}.jpg")
    os.mkfifo(root / "5.jpg")
    with open(root / "6.jpg", "wb") as file:
        file.truncate(2 << 40)  # a hole of two terabytes
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    (root / "7.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    source = undivided(opened(root, val_fraction=0.01))
    said = {}
    for k in range(len(source)):
        try:
            source[k]
        except BadImage as error:
            said[source.name(k)] = str(error)
    assert said == {
        "5.jpg": "is not a regular file",
        "6.jpg": f"{2 << 40} bytes are more than an image of data.max_pixels takes",
        "7.jpg": "not an image of a known kind",
    }
    assert not (tmp_path / "started").exists()


def test_a_rank_judges_its_share_of_the_bad_files():
    def bad(record, seen, count):
        images = [Bad(k, f"{k}.jpg", "empty") for k in range(count)]
        record.receive(Loaded({"index": torch.arange(seen)}, images))

    for world, repeats in ((1, 1), (8, 1), (8, 4)):
        record = Record(8000, 0.01, None, world=world, repeats=repeats)
        bad(record, repeats * 1000 * 8 // world, 10 * 8 // world)  # a whole epoch of this rank, 1 % of it
        with pytest.raises(ValueError, match="cannot be used, more than data.max_bad_fraction=0.01"):
            bad(record, repeats, 1 + 10 * 8 // world)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_replaced_and_reported_once(spoilt, tmp_path, workers):
    source = opened(spoilt, val_fraction=0.03)
    (spoilt / "good_05.jpg").unlink()  # vanishes after the listing
    loader = load(source, tmp_path, workers, max_bad_fraction=0.5)
    for epoch in range(2):
        for batch in (b for step in loader.steps(epoch) for b in step):
            assert batch["image"].shape[1:] == (3, 16, 16)
            names = [source.name(int(i)) for i in batch["index"]]
            assert all(n.startswith("good_") and n != "good_05.jpg" for n in names)
    loader.close()
    with open(tmp_path / "bad_files.csv") as file:
        rows = list(csv.DictReader(file))
    expected = [source.name(i) for i in range(len(source))]
    expected = [n for n in expected if not n.startswith("good_") or n == "good_05.jpg"]
    assert sorted(r["name"] for r in rows) == sorted(expected)
    assert all(r["reason"] for r in rows)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_validation_sees_each_usable_image_once(spoilt, batch_size):
    source = undivided(opened(spoilt, val_fraction=0.03))
    seen = []
    for rank in range(2):
        whole = transforms.CenterCrop(img_size=16, crop_fraction=1.0)
        options = {"num_workers": 0, "prefetch": 2, "timeout_s": 60.0, "workers": "process", "repeats": 1}
        loader = make_eval_loader(source, whole, batch_size, batch_size, 0, rank, 2, max_bad_fraction=0.5, **options)
        assert sum(len(batch["index"]) for batch in loader) == len(loader.indices)  # with stand-ins
        for batch in loader.usable():
            assert len(batch["image"]) == len(batch["label"]) == len(batch["index"]) > 0
            seen += batch["index"].tolist()
        loader.close()
    names = [source.name(index) for index in seen]
    assert sorted(names) == [f"good_{k:02}.jpg" for k in range(30)]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_files_end_the_run(spoilt, tmp_path, workers):
    loader = load(opened(spoilt), tmp_path, workers)
    with pytest.raises(
        ValueError,
        match=r"data.max_bad_fraction=0.01 allows; the first: \S+ \(.*\)\. bad_files\.csv lists them\. Mend or remove",
    ):
        for step in loader.steps(0):
            list(step)
    loader.close()


def test_files_that_may_not_be_read_are_bad_files(spoilt, tmp_path, monkeypatch):
    plain = folder.read

    def refused(path, most):  # by the file system, whoever runs the tests
        if path.endswith("good_07.jpg"):
            raise PermissionError(13, "Permission denied", path)
        return plain(path, most)

    monkeypatch.setattr(folder, "read", refused)
    loader = load(opened(spoilt, val_fraction=0.03), tmp_path, 0, max_bad_fraction=0.5)
    for step in loader.steps(0):
        list(step)
    with open(tmp_path / "bad_files.csv") as file:
        reasons = {row["name"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons["good_07.jpg"] == "cannot be read: Permission denied"


def test_replacements_hang_on_the_seed_alone(spoilt, tmp_path):
    def indices(workers):
        loader = load(opened(spoilt), tmp_path, workers, max_bad_fraction=1.0)
        found = [b["index"].tolist() for step in loader.steps(0) for b in step]
        loader.close()
        return found

    assert indices(0) == indices(2)


class Troubled(Source):
    """A source whose images do something unpleasant."""

    classes = []

    def __init__(self, deed):
        self.deed = deed

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return self.deed(index)

    def name(self, index):
        return f"image {index}"


def die(index):
    os._exit(7)


def hang(index):
    import time

    time.sleep(30)


def unreadable(index):
    raise OSError("gone")


def troubled(deed, workers, timeout_s):
    return make_loader(
        Troubled(deed),
        transforms.CenterCrop(img_size=16, crop_fraction=1.0),
        8,
        8,
        0,
        num_workers=1,
        workers=workers,
        prefetch=1,
        timeout_s=timeout_s,
        repeats=1,
        fraction=1.0,
        per_class=None,
        max_bad_fraction=1.0,
    )


def grey(index):
    return torch.zeros(3, 16, 16, dtype=torch.uint8), -1


def test_a_worker_that_is_killed_while_a_step_computes_is_said_in_a_sentence():
    loader = troubled(grey, "process", 60.0)
    steps = loader.steps(0)
    list(next(steps))
    with (
        pytest.raises(ValueError, match="a data worker was killed.*data.num_workers") as error,
        naming_killed_workers(),
    ):
        os.kill(of_type(int, multiprocessing.active_children()[0].pid), signal.SIGKILL)
        for _ in range(300):  # the step
            time.sleep(0.1)
    assert "is killed by signal" in str(error.value.__cause__)  # where torch's words came, and not by the loader
    loader.close()


@pytest.mark.parametrize(
    ("workers", "deed", "says"),
    [
        ("process", die, "a data worker was killed.*data.num_workers"),
        ("process", hang, "no batch came within data.timeout_s=2 s.*data.root"),
        ("thread", hang, "no batch came within data.timeout_s=2 s.*data.root"),
        ("thread", unreadable, r"\d+ images in a row"),
        ("process", unreadable, r"\d+ images in a row cannot be used, the first of them image \d+: gone"),
    ],
)
def test_trouble_in_a_worker_is_said_in_a_sentence(workers, deed, says, tmp_path):
    loader = troubled(deed, workers, 2.0)
    with pytest.raises(ValueError, match=says) as error:
        for step in loader.steps(0):
            list(step)
    assert "\n" not in str(error.value)
    loader.close()
