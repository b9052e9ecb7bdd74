"""Hugging Face `datasets`: Parquet or Arrow files, in a folder or on the Hub; or Parquet files as a stream."""

import os
import posixpath
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from mae.data.decode import Decoder
from mae.data.formats import SUFFIXES
from mae.data.paths import cache_folder, folders_and_files, given_root, holds, inside
from mae.data.source import BadImage, Encoded, Source
from mae.data.sources.columns import agree, checked, class_names, numbered
from mae.data.sources.folder import read
from mae.data.sources.row_groups import RowGroups, indexed
from mae.data.splits import WORDS, in_words, splits_of
from mae.data.store import Local, Remote, is_remote
from mae.data.subsets import held_out

HUB = "hf://"


class Rows(Encoded):
    """The rows of a data set; the image column stays encoded until it is asked for."""

    def __init__(
        self, rows: Any, image: str, labels: np.ndarray | None, classes: list[str], decoder: Decoder, roots: list[str]
    ):
        self.rows, self.image, self.labels, self.classes, self.decoder = rows, image, labels, classes, decoder
        self.roots = roots  # the folders in which files that a row names must lie; relative to the first

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"row {index}"

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
            return read(path, self.decoder.most_bytes)
        except BadImage:
            raise
        except (OSError, KeyError, TypeError, ValueError) as error:  # the last for a path with a NUL
            raise BadImage(f"no image in its column {self.image}") from error


def hf(
    split: Literal["train", "val"],
    *,
    root: str | None,
    subset: str | None,
    image_column: str,
    label_column: str | None,
    train_split: str,
    val_split: str | None,
    in_chans: Annotated[int, "[1, inf)"],
    val_fraction: Annotated[float, "[0, 1]"],
    exif_orientation: bool,
    max_pixels: Annotated[int, "[1, inf)"],
    cache_dir: str | None,
    streaming: bool,
    cache_gb: Annotated[float, "(0, inf)"],
    retry_s: Annotated[float, "[0, inf)"],
    lanes: Annotated[int, "[1, inf)"],
    window: Annotated[int, "[1, inf)"],
    follow_links: bool,
) -> Source:
    """A data set of `datasets`: a folder of Parquet files or one that it saved, or `hf://NAME` on the Hub.

    `val_split` null holds `val_fraction` of the training split out. With `streaming` Parquet files, here, on the
    Hub or at a URL of fsspec, are read one after another and never all copied here (mae/data/sources/row_groups.py). No
    code of a data set is run. Raises ValueError where it is not there, or lacks the split or the columns.
    """
    part = val_split if split == "val" and val_split is not None else train_split
    if streaming and root is not None and not is_saved(root):
        store, names = parquet_files(root, subset, part, cache_folder(cache_dir), cache_gb, retry_s, follow_links)
        try:
            sizes, groups, labels, classes = indexed(store, names, image_column, label_column, cache_folder(cache_dir))
        except OSError as error:
            raise ValueError(f"data.root={root} cannot be read: {error}.") from error
        decoder = Decoder(in_chans, exif_orientation, max_pixels)
        rows = RowGroups(names, sizes, groups, labels, classes, store, decoder, image_column, lanes, window)
        return _split(rows, root, part, val_split, val_fraction, split)
    try:
        import datasets
    except ImportError as error:
        raise ValueError("data.name=hf needs Hugging Face's datasets: pip install datasets.") from error
    if root is None:
        raise ValueError("data.root is not set: give a folder, or hf://NAME for a data set on the Hub.")
    if not root.startswith(HUB):
        check_folders(Path(root).expanduser())
    try:
        rows = _loaded(datasets, root, subset, part, cache_dir)
    except Exception as error:  # network, files and formats fail in many ways
        cause = error.__cause__ or error  # datasets says of many only that an error occurred
        what = str(cause).strip().splitlines() or [type(cause).__name__]
        if type(cause).__name__ == "SchemaInferenceError" or what[0].startswith("BatchSize must be greater than 0"):
            raise ValueError(
                f"data.root={root}: a file of the split {part} holds no rows: remove it, or set data.streaming=true."
            ) from error
        raise ValueError(f"data.root={root} cannot be opened as a data set, split {part}: {what[0]}") from error
    checked(rows.features.arrow_schema, image_column, label_column)
    if label_column is not None and not root.startswith(HUB) and not is_saved(root):
        _same_classes(root, subset, part, label_column)
    labels, classes = _labels(rows, label_column)
    if isinstance(rows.features[image_column], datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    decoder = Decoder(in_chans, exif_orientation, max_pixels)
    source = Rows(rows, image_column, labels, classes, decoder, _places(root, cache_dir))
    return _split(source, root, part, val_split, val_fraction, split)


def _same_classes(root: str, subset: str | None, part: str, label: str) -> None:
    """Raises ValueError where Parquet files of a split number other classes: `datasets` takes the first names."""
    from pyarrow import parquet

    top = given_root(root)
    names = [name for name in Local(top).names("**/*.parquet") if _is_of(name, subset, part)]
    schemas = {name: parquet.read_schema(top / name) for name in names}
    classes = [class_names(schema, label, name) for name, schema in schemas.items()]
    agree(names, [None] * len(names), classes, label)


def _is_of(name: str, subset: str | None, part: str) -> bool:
    """Whether a Parquet file is of a split: `PART/*`, `PART-*` or `PART.parquet`, at any depth."""
    marks = (f"/{part}/", f"/{part}-", f"/{part}.parquet")
    within = f"/{subset}/" if subset is not None else "/"
    return within in f"/{name}" and any(mark in f"/{name}" for mark in marks)


def _split(rows: Source, root: str, part: str, val_split: str | None, val_fraction: float, split: str) -> Source:
    """The rows of a split, or a held-out part of them. Raises ValueError where there are none."""
    if not len(rows):
        raise ValueError(f"data.root={root} holds no rows of the split {part}.")
    return rows if val_split is not None else held_out(rows, val_fraction, split)


def check_folders(top: Path) -> None:
    """Raises ValueError for folders of image files that `datasets`, which goes by names in small letters alone, would
    part into other splits than what they hold says."""
    if not top.is_dir() or not holds(top, SUFFIXES, os.path.realpath(top), False):
        return
    folders = folders_and_files(top, SUFFIXES)[0]
    theirs = [name for name in folders if WORDS.search(name)]
    try:
        found = splits_of(top, SUFFIXES, "auto", False)
        ours = [*found.names, *found.unused]
    except ValueError:  # two readings
        ours = None
    if set(folders) - set(theirs) and (ours is None or set(ours) != set(theirs)):
        taken = f"takes {in_words(theirs)} for splits" if theirs else "takes none of them for a split"
        raise ValueError(
            f"data.root={top} holds the folders {in_words(folders)}, and Hugging Face's datasets {taken}. Use "
            "data=folder, or rename the folders."
        )


def _places(root: str, cache_dir: str | None) -> list[str]:
    """The folders in which the files of a data set may lie."""
    if not root.startswith(HUB):
        return [os.path.expanduser(root)]
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    return [os.path.expanduser(cache_dir or HF_DATASETS_CACHE), HF_HUB_CACHE]  # the Hub's own files heed no cache_dir


def _loaded(datasets: Any, root: str, subset: str | None, part: str, cache_dir: str | None) -> Any:
    if root.startswith(HUB):
        return datasets.load_dataset(root.removeprefix(HUB), subset, split=part, cache_dir=cache_dir)
    path = Path(root).expanduser()
    if (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(path))[part]
    if (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    if not path.is_dir():
        raise FileNotFoundError("there is no such folder")
    return datasets.load_dataset(str(path), subset, split=part, cache_dir=cache_dir)


def is_saved(root: str) -> bool:
    """Whether a folder was written by `save_to_disk`: Arrow files, which are mapped and never copied anyway."""
    path = Path(root).expanduser()
    return not is_remote(root) and any((path / name).exists() for name in ("dataset_dict.json", "state.json"))


def parquet_files(
    root: str, subset: str | None, part: str, cache: Path, cache_gb: float, retry_s: float, follow_links: bool = False
) -> tuple[Local | Remote, list[str]]:
    """Where the Parquet files of a split lie, and their names there, sorted: `PART/*`, `PART-*` or `PART.parquet`,
    at any depth, or what a data set on the Hub says. Raises ValueError where there are none."""
    if root.startswith(HUB):
        urls = hub_files(root, subset, part)
        top = posixpath.commonpath([posixpath.dirname(url) for url in urls]).replace(":/", "://", 1)
        store, found = Remote(top, cache, cache_gb, retry_s), sorted(url[len(top) + 1 :] for url in urls)
    else:
        store, found = _listed(root, subset, part, cache, cache_gb, retry_s, follow_links)
    for name in found:
        store.check(name)
    return store, found


def _listed(
    root: str, subset: str | None, part: str, cache: Path, cache_gb: float, retry_s: float, follow_links: bool = False
) -> tuple[Local | Remote, list[str]]:
    try:
        store = Remote(root, cache, cache_gb, retry_s) if is_remote(root) else Local(given_root(root), follow_links)
        names = store.names("**/*.parquet")
    except (OSError, NotImplementedError) as error:
        raise ValueError(f"data.root={root} cannot be reached: {error}.") from error
    found = [name for name in names if _is_of(name, subset, part)]
    if not found:
        below = f" in a folder {subset} (data.subset)" if subset is not None else ""
        raise ValueError(
            f"data.root={root} holds no Parquet files of the split {part}{below}: {part}/* or {part}-*.parquet."
        )
    return store, found


def hub_files(root: str, subset: str | None, part: str) -> list[str]:
    """The URLs of the Parquet files of a data set on the Hub."""
    import datasets

    try:
        files = datasets.load_dataset_builder(root.removeprefix(HUB), subset).config.data_files or {}
        urls = [str(url) for url in files[part]]
    except Exception as error:  # network and formats fail in many ways
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"data.root={root} cannot be opened as a data set, split {part}: {what[0]}") from error
    if strange := [url for url in urls if not url.endswith(".parquet")]:
        raise ValueError(f"data.streaming=true needs Parquet files, and data.root={root} has {strange[0]}.")
    return urls


def _labels(rows: Any, column: str | None) -> tuple[np.ndarray | None, list[str]]:
    """Labels by number, and their names: the feature's own, or the sorted values."""
    if column is None:
        return None, []
    values = np.asarray(rows.with_format("arrow")[:][column].to_numpy())
    return numbered(values, getattr(rows.features[column], "names", None))
