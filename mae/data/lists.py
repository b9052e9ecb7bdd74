"""Images named in a table: CSV or Parquet with columns path, and where wanted label and split."""

import contextlib
import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from mae.data.decode import Decoder
from mae.data.folder import Files, held_out
from mae.data.known import given_root
from mae.data.listing import MAGIC, Builder, Listing, cached, inside
from mae.data.source import Source, Subset

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}


def table(
    split: Literal["train", "val"],
    *,
    root: str | None,
    file: str | None,
    in_chans: int,
    val_fraction: float,
    exif_orientation: bool,
    max_pixels: int,
    follow_links: bool,
    cache_dir: str | None,
) -> Source:
    """Images that the table `file` names, relative to `root`.

    Labels are words, sorted into classes. Rows of split `val` (or valid, validation, test) are held out, or
    `val_fraction` of all where there is no such column. Raises ValueError for a table without a `path`
    column, without rows, and for a path that leads out of `root`. What was read is kept in the cache folder.
    """
    top = given_root(root)
    if file is None:
        raise ValueError("data.file is not set: give a CSV or Parquet file with a column path.")
    place = Path(file).expanduser()
    try:
        status = place.stat()
        stamp = [os.path.realpath(place), status.st_size, status.st_mtime_ns]
    except OSError as error:
        raise ValueError(f"data.file={place} cannot be read: {error.strerror or error}.") from error
    wanted = json.dumps([MAGIC, "table", os.path.realpath(top), *stamp, follow_links])
    listing = cached(top, wanted, cache_dir, lambda: read_through(place, top, follow_links))
    files = Files(listing, Decoder(in_chans, exif_orientation, max_pixels))
    if listing.held is not None and listing.held.any():
        return Subset(files, np.flatnonzero((listing.held == 1) == (split == "val")))
    return held_out(files, val_fraction, split)


def read_through(file: Path, top: Path, follow_links: bool) -> tuple[Listing, dict[str, int]]:
    """The listing that a table makes, and the time stamps of the folders (and of the table) that it hangs on.

    Raises ValueError for a row that will not do."""
    found, held = Builder(), bytearray()
    folders: dict[str, bool] = {"": False}  # folder -> whether it leads out
    number: dict[str, int] = {}
    real_root = os.path.realpath(top)
    for path, label, part in rows(file):
        if not path:
            raise ValueError(f"data.file={file} names no path in row {len(held) + 1}.")
        if os.path.isabs(path) or ".." in path.split("/") or not follow_links and leads_out(real_root, path, folders):
            raise ValueError(f"data.file={file} names {path}, which leads out of data.root={top}.")
        if part is not None and part not in SPLITS:
            raise ValueError(f"data.file={file} has split={part}: it must be one of {', '.join(SPLITS)}.")
        found.add(path, -1 if label in (None, "") else number.setdefault(label, len(number)))
        held.append(part is not None and SPLITS[part] == "val")
    if not held:
        raise ValueError(f"data.file={file} has no rows.")
    listing = found.listing(str(top), sorted(number))
    if number:
        rank = np.argsort(np.argsort([*number]))  # numbers as met -> numbers in sorted order
        listing.labels = np.where(listing.labels < 0, -1, rank[listing.labels]).astype(np.int32)
    listing.held = np.frombuffer(bytes(held), np.uint8)
    stamps = {str(file.absolute()): file.stat().st_mtime_ns}
    for folder in {*folders, *(str(above) for one in folders for above in Path(one).parents)}:
        with contextlib.suppress(OSError):  # a folder that a row names and that is not there
            stamps[folder] = os.stat(os.path.join(real_root, folder)).st_mtime_ns
    return listing, stamps


def leads_out(real_root: str, path: str, folders: dict[str, bool]) -> bool:
    """Whether a path leads out of the root by a link; its folder is looked at once."""
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = not inside(real_root, os.path.join(real_root, folder))
    whole = os.path.join(real_root, folder, name)
    return folders[folder] or os.path.islink(whole) and not inside(real_root, whole)


def rows(path: Path) -> Iterator[tuple[str, str | None, str | None]]:
    """(path, label, split) of each row; None where the column is not there."""
    columns = ("path", "label", "split")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            yield from _parquet(path, columns)
            return
        with open(path, newline="", encoding="utf-8-sig") as text:  # Excel's begins with a mark
            reader = csv.DictReader(text)
            if "path" not in (reader.fieldnames or []):
                raise ValueError(f"data.file={path} has no column path, only {reader.fieldnames}.")
            for row in reader:
                yield row["path"], row.get("label"), row.get("split")
    except OSError as error:
        raise ValueError(f"data.file={path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data.file={path} is not UTF-8 ({error.reason}): save it as such.") from error
    except csv.Error as error:
        raise ValueError(f"data.file={path} is no CSV that can be read: {error}.") from error


def _parquet(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, str | None, str | None]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ValueError("data.file is a Parquet file, which needs pyarrow: pip install pyarrow.") from error
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"data.file={path} is not a Parquet file.") from error
    names = [c for c in columns if c in file.schema_arrow.names]
    if "path" not in names:
        raise ValueError(f"data.file={path} has no column path, only {', '.join(file.schema_arrow.names)}.")
    for batch in file.iter_batches(columns=names):
        for row in batch.to_pylist():
            label = row.get("label")
            yield row["path"], None if label is None else str(label), row.get("split")
