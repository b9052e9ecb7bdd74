"""Tar shards as a source: images found by an index, read by position, in an order that goes shard by shard.

With the index the source is as any other: workers, ranks and resuming are the sampler's concern. What is
its own is the order of an epoch. The shards are shuffled and laid end to end, and the line is cut into
`lanes` equal parts. Position p of the epoch belongs to lane p % lanes, so that a rank that takes every
world-th position stays on its own lanes and the shards they cross; within a lane, images are shuffled over
`window` shards. Each image stands once in the order, whatever the number of ranks.
"""

import hashlib
import io
import json
import logging
import os
import threading
from collections import OrderedDict
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from mae.data import flat
from mae.data.decode import Decoder
from mae.data.formats import SUFFIXES
from mae.data.paths import cache_folder
from mae.data.sampler import laned
from mae.data.settings import Choice, Count, Split, StoreSettings
from mae.data.shards.splits import INDEX, opened
from mae.data.shards.tar import DEFAULT, Layout, Members, Notes, joined, members
from mae.data.source import BadImage, Encoded, Source
from mae.data.store import Local, Remote
from mae.data.subsets import held_out
from mae.errors import UserError

log = logging.getLogger(__name__)

FORMAT = "mae-shards-1"
READING = "mae-shards-2"  # how files form samples: an index kept of another reading is not used
OPEN_FILES = 64  # shards a process keeps open


class Index:
    """Which images lie in which shard, and where."""

    def __init__(self, names: list[str], sizes: list[int], counts: list[int], found: Members, classes: list[str]):
        self.names, self.sizes, self.members, self.classes = names, sizes, found, classes
        self.counts = np.asarray(counts, np.int64)  # images in each shard
        self.starts = np.cumsum(self.counts) - self.counts  # number of each shard's first image
        self.notes: list[str] = []  # what of the shards is not used, a sentence each

    def shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def key(self, index: int) -> str:
        start = self.members.ends[index - 1] if index else 0
        return self.members.text[start : self.members.ends[index]].tobytes().decode(errors="backslashreplace")

    def save(self, path: Path, **more: Any) -> None:
        shards = {"names": self.names, "sizes": self.sizes, "counts": self.counts.tolist()}
        flat.write(path, {"format": FORMAT, "classes": self.classes} | shards | more, self.members._asdict())

    @staticmethod
    def load(source: Path | bytes) -> "Index":
        """Of a file or its bytes. Raises OSError, or ValueError where it is damaged."""
        try:
            head, arrays = flat.parse(source) if isinstance(source, bytes) else flat.read(source)
            if head.get("format") != FORMAT:
                raise ValueError("it is not an index of shards")
            index = Index(head["names"], head["sizes"], head["counts"], Members(**arrays), head["classes"])
            index.notes = [str(sentence) for sentence in head.get("notes", [])]
            index._check()
        except (AttributeError, KeyError, OverflowError, TypeError) as error:  # JSON of another shape
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return index

    def _check(self) -> None:
        """Raises UserError where the parts do not belong together, TypeError for a name that is no text."""
        found = self.members
        images = {len(column) for column in (found.offsets, found.sizes, found.labels, found.ends)}
        shards = {len(self.names), len(self.sizes), len(self.counts)}
        if images != {int(self.counts.sum())} or len(shards) > 1 or self.counts.min(initial=0) < 0:
            raise ValueError("its parts do not belong together")
        if self.classes and len(found.labels) and int(found.labels.max()) >= len(self.classes):
            raise ValueError(f"it holds the label {int(found.labels.max())} of {len(self.classes)} classes")
        if any(os.path.basename(name) in ("", ".") for name in self.names):
            raise ValueError("a shard has no name")


class OpenFiles(threading.local):
    """Each thread's own, so that none closes what another reads."""

    def __init__(self) -> None:
        self.files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, the latest used last

    def __del__(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)


class Shards(Encoded):
    """The images of an index, read from a store."""

    def __init__(self, index: Index, store: Local | Remote, decoder: Decoder, lanes: int, window: int):
        self.index, self.store, self.decoder, self.lanes, self.window = index, store, decoder, lanes, window
        self.classes = index.classes
        self.labels = np.asarray(index.members.labels, np.int64) if index.classes else None
        self._open = OpenFiles()
        self._places: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": OpenFiles()}

    def __len__(self) -> int:
        return len(self.index.members.offsets)

    def name(self, index: int) -> str:
        return f"{self.index.names[self.index.shard(index)]}/{self.index.key(index)}"

    def raw(self, index: int) -> bytearray:
        """An image's file. Raises BadImage."""
        size, offset = int(self.index.members.sizes[index]), int(self.index.members.offsets[index])
        if size > self.decoder.most_bytes:
            raise BadImage(f"{size} bytes are more than an image of data.max_pixels takes")
        try:
            data = bytearray(os.pread(self._file(self.index.shard(index)), size, offset))
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error
        if len(data) != size:
            raise BadImage("its shard is cut short")
        return data

    def _file(self, shard: int) -> int:
        descriptors = self._open.files
        if shard not in descriptors:
            where = self.index.names[shard], self.index.sizes[shard]
            try:
                descriptors[shard] = os.open(self.store.path(*where), os.O_RDONLY)
            except FileNotFoundError:  # just then another process made room in the cache
                descriptors[shard] = os.open(self.store.path(*where), os.O_RDONLY)
            if len(descriptors) > OPEN_FILES:
                os.close(descriptors.popitem(last=False)[1])
        descriptors.move_to_end(shard)
        return descriptors[shard]

    def order(self, seed: int, epoch: int, mask: np.ndarray | None = None) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        shards = rng.permutation(len(self.index.names))
        counts = self.index.counts[shards]
        line = np.repeat(self.index.starts[shards] - np.cumsum(counts) + counts, counts) + np.arange(len(self))
        if mask is not None:
            line, counts = line[mask[line]], counts * mask.mean()
        return laned(line, self.lanes, max(1, int(self.window * counts.mean())), rng)

    def prefetch(self, seed: int, epoch: int, indices: np.ndarray) -> None:
        """Lets the store fetch the shards that follow the window of these images."""
        if isinstance(self.store, Local):
            return
        if self._places is None or self._places[0] != (seed, epoch):
            shards = np.random.default_rng([seed, epoch]).permutation(len(self.index.names))
            self._places = (seed, epoch), shards, np.argsort(shards)
        _, shards, places = self._places
        for place in np.unique(places[[self.index.shard(int(i)) for i in indices]]) + self.window:
            if place < len(shards):
                self.store.ahead(self.index.names[shards[place]], self.index.sizes[shards[place]])


def tar_shards(
    split: Split,
    *,
    store: StoreSettings,
    splits: Choice,
    val_fraction: Annotated[float, "[0, 1]"],
    layout: Layout,
    lanes: Count,
    window: Count,
    decoder: Decoder,
) -> Source:
    """Tar shards under `root`, a folder or a URL of fsspec (s3://, gs://, https://).

    `root/train` and `root/val`, or shards called `train-*` and `val-*`, are the splits where they are there (see
    `mae.data.shards.splits`), else `val_fraction` of the images is held out. Shards without an index are read through
    once, and the index is kept in the cache folder. `image_key` and `label_key` are the suffixes of a sample's files
    (null: its image and `cls`), and `sample_key` says at which dot its name ends. Raises UserError where there is no
    shard, or no image in it, a sample has several images, or the root cannot be reached.
    """
    shards = opened(store, split, splits)
    index = indexed(shards.store, cache_folder(store.cache_dir), layout.plain(), shards.names)
    source = Shards(index, shards.store, decoder, lanes, window)
    if shards.name is not None:
        role = ("validation" if split == "val" else "training") if shards.parted else "both, data.val_fraction held out"
        log.info("data.root=%s: %s is for %s: %d images", store.root, shards.name, role, len(source))
    return source if shards.parted else held_out(source, val_fraction, split)


def indexed(store: Local | Remote, cache: Path, layout: Layout = DEFAULT, names: list[str] | None = None) -> Index:
    """The index beside the shards, or one made by reading through them."""
    try:
        data = store.read(INDEX)
    except FileNotFoundError:
        return _made(store, cache, layout, store.names() if names is None else names)
    except OSError as error:
        raise UserError(f"the index of the shards in data.root={store.root} cannot be read: {error}.") from error
    try:
        index = Index.load(data)
    except ValueError as error:
        raise UserError(f"{store.root}/{INDEX} is damaged ({error}): pack the shards anew.") from error
    if layout != DEFAULT:
        raise UserError(
            f"{store.root}/{INDEX} says which files are the images and labels: leave out data.image_key, "
            "data.label_key and data.sample_key, or remove the index."
        )
    for name in index.names:
        store.check(name)
    return index


def _listed(store: Local | Remote, name: str, layout: Layout) -> tuple[Members, int, Notes]:
    notes = Notes()
    with store.open(name) as file:
        return members(file, name, layout, notes), file.seek(0, io.SEEK_END), notes


def _made(store: Local | Remote, cache: Path, layout: Layout, names: list[str]) -> Index:
    """The index that the shards give, from the cache where they have not changed since."""
    if not names:
        raise UserError(f"data.root={store.root} holds no shard (*.tar).")
    stamps = []
    for name in names:
        store.check(name)
        try:
            stamps.append([name, store.stamp(name)])
        except OSError as error:
            raise _unreadable(store, name, error) from error
    reading = json.dumps([READING, str(store.root), stamps, astuple(layout), SUFFIXES])
    path = cache / "indices" / f"{hashlib.sha256(reading.encode()).hexdigest()[:20]}.bin"
    try:
        index = Index.load(path)
    except (OSError, ValueError):
        log.info("%s has no %s: its %d shards are read through once", store.root, INDEX, len(names))
        index = _read_through(store, names, layout)
        try:
            index.save(path, notes=index.notes)
        except OSError as error:
            log.warning("the index of %s is not kept: %s (data.cache_dir)", store.root, error)
    for sentence in index.notes:
        log.warning("%s: %s", store.root, sentence)
    return index


def _read_through(store: Local | Remote, names: list[str], layout: Layout) -> Index:
    """Raises UserError where a shard cannot be read, or none holds an image."""
    shards, sizes, notes = [], [], Notes()
    for name in names:
        try:
            shard, size, unused = store.tried(name, partial(_listed, store, name, layout))
        except OSError as error:
            raise _unreadable(store, name, error) from error
        shards.append(shard)
        sizes.append(size)
        notes += unused
    images = joined(shards)
    if not len(images.offsets):
        looked_for = f"KEY.{layout.image_key} (data.image_key)" if layout.image_key else " ".join(SUFFIXES)
        raise UserError(f"data.root={store.root}: no shard (*.tar) holds an image (looked for {looked_for}).")
    if layout.label_key and images.labels.max() < 0:
        raise UserError(f"data.label_key={layout.label_key}: no image in data.root={store.root} has such a file.")
    classes = [str(k) for k in range(images.labels.max() + 1)]
    index = Index(names, sizes, [len(shard.offsets) for shard in shards], images, classes)
    index.notes = notes.sentences()
    return index


def _unreadable(store: Local | Remote, name: str, error: OSError) -> UserError:
    return UserError(f"the shard {name} in data.root={store.root} cannot be read: {error}.")
