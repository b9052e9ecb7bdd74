"""Images with a map of classes each, as files: `images/` and `masks/` with equal names, and published data sets."""

import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mae.data.crops import Box, Boxed, inside
from mae.data.decode import Decoder
from mae.data.formats import SUFFIXES
from mae.data.paths import given_root, printable, text_lines
from mae.data.settings import Count, Split
from mae.data.source import IGNORED, BadImage, Decode, Encoded, Source
from mae.data.sources.folder import read
from mae.data.sources.listing import scan
from mae.data.sources.scientific import SUFFIXES as BAND_SUFFIXES
from mae.data.sources.scientific import Bands
from mae.errors import UserError

log = logging.getLogger(__name__)

NO_CLASS = -1  # in a table of values: a value that is neither a class nor ignored
MOST_CLASSES = 255  # maps are of 8 bits, and 255 is `IGNORED`
NAMES = "classes.txt"  # in data.root: the names of the classes, one a line
INDEX_MODES = ("1", "L", "P", "I", "I;16")  # Pillow's, of pictures with one number a pixel


class Segmented(Encoded):
    """Image files with a map file each. `table` (256,) int64 is the class of a map's value, IGNORED or NO_CLASS.

    A value that is no class is a UserError, since it says that the settings are wrong. A file that cannot be read, or a
    map of another size than its image, is a BadImage.
    """

    def __init__(
        self,
        top: Path,
        images: Sequence[Path],
        maps: Sequence[Path],
        classes: list[str],
        table: np.ndarray,
        decoder: Decode,
    ):
        self.top, self.images, self.maps = top, images, maps
        self.root = os.path.realpath(top)
        self.classes, self.table, self.decoder = classes, table, decoder

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(self.images[index].relative_to(self.top))

    def raw(self, index: int) -> bytearray:
        return file_bytes(self.images[index])

    def target(self, index: int) -> Tensor:
        """The map (H, W) uint8 of an image. Raises BadImage, UserError."""
        path = self.maps[index]
        try:
            values = map_values(file_bytes(path))
        except BadImage as error:
            raise BadImage(f"its map {path.relative_to(self.top)}: {error}") from error
        known = self.table[np.minimum(values, 255)]
        if wrong := values[(known == NO_CLASS) | (values > 255)].tolist():
            raise UserError(
                f"the map {path} holds the value {max(wrong)}, which is none of the {len(self.classes)} classes: "
                "correct data.num_classes, or the value that is ignored (data.ignore)."
            )
        return torch.from_numpy(known.astype(np.uint8))

    def region(self, index: int, box: Boxed | None = None) -> tuple[Tensor, Tensor]:
        target = self.target(index)
        if box is None:
            return self.decoder(self.raw(index), None), target
        # compared before both are cropped to one size
        image = self.decoder(self.raw(index), partial(of_size, (target.shape[0], target.shape[1]), box))
        return image, inside(target, box)


def of_size(size: tuple[int, int], box: Boxed, height: int, width: int) -> Box:
    """The box of an image; raises BadImage where the image is of another size than its map."""
    if (height, width) != size:
        raise BadImage(f"its map has {size[0]} x {size[1]} pixels, and the image {height} x {width}")
    return box(height, width)


def file_bytes(path: Path) -> bytearray:
    """A file. Raises BadImage."""
    try:
        return read(str(path))
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from error


def map_values(data: bytearray) -> np.ndarray:
    """A map file's numbers (H, W) int64: a grey picture's values, or a palette picture's indices. Raises BadImage."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode not in INDEX_MODES:
                raise BadImage(f"is a picture of mode {picture.mode}, where one class number a pixel is needed")
            return np.asarray(picture).astype(np.int64)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a known kind") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise BadImage(f"{type(error).__name__}: {error}") from error


# ---------------------------------------------------------------- folders


@dataclass(frozen=True)
class MapSettings:
    """Where images and their maps lie, and what a map's values mean."""

    root: str | None
    images: list[str]  # folders of the training and the validation images under root
    maps: list[str]  # folders of their maps
    image_suffix: str | None  # what a map's name has in place of `map_suffix`; null: any image file's suffix
    map_suffix: str
    ignore: Annotated[int, "[0, 255]"] | None  # the value of pixels that are not counted
    reduce_zero_label: bool  # whether 0 is ignored too, and class k has the value k + 1
    num_classes: Count | None


def segmentation_folder(split: Split, *, files: MapSettings, decoder: Decoder) -> Source:
    """Images and maps in two trees with equal names: `images/train/A/1.jpg` and `masks/train/A/1.png`.

    Maps are PNG (or any picture of one number a pixel; palettes are read as indices). The classes' names stand in
    `root/classes.txt`, one a line; else they are numbers, as many as `data.num_classes` says. Raises UserError where an
    image has no map.
    """
    return paired(split, files, decoder, SUFFIXES)


def segmentation_bands(split: Split, *, files: MapSettings, decoder: Bands) -> Source:
    """`segmentation_folder` for images of any number of channels, as N-band TIFF or `.npy` of Earth observation."""
    return paired(split, files, decoder, BAND_SUFFIXES)


def paired(split: Split, files: MapSettings, decoder: Decode, suffixes: tuple[str, ...]) -> Source:
    """The images of a split with their maps, ordered by name."""
    top = given_root(files.root)
    number = ("train", "val").index(split)
    folders = [top / names[number] for names in (files.images, files.maps)]
    for folder, key in zip(folders, ("images", "maps"), strict=True):
        if not folder.is_dir():
            raise UserError(f"data.root={files.root} has no folder {folder.relative_to(top)} (data.{key}).")
    classes = stated_classes(top, files.num_classes)
    ends = suffixes if files.image_suffix is None else (files.image_suffix,)
    images = by_stem(folders[0], ends, ", or choose by data.image_suffix, as .jpg")
    maps = by_stem(folders[1], (files.map_suffix,))
    if not images:
        raise UserError(f"data.root: no image lies under {folders[0]} (looked for {' '.join(ends[:8])}).")
    if missing := sorted(images.keys() - maps.keys()):
        raise UserError(
            f"{len(missing)} of {len(images)} images have no map: {printable(str(images[missing[0]]))} needs "
            f"{printable(str(folders[1] / missing[0]))}{files.map_suffix}."
        )
    if unused := len(maps) - len(images):
        log.warning("data.root=%s: %d maps of %s belong to no image", files.root, unused, folders[1].relative_to(top))
    order = sorted(images)
    table = value_table(len(classes), files.ignore, files.reduce_zero_label)
    return Segmented(top, [images[name] for name in order], [maps[name] for name in order], classes, table, decoder)


def tree_files(folder: Path, ends: tuple[str, ...]) -> list[Path]:
    """The files under a folder whose names end so, without hidden ones, sorted; links are followed.

    Raises UserError for a folder that cannot be read."""
    listing, _ = scan(folder, None, follow_links=True, suffixes=tuple(end.lower() for end in ends))
    return sorted(Path(listing.path(index)) for index in range(len(listing)))


def by_stem(folder: Path, ends: tuple[str, ...], otherwise: str = "") -> dict[str, Path]:
    """The files under a folder by what an image and its map have in common. Raises UserError where two have the same,
    with what else to do about it."""
    paths: dict[str, Path] = {}
    for path in tree_files(folder, ends):
        other = paths.setdefault(stem(path, folder, ends), path)
        if other is not path:
            raise UserError(
                f"data.root: {printable(str(other))} and {printable(path.name)} have one name but for their endings, "
                f"by which images and maps are paired. Remove one{otherwise}."
            )
    return paths


def stem(path: Path, folder: Path, ends: tuple[str, ...]) -> str:
    """The relative path without its ending: what an image and its map have in common."""
    name = str(path.relative_to(folder))
    return name[: -max(len(end) for end in ends if name.lower().endswith(end.lower()))]


def stated_classes(top: Path, num_classes: int | None) -> list[str]:
    """The names in `classes.txt`, or numbers. Raises UserError where nothing says how many classes there are."""
    file = top / NAMES
    lines = text_lines(file, str(file)) if file.is_file() else []
    names = [line.strip() for line in lines if line.strip()]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{file} names the class {twice[0]} twice: each line must be another class.")
    if not names and num_classes is None:
        raise UserError(
            f"data.num_classes is not set, and data.root={top} has no {NAMES} with the classes' names, one a line: "
            "give one of them."
        )
    if names and num_classes not in (None, len(names)):
        raise UserError(f"data.num_classes={num_classes}, but {file} names {len(names)} classes: correct one of them.")
    names = names or [str(number) for number in range(num_classes or 0)]
    if len(names) > MOST_CLASSES:
        raise UserError(f"data.num_classes={len(names)}: maps of 8 bits hold {MOST_CLASSES} classes at most.")
    return names


def value_table(classes: int, ignore: int | None, reduce_zero_label: bool) -> np.ndarray:
    """The class of each value of a map (256,) int64: IGNORED for ignored ones, NO_CLASS for others."""
    table = np.full(256, NO_CLASS, np.int64)
    first = int(reduce_zero_label)
    table[first : first + classes] = np.arange(classes)[: 256 - first]
    if reduce_zero_label:
        table[0] = IGNORED
    if ignore is not None:
        table[ignore] = IGNORED
    return table
