"""Tar shards as a source: images found by an index, read by position, in an order that goes shard by shard.

With the index the source is as any other: workers, ranks and resuming are the sampler's concern. What is
its own is the order of an epoch. The shards are shuffled and laid end to end, and the line is cut into
`lanes` equal parts. Position p of the epoch belongs to lane p % lanes, so that a rank that takes every
world-th position stays on its own lanes and the shards they cross; within a lane, images are shuffled over
`window` shards. Each image stands once in the order, whatever the number of ranks.
"""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated

import numpy as np

from mae.data.decode import Decoder
from mae.data.flat import gathered
from mae.data.paths import cache_folder
from mae.data.remote import Remote
from mae.data.sampler import laned
from mae.data.settings import Choice, Count, Split, StoreSettings
from mae.data.shards.index import Index, indexed
from mae.data.shards.layout import Layout
from mae.data.shards.splits import opened
from mae.data.source import BadImage, Encoded, Source
from mae.data.store import Local
from mae.data.subsets import held_out

log = logging.getLogger(__name__)

OPEN_FILES = 64  # shards a process keeps open


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
        self.most_bytes = decoder.most_bytes
        self.classes = index.classes
        self.labels = np.asarray(index.members.labels, np.int64) if index.classes else None
        self.root = store.location
        self._open = OpenFiles()
        self._positions: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> Mapping[str, object]:
        return vars(self) | {"_open": OpenFiles()}

    def __len__(self) -> int:
        return len(self.index.members.offsets)

    def name(self, index: int) -> str:
        return f"{self.index.names[self.index.shard(index)]}/{self.index.key(index)}"

    def identities(self, indices: np.ndarray) -> bytes:
        """The names of their shards and their keys, and the sizes of their files."""
        members = self.index.members
        shards = np.searchsorted(self.index.starts, indices, side="right") - 1
        names = [self.index.names[shard] for shard in shards.tolist()]
        starts = np.where(indices > 0, members.ends[indices - 1], 0)
        keys = gathered(members.text, starts, members.ends[indices])
        return "\n".join(names).encode(errors="surrogatepass") + keys + members.sizes[indices].tobytes()

    def raw(self, index: int) -> bytearray:
        """An image's file. Raises BadImage."""
        size, offset = int(self.index.members.sizes[index]), int(self.index.members.offsets[index])
        if size > self.most_bytes:
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
            name, size = self.index.names[shard], self.index.sizes[shard]
            try:
                descriptors[shard] = os.open(self.store.path(name, size), os.O_RDONLY)
            except FileNotFoundError:  # just then another process made room in the cache
                descriptors[shard] = os.open(self.store.path(name, size), os.O_RDONLY)
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
        if self._positions is None or self._positions[0] != (seed, epoch):
            shards = np.random.default_rng([seed, epoch]).permutation(len(self.index.names))
            self._positions = (seed, epoch), shards, np.argsort(shards)
        _, shards, positions = self._positions
        for position in np.unique(positions[[self.index.shard(int(i)) for i in indices]]) + self.window:
            if position < len(shards):
                self.store.ahead(self.index.names[shards[position]], self.index.sizes[shards[position]])


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
