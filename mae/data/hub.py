"""Hugging Face `datasets`: Parquet or Arrow files, in a folder or on the Hub."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from mae.data.decode import Decoder
from mae.data.folder import read
from mae.data.source import BadImage, Source, Subset, split_indices

HUB = "hf://"


class Rows:
    """The rows of a data set; the image column stays encoded until it is asked for."""

    def __init__(self, rows: Any, image: str, labels: np.ndarray | None, classes: list[str], decoder: Decoder):
        self.rows, self.image, self.labels, self.classes, self.decoder = rows, image, labels, classes, decoder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.decoder(self.raw(index)), -1 if self.labels is None else int(self.labels[index])

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
            return read(value["path"])
        except (OSError, KeyError, TypeError) as error:
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
    in_chans: int,
    val_fraction: float,
    exif_orientation: bool,
    max_pixels: int,
    cache_dir: str | None,
) -> Source:
    """A data set of `datasets`: a folder of Parquet files or one that it saved, or `hf://NAME` on the Hub.

    `val_split` null holds `val_fraction` of the training split out. No code of a data set is run. Raises
    ValueError where it is not there, or lacks the split or the columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("data.name=hf needs Hugging Face's datasets: pip install datasets.") from error
    if root is None:
        raise ValueError("data.root is not set: give a folder, or hf://NAME for a data set on the Hub.")
    part = val_split if split == "val" and val_split is not None else train_split
    try:
        rows = _loaded(datasets, root, subset, part, cache_dir)
    except Exception as error:  # network, files and formats fail in many ways
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"data.root={root} cannot be opened as a data set, split {part}: {what[0]}") from error
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in rows.column_names:
            raise ValueError(f"data.{key}={column} is not one of its columns: {', '.join(rows.column_names)}.")
    labels, classes = _labels(rows, label_column)
    if isinstance(rows.features[image_column], datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    source = Rows(rows, image_column, labels, classes, Decoder(in_chans, exif_orientation, max_pixels))
    if val_split is not None:
        return source
    return Subset(source, split_indices(labels, len(source), val_fraction, split))


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


def _labels(rows: Any, column: str | None) -> tuple[np.ndarray | None, list[str]]:
    """Labels by number, and their names: the feature's own, or the sorted values."""
    if column is None:
        return None, []
    values = np.asarray(rows.with_format("arrow")[:][column].to_numpy())
    names = getattr(rows.features[column], "names", None)
    if names is not None:
        return values.astype(np.int64), list(names)
    known, labels = np.unique(values, return_inverse=True)
    return labels.astype(np.int64), [str(k) for k in known]
