"""Hugging Face `datasets`: Parquet or Arrow files, in a folder or on the Hub; or Parquet files as a stream."""

import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from mae.data.decode import Decoder
from mae.data.formats import SUFFIXES
from mae.data.paths import cache_folder, folders_and_files, given_root, holds, inside
from mae.data.settings import Count, Split, StoreSettings
from mae.data.source import BadImage, Encoded, Source
from mae.data.sources.columns import Columns, agree, class_names, numbered
from mae.data.sources.folder import read
from mae.data.sources.parquet_files import HUB, HubSplits, parquet_files
from mae.data.sources.row_groups import RowGroups, indexed
from mae.data.splits import WORDS, in_words, splits_of
from mae.data.store import Local, is_remote
from mae.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


class Rows(Encoded):
    """The rows of a data set; the image column stays encoded until it is asked for."""

    def __init__(
        self,
        rows: "Dataset",
        image: str,
        labels: np.ndarray | None,
        classes: list[str],
        decoder: Decoder,
        roots: list[str],
    ):
        self.rows, self.image, self.labels, self.classes, self.decoder = rows, image, labels, classes, decoder
        self.most_bytes = decoder.most_bytes
        self.roots = roots  # the folders in which files that a row names must lie; relative to the first

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"row {index}"

    def identities(self, indices: np.ndarray) -> bytes:
        """The sizes of their files in bytes, and the files' names without their folders; no image is read."""
        from pyarrow import compute as functions
        from pyarrow import types

        compute: Any = functions  # its functions are made when it is imported, which type checkers do not see
        column = self.rows.data.column(self.image)
        fields = [field.name for field in column.type] if types.is_struct(column.type) else []
        sizes, names = np.zeros(len(column)), []
        if not fields or "bytes" in fields:
            data = compute.struct_field(column, "bytes") if fields else column
            sizes = compute.binary_length(data).fill_null(-1).to_numpy()
        if "path" in fields:
            paths = compute.struct_field(column, "path").fill_null("").take(indices)
            names = compute.replace_substring_regex(paths, pattern="^.*/", replacement="").to_pylist()
        return sizes[indices].astype(np.int64).tobytes() + "\n".join(names).encode()

    def raw(self, index: int) -> bytearray:
        """An image's file. Raises BadImage."""
        value = self.rows[index][self.image]
        if isinstance(value, bytes):
            return bytearray(value)
        if isinstance(value, dict) and value.get("bytes") is not None:
            return bytearray(value["bytes"])
        try:
            path = os.path.join(self.roots[0], value["path"])
            if not any(inside(os.path.realpath(root), path) for root in self.roots):
                raise BadImage(f"names {path}, which leads out of {self.roots[0]}")
            return read(path, self.most_bytes)
        except BadImage:
            raise
        except (OSError, KeyError, TypeError, ValueError) as error:  # the last for a path with a NUL
            raise BadImage(f"no image in its column {self.image}") from error


def hf(
    split: Split,
    *,
    store: StoreSettings,
    splits: HubSplits,
    columns: Columns,
    streaming: bool,
    lanes: Count,
    window: Count,
    decoder: Decoder,
) -> Source:
    """A data set of `datasets`: a folder of Parquet files or one that it saved, or `hf://NAME` on the Hub.

    `val_split` null holds `val_fraction` of the training split out. With `streaming` Parquet files, here, on the Hub or
    at a URL of fsspec, are read one after another and never all copied here (mae/data/sources/row_groups.py). No code
    of a data set is run. Raises UserError where it is not there, or lacks the split or the columns.
    """
    root, name = store.root, splits.name(split)
    if streaming and root is not None and not is_saved(root):
        files, names = parquet_files(root, splits, name, store)
        try:
            index = indexed(files, names, columns, cache_folder(store.cache_dir))
        except OSError as error:
            raise UserError(f"data.root={root} cannot be read: {error}.") from error
        return splits.of(RowGroups(index, files, decoder, columns.image_column, lanes, window), root, split)
    try:
        import datasets
    except ImportError as error:
        raise UserError("data.name=hf needs Hugging Face's datasets: pip install datasets.") from error
    if root is None:
        raise UserError("data.root is not set: give a folder, or hf://NAME for a data set on the Hub.")
    if not root.startswith(HUB):
        check_folders(Path(root).expanduser())
    rows = _opened(datasets, root, splits.subset, name, store.cache_dir)
    columns.check(rows.features.arrow_schema)
    if columns.label_column is not None and not root.startswith(HUB) and not is_saved(root):
        _check_same_classes(root, splits, name, columns.label_column)
    labels, classes = _labels(rows, columns.label_column)
    if isinstance(rows.features[columns.image_column], datasets.Image):
        rows = rows.cast_column(columns.image_column, datasets.Image(decode=False))
    source = Rows(rows, columns.image_column, labels, classes, decoder, _roots(root, store.cache_dir))
    source.root = root if root.startswith(HUB) else os.path.realpath(Path(root).expanduser())
    return splits.of(source, root, split)


def _opened(datasets: ModuleType, root: str, subset: str | None, split: str, cache_dir: str | None) -> "Dataset":
    """The rows of a split. Raises UserError where they cannot be opened."""
    try:
        return _loaded(datasets, root, subset, split, cache_dir)
    except Exception as error:  # network, files and formats fail in many ways
        cause = error.__cause__ or error  # datasets says of many only that an error occurred
        what = str(cause).strip().splitlines() or [type(cause).__name__]
        if type(cause).__name__ == "SchemaInferenceError" or what[0].startswith("BatchSize must be greater than 0"):
            raise UserError(
                f"data.root={root}: a file of the split {split} holds no rows: remove it, or set data.streaming=true."
            ) from error
        raise UserError(f"data.root={root} cannot be opened as a data set, split {split}: {what[0]}") from error


def _check_same_classes(root: str, splits: HubSplits, split: str, label: str) -> None:
    """Raises UserError where Parquet files of a split number other classes: `datasets` takes the first names."""
    from pyarrow import parquet

    top = given_root(root)
    names = [name for name in Local(top).names("**/*.parquet") if splits.holds(name, split)]
    schemas = {name: parquet.read_schema(top / name) for name in names}
    classes = [class_names(schema, label, name) for name, schema in schemas.items()]
    agree(names, [None] * len(names), classes, label)


def check_folders(top: Path) -> None:
    """Raises UserError for folders of image files that `datasets`, which goes by names in small letters alone, would
    part into other splits than what they hold says."""
    if not top.is_dir() or not holds(top, SUFFIXES, os.path.realpath(top), False):
        return
    folders = folders_and_files(top, SUFFIXES)[0]
    theirs = [name for name in folders if WORDS.search(name)]
    try:
        splits = splits_of(top, SUFFIXES, "auto", False)
        ours = [*splits.names, *splits.unused]
    except UserError:  # two readings
        ours = None
    if set(folders) - set(theirs) and (ours is None or set(ours) != set(theirs)):
        taken = f"takes {in_words(theirs)} for splits" if theirs else "takes none of them for a split"
        raise UserError(
            f"data.root={top} holds the folders {in_words(folders)}, and Hugging Face's datasets {taken}. Use "
            "data=folder, or rename the folders."
        )


def _roots(root: str, cache_dir: str | None) -> list[str]:
    """The folders in which the files of a data set may lie."""
    if not root.startswith(HUB):
        return [os.path.expanduser(root)]
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    return [os.path.expanduser(cache_dir or HF_DATASETS_CACHE), HF_HUB_CACHE]  # the Hub's own files heed no cache_dir


def _loaded(datasets: ModuleType, root: str, subset: str | None, split: str, cache_dir: str | None) -> "Dataset":
    if root.startswith(HUB):
        return datasets.load_dataset(root.removeprefix(HUB), subset, split=split, cache_dir=cache_dir)
    path = Path(root).expanduser()
    if (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(path))[split]
    if (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    if not path.is_dir():
        raise FileNotFoundError("there is no such folder")
    return datasets.load_dataset(str(path), subset, split=split, cache_dir=cache_dir)


def is_saved(root: str) -> bool:
    """Whether a folder was written by `save_to_disk`: Arrow files, which are mapped and never copied anyway."""
    path = Path(root).expanduser()
    return not is_remote(root) and any((path / name).exists() for name in ("dataset_dict.json", "state.json"))


def _labels(rows: "Dataset", column: str | None) -> tuple[np.ndarray | None, list[str]]:
    """Labels by number, and their names: the feature's own, or the sorted values."""
    if column is None:
        return None, []
    values = np.asarray(rows.with_format("arrow")[:][column].to_numpy())
    return numbered(values, getattr(rows.features[column], "names", None))
