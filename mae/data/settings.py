"""Settings of a `data` group: the data set, its files, and how they are loaded. The schema reads these fields."""

from dataclasses import dataclass
from typing import Annotated, Literal

Count = Annotated[int, "[1, inf)"]
Split = Literal["train", "val"]
Choice = Literal["auto", "off"] | list[str]  # data.splits


@dataclass(frozen=True)
class DataInfo:
    """What the rest of the program reads of a data set."""

    root: str | None  # null for embedded data
    img_size: Count | list[Count]  # what the model takes, unless model.img_size says otherwise
    in_chans: Count
    num_classes: Count | None  # null: as many as the images have
    mean: list[float]  # of the training images in [0, 1], one value or one a channel
    std: list[Annotated[float, "(0, inf)"]]
    min_crop: Annotated[float, "[0, 1]"]  # least fraction of an image that still shows what it is of
    hflip: bool  # whether a mirrored image is still one of its class
    crop_fraction: Annotated[float, "(0, 1]"] | None  # of an image's side in evaluation; null: the reference's rule
    train_images: Count | None  # for dry_run where the data are not at hand; null: they are counted


@dataclass(frozen=True)
class FileSettings:
    """Where image files lie."""

    root: str | None
    follow_links: bool
    cache_dir: str | None


@dataclass(frozen=True)
class TreeSettings(FileSettings):
    """A tree of image files, and which folders are its splits."""

    val_fraction: Annotated[float, "[0, 1]"]
    splits: Choice


@dataclass(frozen=True)
class StoreSettings(FileSettings):
    """Large files in a folder or at a URL."""

    cache_gb: Annotated[float, "(0, inf)"]
    retry_s: Annotated[float, "[0, inf)"]


@dataclass(frozen=True)
class LoaderSettings:
    """How images are read and batches made."""

    num_workers: Annotated[int, "[0, inf)"] | None
    workers: Literal["auto", "thread", "process"]
    prefetch: Count
    timeout_s: Annotated[float, "(0, inf)"]
    max_bad_fraction: Annotated[float, "[0, 1]"]
    fraction: Annotated[float, "(0, 1]"]  # this and what follows are for training alone
    per_class: Count | None
    repeats: Count
    decode_device: Literal["cpu", "cuda"]
