"""The splits of a data set of Hugging Face `datasets`, and the Parquet files that hold one."""

import posixpath
from dataclasses import dataclass
from typing import Annotated

from mae.data.remote import Remote
from mae.data.settings import Split, StoreSettings
from mae.data.source import Source
from mae.data.store import Local, open_store
from mae.data.subsets import held_out
from mae.errors import UserError

HUB = "hf://"


@dataclass(frozen=True)
class HubSplits:
    """Which rows of a data set of `datasets` are for training and for validation."""

    subset: str | None
    train_split: str
    val_split: str | None
    val_fraction: Annotated[float, "[0, 1]"]

    def name(self, split: Split) -> str:
        return self.val_split if split == "val" and self.val_split is not None else self.train_split

    def of(self, rows: Source, root: str, split: Split) -> Source:
        """The rows of a split, or the held-out rows of the training split. Raises UserError where there are none."""
        if not len(rows):
            raise UserError(f"data.root={root} holds no rows of the split {self.name(split)}.")
        return rows if self.val_split is not None else held_out(rows, self.val_fraction, split)

    def holds(self, file: str, split: str) -> bool:
        """Whether a Parquet file is of a split: `SPLIT/*`, `SPLIT-*` or `SPLIT.parquet`, at any depth.

        `val/train-0.parquet` is of val alone, since a folder goes before what lies in it, as `datasets` reads it."""
        within = f"/{self.subset}/" if self.subset is not None else "/"
        names = {name for name in (self.train_split, self.val_split, split) if name is not None}
        for level in f"/{file}".partition(within)[2].split("/"):
            named = [n for n in names if level == n or level.startswith((f"{n}-", f"{n}.parquet"))]
            if named:
                return max(named, key=len) == split
        return False


def parquet_files(
    root: str, splits: HubSplits, split: str, settings: StoreSettings
) -> tuple[Local | Remote, list[str]]:
    """Where the Parquet files of a split lie, and their names there, sorted: `SPLIT/*`, `SPLIT-*` or `SPLIT.parquet`,
    at any depth, or what a data set on the Hub says. Raises UserError where there are none."""
    if root.startswith(HUB):
        urls = hub_files(root, splits.subset, split)
        top = posixpath.commonpath([posixpath.dirname(url) for url in urls]).replace(":/", "://", 1)
        store, names = open_store(top, settings), sorted(url[len(top) + 1 :] for url in urls)
    else:
        try:
            store = open_store(root, settings)
            names = [name for name in store.names("**/*.parquet") if splits.holds(name, split)]
        except (OSError, NotImplementedError) as error:
            raise UserError(f"data.root={root} cannot be reached: {error}.") from error
    if not names:
        below = f" in a folder {splits.subset} (data.subset)" if splits.subset is not None else ""
        raise UserError(
            f"data.root={root} holds no Parquet files of the split {split}{below}: {split}/* or {split}-*.parquet."
        )
    for name in names:
        store.check(name)
    return store, names


def hub_files(root: str, subset: str | None, split: str) -> list[str]:
    """The URLs of the Parquet files of a data set on the Hub."""
    import datasets

    try:
        files = datasets.load_dataset_builder(root.removeprefix(HUB), subset).config.data_files or {}
        urls = [str(url) for url in files[split]]
    except Exception as error:  # network and formats fail in many ways
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"data.root={root} cannot be opened as a data set, split {split}: {what[0]}") from error
    if strange := [url for url in urls if not url.endswith(".parquet")]:
        raise UserError(f"data.streaming=true needs Parquet files, and data.root={root} has {strange[0]}.")
    return urls
