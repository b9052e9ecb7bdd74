"""Data: sources of images (one YAML and one function each), decoding, resumable sampling, loading."""

from typing import NamedTuple

from mae.data.folder import folder
from mae.data.known import cifar10, digits

SOURCES = {
    "digits": digits,
    "cifar10": cifar10,
    "folder": folder,
}


class Description(NamedTuple):
    """What the rest of the program must know of a data set."""

    root: str | None  # where it lies; null for embedded data
    img_size: int | list[int]  # what the model takes, unless model.img_size says otherwise
    in_chans: int
    num_classes: int | None  # null: as many as are found
    mean: list[float]  # of the training images in [0, 1], one value or one a channel
    std: list[float]
    hflip: bool  # whether a mirrored image is still one of its class
    crop_fraction: float | None  # part of the image that evaluation keeps; null: the reference's rule


def describe(
    *,
    root: str | None,
    img_size: int | list[int],
    in_chans: int,
    num_classes: int | None,
    mean: list[float],
    std: list[float],
    hflip: bool,
    crop_fraction: float | None,
) -> Description:
    """The facts of a data set, as its YAML states them."""
    return Description(root, img_size, in_chans, num_classes, mean, std, hflip, crop_fraction)
