"""Images named in a table: CSV or Parquet with columns path, and where wanted label and split."""

import contextlib
import csv
import difflib
import json
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TextIO

import numpy as np

from mae.data.decode import Decoder
from mae.data.paths import given_root, inside, printable
from mae.data.settings import FileSettings, Split
from mae.data.source import Source
from mae.data.sources.columns import is_text
from mae.data.sources.folder import Files
from mae.data.sources.listing import MAGIC, Builder, Listing, cached
from mae.data.splits import TRAINING, VALIDATION, split_of
from mae.data.subsets import Subset, held_out
from mae.errors import UserError

log = logging.getLogger(__name__)

READING = "table-2"  # how rows are read: a cached listing of another reading is not used
COLUMNS = ("path", "label", "split")
TEXTS = {"path": "file names relative to data.root", "split": "train or val"}
SIMILAR = {"path": ("file", "filename", "filepath", "image", "img"), "label": ("class", "target", "category")}


def table(
    split: Split,
    *,
    files: FileSettings,
    file: str | None,
    val_fraction: Annotated[float, "[0, 1]"],
    decoder: Decoder,
) -> Source:
    """Images that the table `file` names, relative to `root`.

    Labels are words, sorted into classes; an empty one, null or NaN is none. Rows of split `val` (or valid, validation,
    test) are held out, or `val_fraction` of all where there is no such column. Raises UserError for a table without a
    `path` column or without rows of the split, and for a path that leads out of `root`. What was read is kept in the
    cache folder.
    """
    top = given_root(files.root)
    if file is None:
        raise UserError("data.file is not set: give a CSV or Parquet file with a column path.")
    path = Path(file).expanduser()
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"data.file={path} is not a regular file.")
        stamp = [os.path.realpath(path), status.st_size, status.st_mtime_ns]
    except OSError as error:
        raise UserError(f"data.file={path} cannot be read: {error.strerror or error}.") from error
    wanted = json.dumps([MAGIC, READING, os.path.realpath(top), *stamp, files.follow_links])
    listing = cached(top, wanted, files.cache_dir, lambda: read_through(path, top, files.follow_links))
    images = Files(listing, decoder)
    if listing.held is not None and listing.held.all() and split == "train":
        raise UserError(f"data.file={path} has no row for training, only split=val: give some rows split=train.")
    if listing.held is not None and listing.held.any():
        return Subset(images, np.flatnonzero((listing.held == 1) == (split == "val")))
    return held_out(images, val_fraction, split)


def read_through(file: Path, top: Path, follow_links: bool) -> tuple[Listing, dict[str, int]]:
    """The listing that a table makes, and the time stamps of the folders and of the table that it depends on.

    Raises UserError for a row that will not do."""
    paths, held = Builder(), bytearray()
    root = Root(top, follow_links)
    number: dict[str, int] = {}
    for path, label, split in rows(file):
        row = len(held) + 1
        if not path or "\0" in path:
            raise UserError(f"data.file={file} names no path in row {row}.")
        relative = root.relative(path)
        if relative is None:
            raise UserError(f"data.file={file} names {printable(path)}, which leads out of data.root={top}.")
        kind = None if split is None else split_of(split)
        if split is not None and kind is None:
            words = ", ".join(dict.fromkeys(("train", "val", *TRAINING, *VALIDATION)))
            raise UserError(f"data.file={file} has split={split}: it must be one of {words}.")
        paths.add(relative, -1 if label in (None, "") else number.setdefault(label, len(number)))
        held.append(kind == "val")
    if not held:
        raise UserError(f"data.file={file} has no rows.")
    listing = paths.listing(str(top), sorted(number))
    if number:
        rank = np.argsort(np.argsort([*number]))  # numbers as met -> numbers in sorted order
        listing.labels = np.where(listing.labels < 0, -1, rank[listing.labels]).astype(np.int32)
    listing.held = np.frombuffer(bytes(held), np.uint8)
    stamps = {str(file.absolute()): file.stat().st_mtime_ns}
    for folder in {*root.folders, *(str(above) for name in root.folders for above in Path(name).parents)}:
        with contextlib.suppress(OSError):  # a folder that a row names and that is not there
            stamps[folder] = os.stat(os.path.join(root.real, folder)).st_mtime_ns
    return listing, stamps


class Root:
    """The root of a table's paths. Each folder that they name is looked at once."""

    def __init__(self, top: Path, follow_links: bool):
        self.real, self.follow_links = os.path.realpath(top), follow_links
        self.spellings = [f"{os.path.abspath(top)}/", f"{self.real}/"]
        self.folders: dict[str, bool] = {"": False}  # folder below the root -> whether it leads out
        self.others: dict[str, str] = {}  # folder as a table writes it -> where it really is

    def relative(self, path: str) -> str | None:
        """A path relative to the root, or None where it leads out."""
        if os.path.isabs(path) or ".." in path.split("/"):
            path = self._below(path)
        return None if not path or not self.follow_links and self._leads_out(path) else path

    def _below(self, path: str) -> str:
        """An absolute path or one with `..` as one below the root, or "" where its folder is not there."""
        for spelling in self.spellings:
            if path.startswith(spelling) and ".." not in path.split("/"):
                return path[len(spelling) :]
        folder, name = os.path.split(os.path.join(self.real, path))
        if folder not in self.others:
            self.others[folder] = os.path.realpath(folder)
        whole = os.path.join(self.others[folder], name)
        return whole[len(self.real.rstrip("/")) + 1 :] if whole.startswith(self.spellings[1]) and name != ".." else ""

    def _leads_out(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self.folders:
            self.folders[folder] = not inside(self.real, os.path.join(self.real, folder))
        whole = os.path.join(self.real, folder, name)
        return self.folders[folder] or os.path.islink(whole) and not inside(self.real, whole)


def rows(path: Path) -> Iterator[tuple[str, str | None, str | None]]:
    """(path, label, split) of each row; None where the column is not there."""
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            yield from _parquet(path)
            return
        with open(path, newline="", encoding="utf-8-sig") as text:  # Excel's begins with a mark
            yield from _csv(path, text)
    except OSError as error:
        raise UserError(f"data.file={path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data.file={path} is not UTF-8 ({error.reason}): save it as such.") from error
    except csv.Error as error:
        raise UserError(f"data.file={path} is no CSV that can be read: {error}.") from error


def _csv(path: Path, text: TextIO) -> Iterator[tuple[str, str | None, str | None]]:
    table = csv.reader(text, skipinitialspace=True)
    header = next(table, [])
    at = {name: header.index(column) for name, column in columns(path, header).items()}
    loose = any(column != column.strip() for column in header)  # blanks around its values mean nothing either
    for row in table:
        if any(value.strip() for value in row[len(header) :]):
            raise UserError(
                f"data.file={path} has {len(row)} values in line {table.line_num} for {len(header)} columns: put a "
                "value that holds a comma in quotes."
            )
        if row:
            name, label, split = (row[at[c]] if c in at and at[c] < len(row) else None for c in COLUMNS)
            yield (name or "").strip() if loose else name or "", label and label.strip(), split


def columns(file: Path, header: list[str]) -> dict[str, str]:
    """The columns of a table that are read: what they are -> their names, but for blanks and capitals.

    Raises UserError where there is no path, or two columns are the same. Says which is not read and nearly matches."""
    names: dict[str, str] = {}
    for wanted in COLUMNS:
        same = [name for name in header if name.strip().lower() == wanted]
        if len(same) > 1 and same.count(wanted) != 1:
            raise UserError(f"data.file={file} has {len(same)} columns {wanted}: {same}. Leave one.")
        if same:
            names[wanted] = wanted if wanted in same else same[0]
            continue
        close = similar(wanted, [name for name in header if name not in names.values()])
        if wanted == "path":
            shown = ", ".join(map(repr, header)) or "none"
            hint = f" Is {close} the one? Rename it." if close else ""
            apart = next((sign for sign in (";", "\t", "|") if len(header) == 1 and sign in header[0]), None)
            hint = f" Its columns are parted by {apart!r}: save it with commas." if apart else hint
            raise UserError(f"data.file={file} has no column path, only {shown}.{hint}")
        if close:
            log.warning("data.file=%s: the column %s is not read: rename it where it is the %s", file, close, wanted)
    return names


def similar(wanted: str, header: list[str]) -> str | None:
    """The column whose name comes close to the one that is wanted."""
    names = {re.sub(r"[\W_]", "", name.lower()): name for name in reversed(header)}
    words = [wanted, f"{wanted}s", *SIMILAR.get(wanted, ())]
    near = [word for word in words if word in names] or difflib.get_close_matches(wanted, list(names), 1, 0.75)
    return names[near[0]] if near else None


def _parquet(path: Path) -> Iterator[tuple[str, str | None, str | None]]:
    try:
        from pyarrow import ArrowInvalid, null, parquet, types
    except ImportError as error:
        raise UserError("data.file is a Parquet file, which needs pyarrow: pip install pyarrow.") from error
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"data.file={path} is not a Parquet file.") from error
    names = columns(path, file.schema_arrow.names)
    for wanted, values in TEXTS.items():
        kind = file.schema_arrow.field(names[wanted]).type if wanted in names else null()
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not is_text(kind) and not types.is_null(kind):
            raise UserError(
                f"data.file={path}: the column {names[wanted]} holds {kind}, and it must be text: {values}."
            )
    for batch in file.iter_batches(columns=list(names.values())):
        for row in batch.to_pylist():
            label = row.get(names.get("label"))
            missing = label is None or label != label  # null, or the NaN that pandas writes for it
            yield row[names["path"]], None if missing else str(label), row.get(names.get("split"))
