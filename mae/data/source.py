"""What a source of images is, and the plain ones: tensors in memory and encoded files."""

import hashlib
import json
from collections.abc import Callable
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from mae.data.crops import Boxed, inside
from mae.errors import UserError

UNLABELLED = -1
NAMED_AT_ONCE = 65_536  # images whose names are held in memory together
IGNORED = 255  # in a map of classes: a pixel that neither the loss nor a figure counts
Decode = Callable[[bytearray, Boxed | None], Tensor]  # an image file to an image, or to what lies inside a box of it
Target = int | Tensor  # see `Source`


class BadImage(ValueError):
    """One image that cannot be used; the loader counts it and takes another instead."""


# What makes one image bad: its file, or an operation on it for which there is no memory
FAILURES = (BadImage, OSError, MemoryError, RuntimeError)


def reason(error: Exception) -> str:
    """Why an image cannot be used."""
    message = str(error).split("\n")[0]
    if isinstance(error, MemoryError) or "allocate" in message:  # the second is torch's
        return "it takes more memory than there is"
    return message if isinstance(error, BadImage | OSError) else f"{type(error).__name__}: {message}"


class Source:
    """Images by number, each with its target. A source defines `__len__`, `__getitem__` and `name`.

    An image is (C, H, W): uint8, or uint16 or float32 for scientific data. A target is the number of a class (-1: none)
    or a tensor: a vector (K,), or a map (..., H, W) with a value for each pixel of the image. The targets of a source
    are of one kind, and its tensors of one type. Batches hold them as `label`.

    The loader reads a source from several threads or processes at once.
    """

    classes: list[str]  # names of the classes; empty where the images have none
    labels: np.ndarray | None = None  # (N,) int64, the class of each image; None where targets are no classes
    subset: list[int] | None = None  # the classes among which an evaluation decides; None: all
    decoder: Decode | None = None  # of the images' files; None where images lie in memory
    root: str | None = None  # the folder, without links, or the URL that holds the images; None where there is none

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """An image and its target. Raises BadImage or OSError where that one image cannot be read."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What a list of bad files or of predictions calls an image, such as its path."""
        raise NotImplementedError

    def identities(self, indices: np.ndarray) -> bytes:
        """What tells these images from others without a look at their files, wherever the data set lies.

        By default their names. A source of many images overrides it where it can tell them faster, or without names."""
        return b"".join(self.name(index).encode(errors="surrogatepass") + b"\n" for index in indices.tolist())

    def region(self, index: int, box: Boxed) -> tuple[Tensor, Target]:
        """`source[index]`, cropped to a box that is a function of the image's height and width.

        Called for augmentations that crop first. A source overrides it where it can decode the region alone, to the
        same pixels; a map must be cropped to the same box."""
        image, target = self[index]
        return inside(image, box), crop_target(target, box)

    def raw(self, index: int) -> bytearray | None:
        """An image's encoded file; None where there is no file, as for images in memory. Raises BadImage."""
        del index
        return None

    def encoded(self, index: int) -> tuple[bytearray, Target] | None:
        """`raw` and the image's target; None where there is no file, or where the target is a map, which is cropped
        with the image. Raises BadImage or OSError."""
        del index
        return None

    def order(self, seed: int, epoch: int, mask: np.ndarray | None = None) -> np.ndarray | None:
        """The order in which an epoch reads the images for which `mask` (N,) is true, or all.

        Called once an epoch on every rank, in which all must get the same. None, the default, leaves it to the sampler,
        which shuffles. A source whose images lie in large files overrides it to read one file after another."""
        del seed, epoch, mask
        return None

    def prefetch(self, seed: int, epoch: int, indices: np.ndarray) -> None:
        """Called before the images of a micro-batch are read. A source at a URL starts to fetch what `order` reads
        after them, and returns at once."""
        del seed, epoch, indices


def is_map(target: Target) -> TypeGuard[Tensor]:
    """Whether a target has a value for each pixel."""
    return isinstance(target, Tensor) and target.ndim > 1


def has_class_maps(source: Source) -> bool:
    """Whether each image of a source has a map of classes, as its first readable one does."""
    if source.labels is not None or not source.classes:
        return False
    for index in range(len(source)):
        try:
            return is_map(source[index][1])
        except (BadImage, OSError):
            continue
    return False


def crop_target(target: Target, box: Boxed | None) -> Target:
    """A target of what lies inside a box of its image: a map is cropped, all else stays."""
    return inside(target, box) if box is not None and is_map(target) else target


class Encoded(Source):
    """A source whose images are files, or their bytes, until they are read.

    `decoder(data, box)` gives an image, or with a box only what lies inside it. Raises BadImage."""

    decoder: Decode  # type: ignore[assignment]  # there is one

    def raw(self, index: int) -> bytearray:
        raise NotImplementedError

    def encoded(self, index: int) -> tuple[bytearray, Target] | None:
        target = self.target(index)
        return None if is_map(target) else (self.raw(index), target)

    def target(self, index: int) -> Target:
        """The target of an image. A source with other targets than classes overrides it."""
        return UNLABELLED if self.labels is None else int(self.labels[index])

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self.region(index)

    def region(self, index: int, box: Boxed | None = None) -> tuple[Tensor, Target]:
        return self.decoder(self.raw(index), box), crop_target(self.target(index), box)


class Arrays(Source):
    """Images that fit in memory."""

    def __init__(self, images: Tensor, labels: np.ndarray | None, classes: list[str], label: str):
        self.images, self.classes, self.label = images, classes, label  # (N, C, H, W)
        self.labels = None if labels is None else np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self.images[index], UNLABELLED if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.label}/{index}"


def fingerprint(source: Source) -> str:
    """Count, labels, and names of classes and images: the same for the same listing, wherever it lies.

    It begins with what earlier versions recorded, count and labels alone."""
    labels = b"" if source.labels is None else np.ascontiguousarray(source.labels, np.int64).tobytes()
    names = hashlib.sha256(json.dumps(source.classes).encode())
    for start in range(0, len(source), NAMED_AT_ONCE):
        names.update(source.identities(np.arange(start, min(start + NAMED_AT_ONCE, len(source)))))
    digests = hashlib.sha256(labels).hexdigest()[:12], names.hexdigest()[:12]
    return f"{len(source)} images, {', '.join(digests)}"


def replicate(images: Tensor, in_chans: int, name: str) -> Tensor:
    """Grey images (..., 1, H, W) on `in_chans` equal channels, RGB as it is; else raises UserError."""
    if images.shape[-3] == in_chans:
        return images
    if images.shape[-3] == 1:
        return torch.repeat_interleave(images, in_chans, dim=-3)
    raise UserError(f"data.in_chans={in_chans}, but the images of {name} have {images.shape[-3]} channels.")
