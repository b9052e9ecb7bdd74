"""Any tree of images: labelled by sub-folder, or flat or nested and unlabelled."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from mae.data.decode import Decoder
from mae.data.known import given_root
from mae.data.listing import SUFFIXES, Listing, cached_scan
from mae.data.source import BadImage, Encoded, Source, Subset, split_indices

VAL_NAMES = ("val", "validation", "valid", "test")


class Files(Encoded):
    """The image files of a listing."""

    def __init__(self, listing: Listing, decoder: Callable[..., Tensor]):
        self.listing, self.decoder, self.classes = listing, decoder, listing.classes
        self.labels = np.asarray(listing.labels, np.int64) if listing.classes else None
        self.most_bytes = decoder.most_bytes if isinstance(decoder, Decoder) else None

    def __len__(self) -> int:
        return len(self.listing)

    def raw(self, index: int) -> bytearray:
        """An image's file. Raises BadImage."""
        try:
            return read(self.listing.path(index), self.most_bytes)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error

    def name(self, index: int) -> str:
        return self.listing.name(index)


def read(path: str, most: int | None = None) -> bytearray:
    """A file's bytes, writable so that torch can look at them without a copy. Raises OSError, BadImage for more than
    `most`."""
    with open(path, "rb", buffering=0, opener=_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("is not a regular file")
        if most is not None and status.st_size > most:
            raise BadImage(f"{status.st_size} bytes are more than an image of data.max_pixels takes")
        data = bytearray(status.st_size)
        count = file.readinto(data)
    assert count is not None
    return data if count == len(data) else data[:count]


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would be waited for


def image_folder(
    split: Literal["train", "val"],
    *,
    root: str | None,
    in_chans: int,
    val_fraction: float,
    exif_orientation: bool,
    max_pixels: int,
    follow_links: bool,
    cache_dir: str | None,
) -> Source:
    """Images under `root`, at any depth.

    `root/train` and `root/val` are the two parts where both are there; else `val_fraction` of the images is
    held out, always the same ones. The first-level folders are the classes where no image lies beside them.
    Raises ValueError, naming `data.root`, for a folder that is missing, empty, unreadable or too small.
    """
    return tree(
        split,
        root,
        Decoder(in_chans, exif_orientation, max_pixels),
        val_fraction,
        follow_links,
        cache_dir,
        SUFFIXES,
    )


def tree(
    split: str,
    root: str | None,
    decoder: Callable[..., Tensor],
    val_fraction: float,
    follow_links: bool,
    cache_dir: str | None,
    suffixes: tuple[str, ...],
) -> Source:
    """`image_folder` for files of any kind, by their suffixes and what decodes them."""
    top = given_root(root)
    train = top / "train" if (top / "train").is_dir() else top
    classes = first_level(train, suffixes)
    val = next((top / name for name in VAL_NAMES if train != top and (top / name).is_dir()), None)
    if val is not None:
        place = train if split == "train" else val
        return Files(listed(place, classes, follow_links, cache_dir, suffixes), decoder)
    files = Files(listed(train, classes, follow_links, cache_dir, suffixes), decoder)
    return held_out(files, val_fraction, split)


def classes_of(
    split: Literal["train", "val"],
    *,
    root: str | None,
    in_chans: int,
    exif_orientation: bool,
    max_pixels: int,
    follow_links: bool,
    cache_dir: str | None,
    parts: list[str],
    classes: str | None,
) -> Source:
    """A published data set in folders of classes: `parts` are those of training and validation under `root`.

    `classes` is a text file that names, one a line, the classes to take (as ImageNet-100 does), or null for
    all. Where the validation images are there alone, their folders are the classes. Raises ValueError where a part or
    a class is missing.
    """
    top = given_root(root)
    place, first = top / parts[split == "val"], top / parts[0]
    if place.is_dir() and not first.is_dir():  # there to evaluate on
        first = place
    for part in (first, place):
        if not part.is_dir():
            raise ValueError(
                f"data.root={root} has no folder {part.name}: it must hold {' and '.join(parts)} (data.parts)."
            )
    names = first_level(first)
    if names is None:
        raise ValueError(f"{first} holds no folders of classes: is data.root={root} the right one?")
    if classes is not None:
        try:
            wanted = Path(classes).expanduser().read_text().split()
        except OSError as error:
            raise ValueError(f"data.classes={classes} cannot be read: {error.strerror}.") from error
        missing = sorted(set(wanted) - set(names))
        if missing or not wanted:
            what = f"names {missing[0]}, which is no class of {first}" if missing else "is empty"
            raise ValueError(f"data.classes={classes} {what}.")
        names = sorted(set(wanted))
    listing = listed(place, names, follow_links, cache_dir, SUFFIXES, strangers=classes is not None)
    files = Files(listing, Decoder(in_chans, exif_orientation, max_pixels))
    return files if classes is None else Subset(files, np.flatnonzero(listing.labels >= 0))


def listed(
    path: Path,
    classes: list[str] | None,
    follow_links: bool,
    cache_dir: str | None,
    suffixes: tuple[str, ...],
    strangers: bool = False,
) -> Listing:
    """The images under `path`. Raises ValueError where there are none or, unless `strangers` may be there,
    where a class is not one of those to train on."""
    if classes is not None and not strangers:
        unknown = set(first_level(path, suffixes) or []) - set(classes)
        if unknown:
            raise ValueError(f"{path} has a class that the training images lack: {sorted(unknown)[0]} (data.root).")
    listing = cached_scan(path, classes, follow_links, cache_dir, suffixes)
    if not len(listing):
        raise ValueError(f"data.root: no image lies under {path} (looked for {' '.join(suffixes)}).")
    return listing


def held_out(source: Source, fraction: float, split: str) -> Source:
    """The training or validation part of a source that has none of its own."""
    if len(source) < 2 and fraction < 1:
        raise ValueError("data.root holds one image only: two are needed, to train and to validate.")
    return Subset(source, split_indices(source.labels, len(source), fraction, split))


def first_level(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[str] | None:
    """The class names: sorted sub-folders; None where images lie beside them or there is but one folder."""
    names = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    names.append(entry.name)
                elif entry.name.lower().endswith(suffixes):
                    return None
    except OSError as error:
        raise ValueError(f"data.root: the folder {path} cannot be read: {error.strerror}.") from error
    return sorted(names) if len(names) > 1 else None
