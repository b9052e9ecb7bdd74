"""Tar shards in the WebDataset layout: what lies in one, and where.

Samples are groups of files that share the name up to its first dot: `0001.jpg`, `0001.cls`. Nothing is ever
unpacked, so no name in an archive leads anywhere, and members other than an image and `.cls` are not read.
"""

import logging
import tarfile
from array import array
from typing import BinaryIO, NamedTuple

import numpy as np

from mae.data.listing import SUFFIXES

log = logging.getLogger(__name__)


MOST_CLASSES = 1_000_000


class Members(NamedTuple):
    """The images of one shard, in the order in which they lie."""

    offsets: np.ndarray  # (n,) int64, bytes from the start of the shard
    sizes: np.ndarray  # (n,) int64
    labels: np.ndarray  # (n,) int32, -1 where there is none
    text: np.ndarray  # uint8, the keys one after another
    ends: np.ndarray  # (n,) int64, where each key ends


class Collector:
    """Gathers the members of a shard."""

    def __init__(self) -> None:
        self.offsets, self.sizes, self.labels, self.ends = array("q"), array("q"), array("i"), array("q")
        self.text = bytearray()

    def add(self, key: str, offset: int, size: int, label: int) -> None:
        self.text += key.encode(errors="surrogateescape")  # as tarfile decoded what is no UTF-8
        for column, value in zip(
            (self.offsets, self.sizes, self.labels, self.ends),
            (offset, size, label, len(self.text)),
            strict=True,
        ):
            column.append(value)

    def members(self) -> Members:
        return Members(
            np.array(self.offsets, "i8"),
            np.array(self.sizes, "i8"),
            np.array(self.labels, "i4"),
            np.array(self.text, "u1"),
            np.array(self.ends, "i8"),
        )


def joined(parts: list[Members]) -> Members:
    """The members of several shards, one after another."""
    starts = np.cumsum([0] + [len(p.text) for p in parts[:-1]])
    offsets, sizes, labels, text, _ = (np.concatenate(column) for column in zip(*parts, strict=True))
    ends = np.concatenate([p.ends + start for p, start in zip(parts, starts, strict=True)])
    return Members(offsets, sizes, labels, text, ends)


def _number(text: bytes, name: str) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise ValueError(f"{name} holds no whole number: labels in shards are numbers.") from error
    if not 0 <= number < MOST_CLASSES:
        raise ValueError(f"{name} holds the label {number}: it must be from 0 to {MOST_CLASSES - 1}.")
    return number


def members(file: BinaryIO, name: str) -> Members:
    """Reads the headers of a shard, from its start on and without seeking backwards.

    A shard that is cut short gives what is whole. Raises ValueError for what is no tar at all.
    """
    found = Collector()
    key, label = "", -1
    image: tuple[int, int] | None = None

    def flush() -> None:
        if image is not None:
            found.add(key, image[0], image[1], label)

    try:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                if not member.isreg() or member.issparse():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if (own := f"{folder}/{stem}" if folder else stem) != key:
                    flush()
                    key, image, label = own, None, -1
                suffix = f".{suffix.lower()}"
                if suffix.endswith(SUFFIXES) and image is None:
                    image = (member.offset_data, member.size)
                elif suffix == ".cls":
                    content = archive.extractfile(member)
                    assert content is not None
                    label = _number(content.read(32), f"{name}/{member.name}")
        flush()
    except tarfile.TarError as error:  # the last image met may lack its end, and is not counted
        if not found.ends:
            raise ValueError(f"the shard {name} is not a tar file of images ({error}).") from error
        log.warning("the shard %s is cut short (%s): %d images are left", name, error, len(found.ends))
    return found.members()
