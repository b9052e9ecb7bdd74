"""Any tree of images: labelled by sub-folder, or flat or nested and unlabelled."""

import logging
import os
import stat
from pathlib import Path

import numpy as np

from mae.data.decode import Decoder
from mae.data.flat import gathered
from mae.data.formats import COMMON, SUFFIXES
from mae.data.paths import folders_and_files, given_root, printable, text_lines
from mae.data.settings import FileSettings, Split, TreeSettings
from mae.data.source import BadImage, Decode, Encoded, Source
from mae.data.sources.listing import Listing, cached_scan
from mae.data.splits import TRAINING, Splits, in_words, splits_of, stays
from mae.data.subsets import Subset, held_out
from mae.errors import UserError

log = logging.getLogger(__name__)

SPELLINGS = {"train": TRAINING, "val": ("validation", "valid")}  # of data.parts; a folder `test` has no labels there


class Files(Encoded):
    """The image files of a listing."""

    def __init__(self, listing: Listing, decoder: Decode):
        self.listing, self.decoder = listing, decoder
        self.classes = [os.fsencode(name).decode(errors="backslashreplace") for name in listing.classes]
        self.labels = np.asarray(listing.labels, np.int64) if listing.classes else None
        self.most_bytes = decoder.most_bytes if isinstance(decoder, Decoder) else None
        self.root = os.path.realpath(listing.root)

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

    def identities(self, indices: np.ndarray) -> bytes:
        return gathered(self.listing.text, self.listing.ends[indices], self.listing.ends[indices + 1])


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


def image_folder(split: Split, *, files: TreeSettings, decoder: Decoder) -> Source:
    """Images under `root`, at any depth.

    `root/train` and `root/val` are the splits where they are there (see `mae.data.splits`). Else `val_fraction` of the
    images is held out, always the same ones. The first-level folders are the classes where no image lies beside them.
    Raises UserError, naming `data.root`, for a folder that is missing, empty, unreadable or too small, or that can be
    read in two ways.
    """
    return tree(split, files, decoder, SUFFIXES)


def tree(split: Split, settings: TreeSettings, decoder: Decode, suffixes: tuple[str, ...]) -> Source:
    """`image_folder` for files of any kind, by their suffixes and what decodes them."""
    top = given_root(settings.root)
    splits = splits_of(top, suffixes, settings.splits, settings.follow_links)
    train = top if splits.train is None else top / splits.train
    classes = first_level(train, suffixes)
    folder = top / splits.val if splits.val is not None and split == "val" else train
    otherwise = f" Type data.splits=off where {in_words(splits.names)} are classes."
    if classes is not None:
        refuse_unknown(folder, classes, suffixes, otherwise)
    elif split == "train":
        log_stray_images(train, suffixes)
    files = Files(listed(folder, classes, settings, suffixes), decoder)
    if splits.train is not None:
        log_split(top, "train" if folder == train else "val", splits, files)
    return files if splits.val is not None else held_out(files, settings.val_fraction, split)


def log_stray_images(folder: Path, suffixes: tuple[str, ...]) -> None:
    """Logs that folders are no classes because images lie beside them: one stray image suffices."""
    names, images = folders_and_files(folder, suffixes)
    if len(names) > 1 and images:
        others = f" and {len(images) - 1} more" if len(images) > 1 else ""
        log.info(
            "data.root=%s: images have no labels, since %s%s beside the %d folders. Move what lies there for folders "
            "to be classes.",
            *(printable(str(folder)), printable(min(images)), f"{others} lie" if others else " lies", len(names)),
        )


def log_split(top: Path, split: str, splits: Splits, files: Files) -> None:
    """Logs which folder was recognised as a split, and what it holds."""
    role = "training" if split == "train" else "validation"
    if splits.val is None:
        role += " images, of which data.val_fraction is held out"
    unused = f", {in_words(splits.unused)} left out" if splits.unused and split == "val" else ""
    name = printable(str(splits.train if split == "train" else splits.val))
    count = len(np.unique(files.labels[files.labels >= 0])) if files.labels is not None else 0
    log.info("data.root=%s: %s is for %s: %d images, %d classes%s", top, name, role, len(files), count, unused)


def classes_of(split: Split, *, files: FileSettings, parts: list[str], classes: str | None, decoder: Decoder) -> Source:
    """A published data set in folders of classes: `parts` are those of training and validation under `root`.

    `classes` is a text file that names, one a line, the classes to take (as ImageNet-100 does), or null for
    all. Where the validation images are there alone, their folders are the classes. Raises UserError where a part or
    a class is missing.
    """
    top = given_root(files.root)
    train, val = (top / spelt(top, name) for name in parts[:2])
    folder = val if split == "val" else train
    if folder.is_dir() and not train.is_dir():  # there to evaluate on
        train = folder
    for path in (train, folder):
        if not path.is_dir():
            raise UserError(
                f"data.root={files.root} has no folder {path.name}: it must hold {' and '.join(parts)} (data.parts)."
            )
        stays(top, path, files.follow_links)
    names = first_level(train)
    if names is None:
        raise UserError(f"{train} holds no folders of classes: is data.root={files.root} the right one?")
    if classes is None:
        refuse_unknown(folder, names, SUFFIXES)
        return Files(listed(folder, names, files, SUFFIXES), decoder)
    wanted = listed_classes(classes)
    if missing := sorted(set(wanted) - set(names)):
        raise UserError(f"data.classes={classes} names {missing[0]}, which is no class of {train}.")
    listing = listed(folder, wanted, files, SUFFIXES)
    chosen = np.flatnonzero(listing.labels >= 0)
    if not len(chosen):
        raise UserError(f"data.classes={classes}: no image of these classes lies under {folder}.")
    return Subset(Files(listing, decoder), chosen)


def listed_classes(path: str) -> list[str]:
    """The classes that the text file `data.classes` names, sorted. Raises UserError."""
    lines = text_lines(Path(path).expanduser(), f"data.classes={path}")
    names = sorted({name for line in lines for name in line.split()})
    if not names:
        raise UserError(f"data.classes={path} is empty.")
    return names


def spelt(top: Path, name: str) -> str:
    """The folder of `top` that `data.parts` calls `name`, perhaps in other letters: `Train` or `training` for `train`.

    Raises UserError where there are several."""
    if (top / name).is_dir():
        return name
    folders = folders_and_files(top, ())[0]
    same = [folder for folder in folders if folder.lower() == name.lower()]
    if not same and name in SPELLINGS:
        same = [folder for folder in folders if folder.lower() in SPELLINGS[name]]
    if len(same) > 1:
        raise UserError(f"data.root={top} holds {in_words(same)}: name the folders to take in data.parts.")
    if same:
        log.info("data.root=%s: the folder %s is taken for %s (data.parts)", top, printable(same[0]), name)
    return same[0] if same else name


def refuse_unknown(path: Path, classes: list[str], suffixes: tuple[str, ...], otherwise: str = "") -> None:
    """Raises UserError where a folder has a class that is not one of `classes`, with what to do `otherwise`."""
    if unknown := set(first_level(path, suffixes) or []) - set(classes):
        name = printable(min(unknown))
        raise UserError(f"{path} has a class that the training images lack: {name} (data.root).{otherwise}")


def listed(path: Path, classes: list[str] | None, settings: FileSettings, suffixes: tuple[str, ...]) -> Listing:
    """The images under `path`. Raises UserError where there are none."""
    listing = cached_scan(path, classes, settings.follow_links, settings.cache_dir, suffixes)
    if not len(listing):
        hint = f" {listing.outside} links lead out of it: data.follow_links=true takes them." if listing.outside else ""
        others = f" and {len(set(suffixes) - {*COMMON})} others" if len(suffixes) > len(COMMON) else ""
        names = " ".join(COMMON if others else suffixes)
        raise UserError(f"data.root: no image lies under {printable(str(path))} (looked for {names}{others}).{hint}")
    return listing


def first_level(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[str] | None:
    """The class names: sorted sub-folders; None where images lie beside them or there is but one folder."""
    names, files = folders_and_files(path, suffixes)
    return names if len(names) > 1 and not files else None
