"""Parquet files as a stream: never all on this machine, read row group by row group, in an order that allows it.

As with tar shards there is an index: the files' own footers and their labels, read once and cached. So workers, ranks
and resuming to the sample are the sampler's concern, and the stream needs no state of its own. A file at a URL is
fetched whole into the cache when its turn comes, while the one before it is read, and makes room again.
"""

import hashlib
import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from mae.data import flat
from mae.data.decode import Decoder
from mae.data.remote import Remote
from mae.data.sampler import laned
from mae.data.source import BadImage, Encoded
from mae.data.sources.columns import Columns, agree, class_names, numbered
from mae.data.store import Local
from mae.errors import UserError

if TYPE_CHECKING:
    from pyarrow import ChunkedArray

log = logging.getLogger(__name__)

INDEX_FORMAT = "mae-rowgroups-2"


class Groups(NamedTuple):
    """The row groups of all files, in the order of files and rows."""

    file: np.ndarray  # (G,) int64, number of its file
    number: np.ndarray  # (G,) int64, within its file
    num_rows: np.ndarray  # (G,) int64


class OpenGroups:
    """The row groups in use, each read once for all threads of a process."""

    def __init__(self, most: int):
        self.most, self.lock, self.owner = most, threading.Lock(), os.getpid()
        self.futures: OrderedDict[int, Future[ChunkedArray]] = OrderedDict()

    def get(self, number: int, read: Callable[[int], "ChunkedArray"]) -> "ChunkedArray":
        """What `read(number)` gave, or gives now."""
        with self.lock:
            future = self.futures.get(number)
            mine = future is None
            if future is None:
                future = self.futures[number] = Future()
                if len(self.futures) > self.most:
                    self.futures.popitem(last=False)
            self.futures.move_to_end(number)
        if mine:
            try:
                future.set_result(read(number))
            except BaseException as error:  # raised for all who wait for it; the next one tries again
                with self.lock:
                    self.futures.pop(number, None)
                future.set_exception(error)
        return future.result()


class RowGroups(Encoded):
    """The rows of Parquet files, whose column `image` holds encoded images."""

    def __init__(
        self, index: "RowIndex", store: Local | Remote, decoder: Decoder, image_column: str, lanes: int, window: int
    ):
        self.names, self.sizes, self.groups, self.labels, self.classes = index
        self.store, self.decoder, self.image_column, self.lanes, self.window = (
            store,
            decoder,
            image_column,
            lanes,
            window,
        )
        self.root = store.location
        self.starts = np.cumsum(self.groups.num_rows) - self.groups.num_rows  # number of each group's first row
        self._open_groups = OpenGroups((window + 1) * lanes)
        self._files: tuple[tuple[int, int], np.ndarray] | None = None  # an epoch's order of the files

    def __getstate__(self) -> Mapping[str, object]:
        return vars(self) | {"_open_groups": None}

    def __len__(self) -> int:
        return int(self.groups.num_rows.sum())

    def name(self, index: int) -> str:
        file = int(self.groups.file[self._group(index)])
        first = int(self.starts[np.searchsorted(self.groups.file, file)])
        return f"{self.names[file]}/row {index - first}"

    def identities(self, indices: np.ndarray) -> bytes:
        """Their numbers, and the names, sizes and numbers of rows of all files."""
        rows = np.bincount(self.groups.file, self.groups.num_rows, len(self.names)).astype(int).tolist()
        return json.dumps([self.names, self.sizes, rows]).encode() + indices.tobytes()

    def raw(self, index: int) -> bytearray:
        """An image's file. Raises BadImage."""
        if self._open_groups is None or self._open_groups.owner != os.getpid():
            self._open_groups = OpenGroups((self.window + 1) * self.lanes)
        group = self._group(index)
        value = self._open_groups.get(group, self._read)[index - int(self.starts[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) and isinstance(value, dict) and value.get("path") is not None:
            raise BadImage(f"its column {self.image_column} names a file, which data.streaming=false reads")
        if not isinstance(data, bytes):
            raise BadImage(f"no image in its column {self.image_column}")
        return bytearray(data)

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _read(self, group: int) -> "ChunkedArray":
        from pyarrow import ArrowException

        try:
            try:
                return self._column(group)
            except FileNotFoundError:  # just then another process or thread made room in the cache
                return self._column(group)
        except (OSError, ArrowException) as error:
            raise BadImage(f"cannot be read: {str(error).splitlines()[0]}") from error

    def _column(self, group: int) -> "ChunkedArray":
        from pyarrow import parquet

        file = int(self.groups.file[group])
        path = self.store.path(self.names[file], self.sizes[file])
        with parquet.ParquetFile(path, memory_map=True) as opened:
            return opened.read_row_group(int(self.groups.number[group]), [self.image_column], use_threads=False).column(
                0
            )

    def order(self, seed: int, epoch: int, mask: np.ndarray | None = None) -> np.ndarray:
        """Files are shuffled, the row groups of a file too, and rows over `window` groups of a lane."""
        rng = np.random.default_rng([seed, epoch])
        rank = np.argsort(rng.permutation(len(self.names)))  # of each file in the epoch
        groups = np.lexsort((rng.random(len(self.starts)), rank[self.groups.file]))
        counts = self.groups.num_rows[groups]
        line = np.repeat(self.starts[groups] - np.cumsum(counts) + counts, counts) + np.arange(len(self))
        if mask is not None:
            line, counts = line[mask[line]], counts * mask.mean()
        return laned(line, self.lanes, max(1, int(self.window * counts.mean())), rng)

    def prefetch(self, seed: int, epoch: int, indices: np.ndarray) -> None:
        """Lets the store fetch the files that follow those of these images."""
        if isinstance(self.store, Local):
            return
        if self._files is None or self._files[0] != (seed, epoch):
            self._files = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(len(self.names))
        files = self._files[1]
        positions = np.argsort(files)
        current = np.unique(self.groups.file[np.searchsorted(self.starts, indices, side="right") - 1])
        for position in np.unique(positions[current]) + 1:
            if position < len(files):
                self.store.ahead(self.names[files[position]], self.sizes[files[position]])


# ---------------------------------------------------------------- the index


class RowIndex(NamedTuple):
    """The rows of all files."""

    names: list[str]  # of the files
    sizes: list[int]  # bytes
    groups: Groups
    labels: np.ndarray | None
    classes: list[str]


def indexed(store: Local | Remote, names: list[str], columns: Columns, cache: Path) -> RowIndex:
    """The rows of these files: from the cache, or their footers and labels read once.

    Raises UserError where a column is missing or a file is no Parquet file, OSError where one cannot be read.
    """
    label = columns.label_column
    stamps = json.dumps(
        [INDEX_FORMAT, str(store.root), columns.image_column, label, [[name, store.stamp(name)] for name in names]]
    )
    path = cache / "indices" / f"{hashlib.sha256(stamps.encode()).hexdigest()[:20]}.bin"
    try:
        head, arrays = flat.read(path)
        groups = Groups(arrays["file"], arrays["number"], arrays["count"])
        return RowIndex(names, head["sizes"], groups, arrays.get("labels"), head["classes"])
    except (OSError, ValueError, KeyError):
        log.info("the footers and labels of %d Parquet files are read once", len(names))
    footers = [store.tried(name, partial(_footer, store, name, columns)) for name in names]
    sizes, parts = [footer.size for footer in footers], []
    for number, footer in enumerate(footers):
        parts.append((np.full(len(footer.counts), number), np.arange(len(footer.counts)), np.array(footer.counts)))
    groups = Groups(*(np.concatenate(column).astype(np.int64) for column in zip(*parts, strict=True)))
    labels, classes = None, []
    if label is not None:
        known = agree(names, [footer.kind for footer in footers], [footer.classes for footer in footers], label)
        labels, classes = numbered(
            np.concatenate([footer.labels for footer in footers if footer.labels is not None]), known
        )
    arrays = {"file": groups.file, "number": groups.number, "count": groups.num_rows}
    arrays |= {} if labels is None else {"labels": labels}
    try:
        flat.write(path, {"format": INDEX_FORMAT, "sizes": sizes, "classes": classes}, arrays)
    except OSError as error:
        log.warning("the index of %s is not kept: %s (data.cache_dir)", store.root, error)
    return RowIndex(names, sizes, groups, labels, classes)


class Footer(NamedTuple):
    """What a Parquet file says of its rows."""

    size: int  # bytes of the file
    counts: list[int]  # rows of each row group
    labels: np.ndarray | None  # (rows,), or None where they are not read
    kind: str | None  # of the labels: text, numbers, or None where all are null
    classes: list[str] | None  # names, where the file has them


def _footer(store: Local | Remote, name: str, columns: Columns) -> Footer:
    with store.open(name) as file:
        return read_footer(file, name, columns)


def read_footer(file: IO[bytes], name: str, columns: Columns) -> Footer:
    """Of an open file. Raises UserError where it is no Parquet file, or its columns are not images and labels."""
    from pyarrow import ArrowException, parquet

    try:
        opened = parquet.ParquetFile(file)
        schema, about = opened.schema_arrow, opened.metadata
        kind, label = columns.check(schema, name), columns.label_column
        labels = None if label is None else opened.read([label], use_threads=False).column(0).to_numpy()
    except ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{name} under data.root is not a Parquet file: {reason}.") from error
    if kind is None and labels is not None:
        labels = np.full(len(labels), None, object)  # of the null type, which numpy makes numbers of
    counts = [about.row_group(k).num_rows for k in range(about.num_row_groups)]
    classes = None if label is None else class_names(schema, label, name)
    return Footer(file.seek(0, os.SEEK_END), counts, labels, kind, classes)
