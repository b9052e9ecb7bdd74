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
from mae.data.formats import SUFFIXES
from mae.data.paths import cache_folder, entries_of, inside, is_folder, listed_itself, status_of

log = logging.getLogger(__name__)

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
    Raises UserError for a folder that cannot be read.
    """
    paths, stamps, outside, broken, twice = Builder(), {}, 0, 0, 0
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
                paths.add(name, label)
                broken += link and not os.path.exists(entry.path)
        todo.extend(reversed(deeper))
    if outside:
        log.warning("%d links lead out of data.root=%s and were left out (data.follow_links)", outside, root)
    if twice:
        log.info("%d links in data.root=%s lead to folders whose images are taken at their own place", twice, root)
    if broken:
        log.warning("%d links in data.root=%s lead to no file: each is an image that cannot be used", broken, root)
    listing = paths.listing(str(root), classes or [])
    listing.outside = outside
    return listing, stamps


# ---------------------------------------------------------------- cache


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
