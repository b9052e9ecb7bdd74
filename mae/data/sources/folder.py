"""Any tree of images: labelled by sub-folder, or flat or nested and unlabelled."""

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from torch import Tensor

from mae.data.decode import Decoder
from mae.data.formats import COMMON, SUFFIXES
from mae.data.paths import folders_and_files, given_root, printable
from mae.data.source import BadImage, Encoded, Source
from mae.data.sources.listing import Listing, cached_scan
from mae.data.splits import TRAINING, Choice, Splits, in_words, splits_of, stays
from mae.data.subsets import Subset, held_out

log = logging.getLogger(__name__)

SPELLINGS = {"train": TRAINING, "val": ("validation", "valid")}  # of data.parts; a folder `test` has no labels there


class Files(Encoded):
    """The image files of a listing."""

    def __init__(self, listing: Listing, decoder: Callable[..., Tensor]):
        self.listing, self.decoder = listing, decoder
        self.classes = [os.fsencode(name).decode(errors="backslashreplace") for name in listing.classes]
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
    in_chans: Annotated[int, "[1, inf)"],
    val_fraction: Annotated[float, "[0, 1]"],
    exif_orientation: bool,
    max_pixels: Annotated[int, "[1, inf)"],
    follow_links: bool,
    cache_dir: str | None,
    splits: Literal["auto", "off"] | list[str],
) -> Source:
    """Images under `root`, at any depth.

    `root/train` and `root/val` are the splits where they are there (see `mae.data.splits`); else `val_fraction`
    of the images is held out, always the same ones. The first-level folders are the classes where no image lies beside
    them.
    Raises ValueError, naming `data.root`, for a folder that is missing, empty, unreadable or too small, or that can be
    read in two ways.
    """
    return tree(
        split,
        root,
        Decoder(in_chans, exif_orientation, max_pixels),
        val_fraction,
        follow_links,
        cache_dir,
        SUFFIXES,
        splits,
    )


def tree(
    split: str,
    root: str | None,
    decoder: Callable[..., Tensor],
    val_fraction: float,
    follow_links: bool,
    cache_dir: str | None,
    suffixes: tuple[str, ...],
    splits: Choice,
) -> Source:
    """`image_folder` for files of any kind, by their suffixes and what decodes them."""
    top = given_root(root)
    parts = splits_of(top, suffixes, splits, follow_links)
    train = top if parts.train is None else top / parts.train
    classes = first_level(train, suffixes)
    place = top / parts.val if parts.val is not None and split == "val" else train
    otherwise = f" Type data.splits=off where {in_words(parts.names)} are classes."
    listing = listed(place, classes, follow_links, cache_dir, suffixes, otherwise=otherwise)
    files = Files(listing, decoder)
    if parts.train is not None:
        log_split(top, "train" if place == train else "val", parts, files)
    return files if parts.val is not None else held_out(files, val_fraction, split)


def log_split(top: Path, split: str, parts: Splits, files: Files) -> None:
    """Says which folder was recognised as a split, and what it holds."""
    role = "training" if split == "train" else "validation"
    if parts.val is None:
        role += " images, of which data.val_fraction is held out"
    unused = f", {in_words(parts.unused)} left out" if parts.unused and split == "val" else ""
    name = printable(str(parts.train if split == "train" else parts.val))
    count = len(np.unique(files.labels[files.labels >= 0])) if files.labels is not None else 0
    log.info("data.root=%s: %s is for %s: %d images, %d classes%s", top, name, role, len(files), count, unused)


def classes_of(
    split: Literal["train", "val"],
    *,
    root: str | None,
    in_chans: Annotated[int, "[1, inf)"],
    exif_orientation: bool,
    max_pixels: Annotated[int, "[1, inf)"],
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
    first, val = (top / spelt(top, name) for name in parts[:2])
    place = val if split == "val" else first
    if place.is_dir() and not first.is_dir():  # there to evaluate on
        first = place
    for part in (first, place):
        if not part.is_dir():
            raise ValueError(
                f"data.root={root} has no folder {part.name}: it must hold {' and '.join(parts)} (data.parts)."
            )
        stays(top, part, follow_links)
    names = first_level(first)
    if names is None:
        raise ValueError(f"{first} holds no folders of classes: is data.root={root} the right one?")
    if classes is not None:
        try:
            if Path(classes).expanduser().exists() and not Path(classes).expanduser().is_file():
                raise ValueError(f"data.classes={classes} is not a regular file.")
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


def spelt(top: Path, name: str) -> str:
    """The folder of `top` that `data.parts` calls `name`, perhaps in other letters: `Train` or `training` for `train`.

    Raises ValueError where there are several."""
    if (top / name).is_dir():
        return name
    folders = folders_and_files(top, ())[0]
    found = [folder for folder in folders if folder.lower() == name.lower()]
    if not found and name in SPELLINGS:
        found = [folder for folder in folders if folder.lower() in SPELLINGS[name]]
    if len(found) > 1:
        raise ValueError(f"data.root={top} holds {in_words(found)}: name the folders to take in data.parts.")
    if found:
        log.info("data.root=%s: the folder %s is taken for %s (data.parts)", top, printable(found[0]), name)
    return found[0] if found else name


def listed(
    path: Path,
    classes: list[str] | None,
    follow_links: bool,
    cache_dir: str | None,
    suffixes: tuple[str, ...],
    strangers: bool = False,
    otherwise: str = "",
) -> Listing:
    """The images under `path`. Raises ValueError where there are none or, unless `strangers` may be there,
    where a class is not one of those to train on, with what to do `otherwise`."""
    if classes is not None and not strangers:
        unknown = set(first_level(path, suffixes) or []) - set(classes)
        if unknown:
            name = printable(min(unknown))
            raise ValueError(f"{path} has a class that the training images lack: {name} (data.root).{otherwise}")
    listing = cached_scan(path, classes, follow_links, cache_dir, suffixes)
    if not len(listing):
        hint = f" {listing.outside} links lead out of it: data.follow_links=true takes them." if listing.outside else ""
        others = f" and {len(set(suffixes) - {*COMMON})} others" if len(suffixes) > len(COMMON) else ""
        shown = " ".join(COMMON if others else suffixes)
        raise ValueError(f"data.root: no image lies under {printable(str(path))} (looked for {shown}{others}).{hint}")
    return listing


def first_level(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[str] | None:
    """The class names: sorted sub-folders; None where images lie beside them or there is but one folder."""
    names, files = folders_and_files(path, suffixes)
    return names if len(names) > 1 and not files else None
