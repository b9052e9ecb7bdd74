"""The index of tar shards: which images lie in which shard, and where. It lies beside the shards, or is made once."""

import hashlib
import io
import json
import logging
import os
from dataclasses import astuple
from functools import partial
from pathlib import Path

import numpy as np

from mae.data import flat
from mae.data.formats import SUFFIXES
from mae.data.shards.splits import INDEX
from mae.data.shards.tar import DEFAULT, Layout, Members, Notes, joined, members
from mae.data.store import Local, Remote
from mae.errors import UserError

log = logging.getLogger(__name__)

FORMAT = "mae-shards-1"
READING = "mae-shards-2"  # how files form samples: a cached index of another reading is not used


class Index:
    """Which images lie in which shard, and where."""

    def __init__(self, names: list[str], sizes: list[int], counts: list[int], members: Members, classes: list[str]):
        self.names, self.sizes, self.members, self.classes = names, sizes, members, classes
        self.counts = np.asarray(counts, np.int64)  # images in each shard
        self.starts = np.cumsum(self.counts) - self.counts  # number of each shard's first image
        self.notes: list[str] = []  # what of the shards is not used, a sentence each

    def shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def key(self, index: int) -> str:
        start = self.members.ends[index - 1] if index else 0
        return self.members.text[start : self.members.ends[index]].tobytes().decode(errors="backslashreplace")

    def save(self, path: Path, **more: object) -> None:
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
        """Raises ValueError where the columns do not belong together, TypeError for a name that is no text."""
        members = self.members
        images = {len(column) for column in (members.offsets, members.sizes, members.labels, members.ends)}
        shards = {len(self.names), len(self.sizes), len(self.counts)}
        if images != {int(self.counts.sum())} or len(shards) > 1 or self.counts.min(initial=0) < 0:
            raise ValueError("its columns do not belong together")
        if self.classes and len(members.labels) and int(members.labels.max()) >= len(self.classes):
            raise ValueError(f"it holds the label {int(members.labels.max())} of {len(self.classes)} classes")
        if any(os.path.basename(name) in ("", ".") for name in self.names):
            raise ValueError("a shard has no name")


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
