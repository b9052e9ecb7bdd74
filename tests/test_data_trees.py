"""Trees of any kind: hidden names, links, pipes, unreadable folders, tables and suffixes."""

import errno
import io
import os
import shutil
import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import labels_of, make_source, of_type, undivided
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mae.data import formats
from mae.data.paths import given_root, hidden
from mae.data.source import BadImage
from mae.data.sources.folder import Files, classes_of, image_folder
from mae.data.sources.robustness import robustness
from mae.data.sources.table import table
from mae.data.subsets import Subset
from mae.errors import UserError
from tests.test_data_splits import FOLDER, PIXELS, grown, images, names, opened

PNG = io.BytesIO()
PIXELS.save(PNG, "png")
FILES = {key: FOLDER[key] for key in ("in_chans", "exif_orientation", "max_pixels", "follow_links")}


# ---------------------------------------------------------------- any tree

SPLITS = (b"train", b"Train", b"TRAINING", b"val", b"Test", b"dev", b"train2017", b"val2017")
NAMES = (*SPLITS, b"cat", b"dog", b".git", b"__MACOSX", b"new\nline", b"\xff\xfe", b"caf\xc3\xa9", b"a b", b"x=[1,2]")
IMAGES = (b"a.png", b"B.PNG", b"._a.png", b"\xff.png", b"two\nlines.png")
TARGETS = (b".", b"..", b"../..", b"self", b"nowhere", b"cat", b"../cat", b"OUT", b"OUT/inner", b"OUT/secret.png", b"/")
FOLDERS = st.lists(st.sampled_from(NAMES), max_size=3)
THINGS = st.one_of(
    st.tuples(st.just("image"), FOLDERS, st.sampled_from(IMAGES), st.none()),
    st.tuples(st.just("image"), FOLDERS, st.sampled_from(IMAGES), st.none()),
    st.tuples(st.just("text"), FOLDERS, st.sampled_from((b"notes.txt", b".DS_Store", b"Thumbs.db")), st.none()),
    st.tuples(st.just("pipe"), FOLDERS, st.sampled_from((b"pipe.png", b"pipe")), st.none()),
    st.tuples(st.just("link"), FOLDERS, st.sampled_from((*NAMES, *IMAGES, b"self")), st.sampled_from(TARGETS)),
)


def planted(root: bytes, things) -> None:
    """The folders, files and links of a list, but for those whose place another of them has taken."""
    os.makedirs(root)
    os.makedirs(root + b"-out/inner")
    for place in (b"-out/secret.png", b"-out/inner/secret.png"):
        Path(os.fsdecode(root + place)).write_bytes(PNG.getvalue())
    for kind, folders, name, target in things:
        folder = os.path.join(root, *folders)
        try:
            if not os.path.realpath(folder).startswith(root + b"/") and folder != root:
                continue  # a link that was planted before leads elsewhere
            os.makedirs(folder, exist_ok=True)
            if kind == "pipe":
                os.mkfifo(os.path.join(folder, name))
            elif kind == "link":
                os.symlink(target.replace(b"OUT", root + b"-out"), os.path.join(folder, name))
            else:
                with open(os.path.join(folder, name), "xb") as file:
                    file.write(PNG.getvalue())
        except OSError:
            continue


@given(st.lists(THINGS, max_size=9), st.sampled_from(["auto", "auto", "off", "parts", ["train"], ["train", "val"]]))
@example([("link", [b"train"], b"self", b"self"), ("image", [b"cat"], b"a.png", None)], "auto")
@example([("link", [], b"train", b"OUT/inner"), ("image", [b"val"], b"a.png", None)], "auto")
@example([("image", [n], b"a.png", None) for n in (b"cat", b"dog", b"train", b"__MACOSX")] * 2, "auto")
@settings(max_examples=100)
def test_any_tree_is_listed_or_refused_in_a_sentence(things, choice):
    folder = os.path.realpath(tempfile.mkdtemp())
    root = os.path.join(folder, "set")
    try:
        planted(os.fsencode(root), things)
        seen = []
        for split in ("train", "val"):
            options = FOLDER | {"cache_dir": os.path.join(folder, "cache"), "splits": choice}
            try:
                if choice == "parts":
                    options = FILES | {"cache_dir": options["cache_dir"], "parts": ["train", "val"], "classes": None}
                    source = make_source(classes_of, split, root=root, **options)
                else:
                    source = make_source(image_folder, split, root=root, **options)
            except ValueError as error:
                said = str(error)
                assert type(error) is UserError and "data." in said and "\n" not in said and said.encode()
                assert "two ways" not in said or said.count("data.splits=") == 2
                continue
            holder = of_type(Files, source.source if isinstance(source, Subset) else source)
            for index in range(len(holder)):
                path = os.path.realpath(holder.listing.path(index))
                assert path.startswith(f"{root}/") and not hidden(holder.listing.path(index)[len(root) + 1 :])
                assert holder.name(index).encode()
                try:
                    assert holder.raw(index) == PNG.getvalue()
                except BadImage as error:
                    assert not os.path.isfile(path) and str(error)
            assert "".join(source.classes).encode() is not None
            seen.append({os.path.join(holder.listing.root, source.name(k)) for k in range(len(source))})
        if len(seen) == 2:
            assert choice == "parts" or not seen[0] & seen[1]  # where val/ is there alone, it is both
            if choice == "off" and not any(kind == "link" for kind, *_ in things):
                count = sum(
                    name.lower().endswith(".png") and not hidden(os.path.relpath(os.path.join(at, name), root))
                    for at, _, files in os.walk(root)
                    for name in files
                )
                assert len(seen[0] | seen[1]) == count
    finally:
        shutil.rmtree(folder)


# ---------------------------------------------------------------- hidden names


def test_what_archives_of_macos_leave_is_skipped(tmp_path):
    root = grown(tmp_path / "set", "cat", "dog", "__MACOSX/cat", ".Trash", "cat/@eaDir", "lost+found")
    for place in ("cat/._0.png", "dog/.DS_Store", "._preview.png", "Thumbs.db", ".hidden.png"):
        (root / place).write_bytes(b"\0\5\x16\7")
    source = opened(root)
    assert source.classes == ["cat", "dog"]
    assert names(source) | names(opened(root, "val")) == {f"{c}/{k}.png" for c in ("cat", "dog") for k in range(4)}
    options = FILES | {"cache_dir": str(tmp_path / "cache"), "parts": ["set", "set"], "classes": None}
    assert make_source(classes_of, "train", root=str(tmp_path), **options).classes == ["cat", "dog"]


# ---------------------------------------------------------------- links, pipes, folders that cannot be read


def test_links_that_lead_to_themselves_or_nowhere_do_not_refuse_the_rest(tmp_path, caplog):
    root = grown(tmp_path / "set", "cat", "dog")
    (root / "cat" / "self").symlink_to("self")
    (root / "cat" / "self.png").symlink_to("self.png")
    (root / "cat" / "a").symlink_to("b")
    (root / "cat" / "b").symlink_to("a")
    (root / "self").symlink_to("self")
    (root / "dog" / "gone.png").symlink_to("nowhere.png")
    (root / "dog" / "up").symlink_to("..")
    source = undivided(opened(root, val_fraction=0.1))
    assert source.classes == ["cat", "dog"] and len(source) == 10
    assert "2 links in data.root=" in caplog.text and "lead to no file" in caplog.text
    bad = [k for k in range(10) if source.name(k) in ("cat/self.png", "dog/gone.png")]
    for index in bad:
        with pytest.raises(BadImage, match="cannot be read"):
            source[index]
    assert len(bad) == 2


def test_a_link_to_the_folder_of_another_class_does_not_take_its_images(tmp_path):
    root = grown(tmp_path / "set", "cat", "dog", ".store/eel")
    (root / "cat" / "more").symlink_to("../dog")
    (root / "eel").symlink_to(".store/eel")
    source = undivided(opened(root, val_fraction=0.1))
    assert source.classes == ["cat", "dog", "eel"] and np.bincount(labels_of(source)).tolist() == [4, 4, 4]
    assert {source.name(k) for k in range(12)} == {f"{c}/{k}.png" for c in ("cat", "dog", "eel") for k in range(4)}


def test_corruptions_are_not_looked_for_in_what_macos_leaves(tmp_path):
    images(tmp_path / "set" / "imagenet-c" / "snow" / "1" / "n01440764")
    for severity in "2345":
        images(tmp_path / "set" / "imagenet-c" / "snow" / severity / "n01440764", 1)
    (tmp_path / "set" / "__MACOSX" / "snow" / "1").mkdir(parents=True)
    options = FILES | {"cache_dir": str(tmp_path / "cache"), "variant": "c"}
    assert len(make_source(robustness, "val", root=str(tmp_path / "set"), **options)) == 8


def test_the_cache_of_the_hub_is_taken_with_follow_links(tmp_path):
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)
    root = tmp_path / "hub" / "snapshots" / "0a1b"
    for number, place in enumerate(f"{s}/{c}/{k}.png" for s in ("train", "test") for c in "xy" for k in range(3)):
        (blobs / f"{number:064x}").write_bytes(PNG.getvalue())
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).symlink_to(f"../../../../blobs/{number:064x}")
    with pytest.raises(ValueError, match=r"no image lies under .*6 links lead out of it: data.follow_links=true"):
        opened(root)
    train, val = (opened(root, split, follow_links=True) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (6, 6, ["x", "y"]) and train[0][0].shape == (3, 8, 8)


def test_splits_that_are_links_out_of_the_root_need_follow_links(tmp_path):
    root = grown(tmp_path / "set", "val/x", "val/y")
    grown(tmp_path / "elsewhere", "x", "y")
    (root / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="folder train is a link that leads out of it. Type data.follow_links=true"):
        opened(root)
    assert len(opened(root, follow_links=True)) == 8
    options = FILES | {"cache_dir": str(tmp_path / "cache"), "parts": ["train", "val"], "classes": None}
    with pytest.raises(ValueError, match="folder train is a link that leads out of it. Type data.follow_links=true"):
        make_source(classes_of, "train", root=str(root), **options)
    assert len(make_source(classes_of, "train", root=str(root), **(options | {"follow_links": True}))) == 8
    images(tmp_path / "sketches" / "n01440764")
    (root / "sketch").symlink_to(tmp_path / "sketches")
    options = FILES | {"cache_dir": str(tmp_path / "cache"), "variant": "sketch"}
    with pytest.raises(ValueError, match="folder sketch is a link that leads out of it. Type data.follow_links=true"):
        make_source(robustness, "val", root=str(root), **options)
    assert len(make_source(robustness, "val", root=str(root), **(options | {"follow_links": True}))) == 4


def test_pipes_and_sockets_are_bad_files_and_no_folders(tmp_path):
    root = grown(tmp_path / "set", "cat", "dog")
    os.mkfifo(root / "pipe")
    os.mkfifo(root / "cat" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "cat" / "socket.png"))
        source = undivided(opened(root, val_fraction=0.1))
        for place in ("cat/pipe.png", "cat/socket.png"):
            with pytest.raises(BadImage):
                source[next(k for k in range(len(source)) if source.name(k) == place)]
    with pytest.raises(ValueError, match="data.root=.*pipe is a file, not a directory"):
        given_root(str(root / "pipe"))
    with pytest.raises(ValueError, match="data.file=.*pipe is not a regular file"):
        make_source(table, "train", root=str(root), file=str(root / "pipe"), val_fraction=0.1, cache_dir=None, **FILES)
    options = FILES | {"cache_dir": None, "parts": ["set", "set"], "classes": str(root / "pipe")}
    with pytest.raises(ValueError, match="data.classes=.*pipe is not a regular file"):
        make_source(classes_of, "train", root=str(tmp_path), **options)


@pytest.mark.parametrize("refused", ["", "cat", "cat/deep", "train"])
def test_folders_that_cannot_be_read_are_named(tmp_path, refused, monkeypatch):
    root = grown(tmp_path / "set", "cat/deep", "dog", "bus", "train")
    plain = os.scandir

    def scandir(path):
        if os.path.relpath(path, root) == (refused or "."):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root, who may run the tests, can read all
    with pytest.raises(ValueError, match=f"data.root.*{refused} cannot be read: Permission denied"):
        opened(root, splits="auto" if refused == "train" else "off")


def test_roots_that_cannot_be_looked_at_are_said_in_a_sentence(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    for place, says in (
        (tmp_path / "loop", "leads to nothing"),
        (tmp_path / "gone", "leads to nothing"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        ("~nobody-of-this-name/set", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=rf"^data\.root=.*{says}"):
            given_root(str(place))


def test_names_that_are_no_text_can_be_printed(tmp_path):
    for name in (b"\xff", b"caf\xc3\xa9"):
        folder = os.fsencode(tmp_path) + b"/set/" + name
        os.makedirs(folder)
        for k in range(4):
            with open(folder + b"/%d\xfe.png" % k, "wb") as file:
                file.write(PNG.getvalue())
    source = opened(tmp_path / "set")
    assert source.classes == ["caf\xe9", "\\xff"] and source[0][1] == 0
    assert source.name(0) == "caf\xe9/0\\xfe.png"


# ---------------------------------------------------------------- tables


def listed(root, text, split="train", name="list.csv", **changes):
    file = root.parent / name
    file.write_text(text, encoding="utf-8")
    options = FILES | {"val_fraction": 0.25, "cache_dir": str(root.parent / "cache")} | changes
    return make_source(table, split, root=str(root), file=str(file), **options)


ROWS = [("cat/0.png", "a"), ("cat/1.png", "b"), ("dog/0.png", "a"), ("dog/1.png", "b")]


@pytest.mark.parametrize(
    "header", ["path, label", "\ufeffpath,label", '"path", "label"', "Path,LABEL", " path ,label "]
)
def test_headers_are_matched_but_for_blanks_and_capitals(tmp_path, header):
    root = grown(tmp_path / "set", "cat", "dog")
    apart = ", " if ", " in header else ","
    source = undivided(listed(root, "\n".join([header, *(apart.join(row) for row in ROWS)])))
    assert source.classes == ["a", "b"] and labels_of(source).tolist() == [0, 1, 0, 1]
    assert [source.name(k) for k in range(4)] == [row[0] for row in ROWS]


def test_columns_that_nearly_match_are_named(tmp_path, caplog):
    root = grown(tmp_path / "set", "cat", "dog")
    assert listed(root, "path,labels\ncat/0.png,a\ndog/0.png,b\n").classes == []
    assert "the column labels is not read: rename it where it is the label" in caplog.text
    with pytest.raises(ValueError, match="has no column path, only 'file_name', 'label'. Is file_name the one"):
        listed(root, "file_name,label\ncat/0.png,a\n")
    with pytest.raises(ValueError, match="Its columns are parted by ';': save it with commas"):
        listed(root, "path;label\ncat/0.png;a\n")
    with pytest.raises(ValueError, match="has 2 columns label"):
        listed(root, "path,Label,LABEL\ncat/0.png,a,b\n")
    with pytest.raises(ValueError, match="has 3 values in line 3 for 2 columns: put a value that holds"):
        listed(root, "path,label\ncat/0.png,a\ncat/1,0.png,a\n")


def test_splits_of_a_table_are_words_in_any_case(tmp_path):
    root = grown(tmp_path / "set", "cat", "dog")
    text = "path,split\ncat/0.png,Train\ncat/1.png,training\ndog/0.png,Validation\ndog/1.png,TEST\n"
    assert names(listed(root, text)) == {"cat/0.png", "cat/1.png"}
    assert names(listed(root, text, "val")) == {"dog/0.png", "dog/1.png"}


def test_absolute_paths_inside_the_root_are_taken(tmp_path):
    root = grown(tmp_path / "set", "cat", "dog")
    (tmp_path / "link").symlink_to("set")
    (tmp_path / "other").symlink_to("set/cat")
    (root / "in").symlink_to("cat")
    spelt = [
        root / "cat" / "0.png",
        tmp_path / "link" / "cat" / "1.png",
        tmp_path / "other" / "2.png",
        "dog/../cat/3.png",
    ]
    text = "\n".join(["path", *map(str, spelt), str(root / "in" / "0.png")])
    for top in (root, tmp_path / "link"):
        source = undivided(listed(top, text))
        assert [source.name(k) for k in range(5)] == [*(f"cat/{k}.png" for k in range(4)), "in/0.png"]
        assert all(source.raw(k) for k in range(5))
    images(tmp_path / "elsewhere")
    (root / "out").symlink_to("../elsewhere")
    for place in (tmp_path / "elsewhere" / "0.png", root / "out" / "0.png", "cat/../../elsewhere/0.png", root, "/"):
        with pytest.raises(ValueError, match="which leads out of data.root"):
            listed(root, f"path\n{place}\n")


# ---------------------------------------------------------------- kinds of images


def test_all_that_is_decoded_is_listed_and_nothing_else(tmp_path):
    assert formats.SUFFIXES[: len(formats.COMMON)] == formats.COMMON and formats.COMMON[0] == ".jpg"
    for suffix in (".jp2", ".ico", ".tga", ".pcx", ".avif"):
        assert (suffix in formats.SUFFIXES) == (Image.registered_extensions()[suffix] in formats.KINDS)
    assert not {".pdf", ".eps", ".ps", ".mpg", ".h5", ".hdf", ".grib", ".wmf"} & {*formats.SUFFIXES}
    images(tmp_path / "set", 1)
    PIXELS.save(tmp_path / "doc.pdf")
    (tmp_path / "doc.pdf").rename(tmp_path / "set" / "doc.pdf")
    written = {"0.png"}
    for suffix in formats.SUFFIXES:
        kind = Image.registered_extensions()[suffix]
        if kind in Image.SAVE:
            PIXELS.save(tmp_path / "set" / f"x{suffix}", kind)
            written.add(f"x{suffix}")
    source = undivided(opened(tmp_path / "set", val_fraction=0.1))
    assert names(source) == written and len(written) > 25
    for index in range(len(source)):
        assert source[index][0].shape == (3, 8, 8), source.name(index)
