"""Data: sources of images (one YAML and one function each), decoding, resumable sampling, loading."""

from typing import Annotated, NamedTuple

from mae.data.shards.source import tar_shards
from mae.data.sources.folder import classes_of, image_folder
from mae.data.sources.huggingface import hf
from mae.data.sources.robustness import robustness
from mae.data.sources.scientific import scientific_folder
from mae.data.sources.table import table
from mae.data.sources.torchvision import cifar10, cifar100, digits, fashion_mnist, stl10

SOURCES = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "stl10": stl10,
    "fashion_mnist": fashion_mnist,
    "folder": image_folder,
    "cifar10_folder": image_folder,
    "imagenet": classes_of,
    "imagenet_100": classes_of,
    "inat": classes_of,
    "places": classes_of,
    "table": table,
    "hf": hf,
    "imagenet_a": robustness,
    "imagenet_c": robustness,
    "imagenet_r": robustness,
    "imagenet_sketch": robustness,
    "imagenet_v2": robustness,
    "scientific": scientific_folder,
    "shards": tar_shards,
}


class Description(NamedTuple):
    """What the rest of the program must know of a data set."""

    root: str | None  # where it lies; null for embedded data
    img_size: int | list[int]  # what the model takes, unless model.img_size says otherwise
    in_chans: int
    num_classes: int | None  # null: as many as are found
    mean: list[float]  # of the training images in [0, 1], one value or one a channel
    std: list[float]
    min_crop: float  # least part of an image that still shows what it is of
    hflip: bool  # whether a mirrored image is still one of its class
    crop_fraction: float | None  # part of the image that evaluation keeps; null: the reference's rule
    train_images: int | None  # for dry_run where the data is not at hand; null: it is looked at


def describe(
    *,
    root: str | None,
    img_size: Annotated[int, "[1, inf)"] | list[Annotated[int, "[1, inf)"]],
    in_chans: Annotated[int, "[1, inf)"],
    num_classes: Annotated[int, "[1, inf)"] | None,
    mean: list[float],
    std: list[Annotated[float, "(0, inf)"]],
    min_crop: Annotated[float, "[0, 1]"],
    hflip: bool,
    crop_fraction: Annotated[float, "(0, 1]"] | None,
    train_images: Annotated[int, "[1, inf)"] | None,
) -> Description:
    """The facts of a data set, as its YAML states them."""
    return Description(root, img_size, in_chans, num_classes, mean, std, min_crop, hflip, crop_fraction, train_images)
