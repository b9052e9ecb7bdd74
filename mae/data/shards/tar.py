"""Tar shards in the WebDataset layout: what lies in one, and where.

Samples are groups of files that share the name up to its first dot: `0001.jpg`, `0001.cls`. Nothing is ever
unpacked, so no name in an archive leads anywhere, and members other than an image and a label are not read.
The image of a sample is `KEY.jpg` (or another image suffix); more than one such file is refused by name.
"""

import logging
import tarfile
from array import array
from collections import defaultdict
from typing import IO, NamedTuple

import numpy as np

from mae.data.formats import SUFFIXES
from mae.data.paths import hidden
from mae.data.shards.layout import DEFAULT, Layout, Notes
from mae.errors import UserError

log = logging.getLogger(__name__)


MOST_CLASSES = 1_000_000
LABEL = "cls"  # suffix of the file that holds a sample's label


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
        raise UserError(f"{name} holds no whole number: labels in shards are numbers.") from error
    if not 0 <= number < MOST_CLASSES:
        raise UserError(f"{name} holds the label {number}: it must be from 0 to {MOST_CLASSES - 1}.")
    return number


class Sample:
    """The files of one sample that stand side by side."""

    def __init__(self, key: str, shard: str, layout: Layout):
        self.key, self.shard, self.layout = key, shard, layout
        self.images: dict[str, tuple[int, int]] = {}  # suffix -> offset, size
        self.labels: dict[str, int] = {}

    def fresh(self, suffix: str) -> str:
        """A suffix that the sample does not have yet. Raises UserError."""
        if suffix in self.images or suffix in self.labels:
            raise UserError(f"the shard {self.shard} holds {self.key}.{suffix} twice: pack it anew.")
        return suffix

    def image(self) -> str | None:
        """The suffix of the image; None where there is none. Raises UserError where there are several."""
        return self.layout.image(list(self.images), self.key, self.shard)

    def label(self) -> str | None:
        """The suffix of the label; None where there is none. Raises UserError for KEY.fine.cls without KEY.cls."""
        wanted = self.layout.label_key or LABEL
        if wanted not in self.labels and self.labels:
            suffix, other_reading = next(iter(self.labels)), self.layout.other_reading("the image")
            raise UserError(
                f"the sample {self.key} of the shard {self.shard} has the label {self.key}.{suffix} and no "
                f"{self.key}.{LABEL}: set data.label_key={suffix}{other_reading}."
            )
        return wanted if wanted in self.labels else None


class Scan:
    """The samples of one shard, as they are read."""

    def __init__(self, shard: str, layout: Layout):
        self.shard, self.layout = shard, layout
        self.rows = Collector()  # an offset of -1: a label whose image stands elsewhere
        self.hashes = array("q")  # of each row's key
        self.numbers: dict[str | None, int] = {None: 0}  # suffix -> its number
        self.suffixes = array("i")  # number of the suffix of each row's image
        self.notes = Notes()
        self.sample: Sample | None = None

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Takes a member in. Raises UserError for samples that can be read in several ways."""
        folder, _, base = member.name.rpartition("/")
        stem, suffix = self.layout.split(base)
        key = f"{folder}/{stem}" if folder else stem
        if self.sample is None or key != self.sample.key:
            self.flush()
            self.sample = Sample(key, self.shard, self.layout)
        if suffix == self.layout.image_key or suffix != self.layout.label_key and f".{suffix}".endswith(SUFFIXES):
            self.sample.images[self.sample.fresh(suffix)] = (member.offset_data, member.size)
        elif suffix == self.layout.label_key or self.layout.label_key is None and f".{suffix}".endswith(f".{LABEL}"):
            content = archive.extractfile(member)
            assert content is not None
            label = _number(content.read(32), f"{self.shard}/{member.name}")
            self.sample.labels[self.sample.fresh(suffix)] = label

    def flush(self) -> None:
        """Notes the sample that ends here."""
        if self.sample is None:
            return
        sample, self.sample = self.sample, None
        image, label = sample.image(), sample.label()
        self.notes.beside.update({*sample.images, *sample.labels} - {image, label})
        if image is None:
            self.notes.without_image += bool(sample.images)
        if image is not None or label is not None:
            self.hashes.append(hash(sample.key))
            self.suffixes.append(self.numbers.setdefault(image, len(self.numbers)))
            offset, size = (-1, 0) if image is None else sample.images[image]
            self.rows.add(sample.key, offset, size, -1 if label is None else sample.labels[label])

    def members(self) -> Members:
        """The images, each with the label of its sample. Raises UserError for a sample that has several images."""
        rows = self.rows.members()
        if len(np.unique(np.array(self.hashes, "i8"))) < len(rows.offsets):  # files of a sample stand apart
            self._gather(rows)
        images = rows.offsets >= 0
        self.notes.labels_alone += int((~images & (rows.labels >= 0)).sum())
        if self.layout.image_key is None:  # KEY.depth.png alone, where others have KEY.jpg beside it
            second = [n for suffix, n in self.numbers.items() if suffix in self.notes.beside]
            lost = images & np.isin(np.array(self.suffixes, "i4"), second)
            self.notes.without_image += int(lost.sum())
            images &= ~lost
        return rows if images.all() else selected(rows, images)

    def _gather(self, rows: Members) -> None:
        """Gives the images of a sample whose files stand apart its label, and looks for a second image."""
        same = defaultdict(list)
        for row in range(len(rows.offsets)):
            same[key_of(rows, row)].append(row)
        names = list(self.numbers)
        for key, numbers in same.items():
            images = {row: names[self.suffixes[row]] for row in numbers if rows.offsets[row] >= 0}
            suffixes = [suffix for suffix in dict.fromkeys(images.values()) if suffix is not None]
            image = self.layout.image(suffixes, key.decode(errors="backslashreplace"), self.shard)
            chosen = [row for row in numbers if images.get(row, "") == image]
            others = [row for row in numbers if row not in chosen]
            self.notes.beside.update(set(suffixes) - {image})
            labels = set(rows.labels[others].tolist()) - {-1}
            if chosen and len(labels) == 1 and rows.labels[chosen].max() < 0:
                rows.labels[chosen], rows.labels[others] = labels.pop(), -1
            rows.offsets[others] = -1


def key_of(rows: Members, row: int) -> bytes:
    """The name of a sample."""
    return rows.text[rows.ends[row - 1] if row else 0 : rows.ends[row]].tobytes()


def selected(rows: Members, chosen: np.ndarray) -> Members:
    """The rows that `chosen` is true of."""
    lengths = np.diff(rows.ends, prepend=0)
    text = rows.text[np.repeat(chosen, lengths)]
    ends = np.cumsum(lengths[chosen])
    return Members(rows.offsets[chosen], rows.sizes[chosen], rows.labels[chosen], text, ends)


def members(file: IO[bytes], name: str, layout: Layout = DEFAULT, notes: Notes | None = None) -> Members:
    """Reads the headers of a shard, from its start on and without seeking backwards; adds to `notes`.

    A shard that is cut short gives what is whole. Raises UserError for what is no tar at all, and for a sample
    that has several images.
    """
    scan = Scan(name, layout)
    try:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                if member.isreg() and not member.issparse() and not hidden(member.name):
                    scan.add(archive, member)
        scan.flush()
    except tarfile.TarError as error:  # the last image met may lack its end, and is not counted
        if not scan.rows.ends:
            raise UserError(f"the shard {name} is not a tar file of images ({error}).") from error
        log.warning("the shard %s is cut short (%s): %d images are left", name, error, len(scan.rows.ends))
    images = scan.members()
    if notes is not None:
        notes += scan.notes
    return images
