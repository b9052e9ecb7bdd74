"""The paths of a tree of images, in flat buffers and cached.

Ten million paths as Python strings are a gigabyte that every worker copies by counting references; here
they are three arrays, read from the cache file at once and shared by all workers that are forked.
"""

import hashlib
import json
import logging
import os
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mae.data import flat
from mae.data.sources.formats import SUFFIXES

log = logging.getLogger(__name__)

# Folders and files that programs and file systems leave for themselves
NOTES = ("__MACOSX", "__meta__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db")
MAGIC = "mae-listing-3"
RACY = 2.0  # seconds: a folder changed this shortly before the scan could change again within its time stamp


class Listing:
    """Paths relative to `root`, with labels from the first folder of each (-1: none), or a table's.

    `held` (N,) is 1 for the rows that a table holds out, or None."""

    outside = 0  # links that a scan has left out, as they lead out of the root

    def __init__(
        self,
        root: str,
        text: np.ndarray,
        ends: np.ndarray,
        labels: np.ndarray,
        classes: list[str],
        held: np.ndarray | None = None,
    ):
        self.root, self.text, self.ends, self.labels, self.classes = root, text, ends, labels, classes
        self.held = held

    def __len__(self) -> int:
        return len(self.ends) - 1

    def name(self, index: int) -> str:
        """Path of an image relative to the root, as it can be printed."""
        return self._bytes(index).decode(errors="backslashreplace")

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._bytes(index)))

    def _bytes(self, index: int) -> bytes:
        return self.text[self.ends[index] : self.ends[index + 1]].tobytes()


class Builder:
    """Paths gathered one by one without a Python object for each."""

    def __init__(self) -> None:
        self.text, self.ends, self.labels = bytearray(), array("q", [0]), array("i")

    def add(self, path: str, label: int) -> None:
        self.text += os.fsencode(path)
        self.ends.append(len(self.text))
        self.labels.append(label)

    def listing(self, root: str, classes: list[str]) -> Listing:
        text, labels = np.array(self.text, "u1"), np.array(self.labels, "i4")
        return Listing(root, text, np.array(self.ends, "i8"), labels, classes)


def scan(
    root: Path, classes: list[str] | None, follow_links: bool, suffixes: tuple[str, ...] = SUFFIXES
) -> tuple[Listing, dict[str, int]]:
    """All images under `root`, folder by folder in sorted order, and the time stamp of each folder.

    classes: names of the first-level folders that are labels, or None for no labels. Links that lead out of
    `root` are passed over unless `follow_links`, and those that lead to folders that are listed themselves.
    Raises ValueError for a folder that cannot be read.
    """
    found, stamps, outside, broken, twice = Builder(), {}, 0, 0, 0
    real_root, seen = os.path.realpath(root), set()
    number = {name: k for k, name in enumerate(classes or [])}
    todo = [""]
    while todo:
        folder = todo.pop()
        label = number.get(folder.split("/", 1)[0], -1)
        path = os.path.join(root, folder)
        status = status_of(path)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a parent
            continue
        seen.add((status.st_dev, status.st_ino))
        stamps[folder] = status.st_mtime_ns
        deeper = []
        for entry in entries_of(path):
            link = entry.is_symlink()
            if link and not follow_links and not inside(real_root, entry.path):
                outside += 1
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if is_folder(entry):
                if link and listed_itself(real_root, entry.path):
                    twice += 1
                else:
                    deeper.append(name)
            elif entry.name.lower().endswith(suffixes):
                found.add(name, label)
                broken += link and not os.path.exists(entry.path)
        todo.extend(reversed(deeper))
    if outside:
        log.warning("%d links lead out of data.root=%s and were left out (data.follow_links)", outside, root)
    if twice:
        log.info("%d links in data.root=%s lead to folders whose images are taken at their own place", twice, root)
    if broken:
        log.warning("%d links in data.root=%s lead to no file: each is an image that cannot be used", broken, root)
    listing = found.listing(str(root), classes or [])
    listing.outside = outside
    return listing, stamps


def hidden(path: str) -> bool:
    """Whether a part of a relative path is hidden, or is what macOS (`._NAME`, `__MACOSX`), webdataset (`__meta__`) and
    others leave among the data. Such files are no images, shards or labels."""
    return any(name in NOTES or name[:1] == "." and name not in (".", "..") for name in path.split("/"))


def printable(name: str) -> str:
    """A name in one line of text, whatever bytes it is of."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or leads to one; a link that leads to itself or to nothing is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def status_of(path: str | Path) -> os.stat_result:
    """What a folder is. Raises ValueError where that cannot be read."""
    try:
        return os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: str | Path, error: OSError) -> ValueError:
    return ValueError(f"data.root: the folder {printable(str(path))} cannot be read: {error.strerror}.")


def entries_of(path: str | Path) -> list[os.DirEntry]:
    """What a folder holds, sorted, without what is hidden. Raises ValueError where it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return sorted((entry for entry in entries if not hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise unreadable(path, error) from error


def folders_and_files(path: str | Path, suffixes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The names of a folder's sub-folders and of its files of `suffixes`."""
    folders, files = [], []
    for entry in entries_of(path):
        if is_folder(entry):
            folders.append(entry.name)
        elif entry.name.lower().endswith(suffixes):
            files.append(entry.name)
    return folders, files


def holds(path: str | Path, suffixes: tuple[str, ...], real_root: str, follow_links: bool) -> bool:
    """Whether a file of `suffixes` lies under a folder, at any depth; links are followed as `scan` does."""
    todo, seen = [str(path)], set()
    while todo:
        folder = todo.pop()
        status = status_of(folder)
        if (status.st_dev, status.st_ino) in seen or not follow_links and not inside(real_root, folder):
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files = folders_and_files(folder, suffixes)
        if files:
            return True
        todo.extend(os.path.join(folder, name) for name in folders)
    return False


def inside(real_root: str, path: str) -> bool:
    """Whether what `path` leads to is `real_root` or lies under it."""
    return os.path.commonpath([real_root, os.path.realpath(path)]) == real_root


def listed_itself(real_root: str, link: str) -> bool:
    """Whether the folder that a link leads to is listed by its own name too, which is that of its images' class."""
    return inside(real_root, link) and not hidden(os.path.relpath(os.path.realpath(link), real_root))


# ---------------------------------------------------------------- cache


def cache_folder(cache_dir: str | None) -> Path:
    """`data.cache_dir`, or the user's own cache folder (never inside a data set)."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae"


def cached_scan(
    root: Path,
    classes: list[str] | None,
    follow_links: bool,
    cache_dir: str | None,
    suffixes: tuple[str, ...] = SUFFIXES,
) -> Listing:
    """`scan`, from the cache where no folder of the tree has changed since."""
    wanted = json.dumps([MAGIC, os.path.realpath(root), classes, follow_links, suffixes])
    return cached(root, wanted, cache_dir, lambda: scan(root, classes, follow_links, suffixes))


def cached(
    root: Path, wanted: str, cache_dir: str | None, make: Callable[[], tuple[Listing, dict[str, int]]]
) -> Listing:
    """What was made of `wanted` before, where no folder has changed since; or a listing and its folders' time stamps
    made now, and kept unless one of them could still change within its stamp."""
    path = cache_folder(cache_dir) / f"listing-{hashlib.sha256(wanted.encode()).hexdigest()[:20]}.bin"
    known = load(path, str(root), wanted)
    if known is not None:
        return known
    started = time.time()
    listing, stamps = make()
    if len(listing) and max(stamps.values()) / 1e9 < started - RACY:
        try:
            save(path, listing, stamps, wanted)
        except OSError as error:
            log.warning("the listing of %s is not cached: %s (data.cache_dir)", root, error)
    return listing


def save(path: Path, listing: Listing, stamps: dict[str, int], wanted: str) -> None:
    """Keeps a listing, with what it was asked for and the time stamps of its folders."""
    arrays = {"text": listing.text, "ends": listing.ends, "labels": listing.labels}
    arrays |= {} if listing.held is None else {"held": listing.held}
    flat.write(path, {"wanted": wanted, "classes": listing.classes, "stamps": stamps}, arrays)


def load(path: Path, root: str, wanted: str) -> Listing | None:
    """The cached listing, or None where there is none or a folder has changed since."""
    try:
        head, _ = flat.read_head(path)
        if head["wanted"] != wanted:
            return None
        for folder, stamp in head["stamps"].items():
            if os.stat(os.path.join(root, folder)).st_mtime_ns != stamp:
                return None
        head, arrays = flat.read(path)
        return Listing(root, arrays["text"], arrays["ends"], arrays["labels"], head["classes"], arrays.get("held"))
    except (OSError, ValueError, KeyError):  # absent, damaged or of another version: scanned anew
        return None
