"""What a source of images is, and the plain ones: tensors in memory, encoded files, a part of another source."""

import hashlib
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mae.data.crops import Boxed, inside

UNLABELLED = -1


class BadImage(ValueError):
    """One image that cannot be used; the loader counts it and takes another in its place."""


# What makes one image bad: its file, or an operation on it for which there is no memory
FAILURES = (BadImage, OSError, MemoryError, RuntimeError)


def reason(error: Exception) -> str:
    """Why an image cannot be used."""
    words = str(error).split("\n")[0]
    if isinstance(error, MemoryError) or "allocate" in words:  # the second is torch's
        return "it takes more memory than there is"
    return words if isinstance(error, BadImage | OSError) else f"{type(error).__name__}: {words}"


class Source(Protocol):
    """Images by number. `source[i]` is (image (C, H, W), label or -1); the image is uint8, or uint16 or
    float32 for scientific data. Raises BadImage or OSError where that one image cannot be read."""

    classes: list[str]  # empty where unlabelled
    labels: np.ndarray | None  # (N,) int64, or None where unlabelled

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...
    def name(self, index: int) -> str: ...


def part(source: Source, index: int, box: Boxed) -> tuple[Tensor, int]:
    """`source[index]`, but of the image the part inside `box`, decoded alone where the source can do that."""
    if hasattr(source, "part"):
        return source.part(index, box)  # type: ignore[attr-defined]
    image, label = source[index]
    return inside(image, box), label


class Encoded:
    """What sources share whose images are files, or their bytes, until they are asked for.

    `decoder(data, box)` gives the part inside the box, or without one the whole. Raises BadImage."""

    decoder: Callable[..., Tensor]
    labels: np.ndarray | None

    def raw(self, index: int) -> bytearray:
        """An image's file. Raises BadImage."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.part(index)

    def part(self, index: int, box: Boxed | None = None) -> tuple[Tensor, int]:
        return self.decoder(self.raw(index), box), UNLABELLED if self.labels is None else int(self.labels[index])


class Arrays:
    """Images that fit in memory."""

    def __init__(self, images: Tensor, labels: np.ndarray | None, classes: list[str], label: str):
        self.images, self.classes, self.label = images, classes, label  # (N, C, H, W)
        self.labels = None if labels is None else np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], UNLABELLED if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.label}/{index}"


class Subset:
    """Some images of a source, in the given order."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices, self.classes = source, indices, source.classes
        self.labels = None if source.labels is None else source.labels[indices]
        if hasattr(source, "order"):  # a source that wants its images read in an order of its own
            self.order, self.ahead = self._order, self._ahead

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.source[int(self.indices[index])]

    def part(self, index: int, box: Boxed) -> tuple[Tensor, int]:
        return part(self.source, int(self.indices[index]), box)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def raw(self, index: int) -> bytearray:
        return self.source.raw(int(self.indices[index]))  # type: ignore[attr-defined]

    def _ahead(self, seed: int, epoch: int, indices: np.ndarray) -> None:
        self.source.ahead(seed, epoch, self.indices[indices])  # type: ignore[attr-defined]

    def _order(self, seed: int, epoch: int, kept: np.ndarray | None = None) -> np.ndarray:
        where = np.full(len(self.source), -1, np.int64)
        where[self.indices] = np.arange(len(self.indices))
        wanted = np.zeros(len(self.source), bool)
        wanted[self.indices] = True if kept is None else kept
        return where[self.source.order(seed, epoch, wanted)]  # type: ignore[attr-defined]


class Renumbered(Subset):
    """A source whose labels are places in other `classes`, which hold each of its own by name."""

    def __init__(self, source: Source, classes: list[str]):
        super().__init__(source, np.arange(len(source)))
        number = {name: k for k, name in enumerate(classes)}
        self.place = np.array([*(number[name] for name in source.classes), UNLABELLED], np.int64)
        self.classes = classes
        self.labels = None if source.labels is None else self.place[source.labels]  # the last place is that of -1

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return image, int(self.place[label])

    def part(self, index: int, box: Boxed) -> tuple[Tensor, int]:
        image, label = super().part(index, box)
        return image, int(self.place[label])


def matched(train_set: Source, val_set: Source) -> Source:
    """The validation images with the training images' numbers of the classes, where those have them all by name.

    Parts that are listed apart, as shards and Parquet files are, number the classes that each of them happens to hold.
    """
    if val_set.labels is None or val_set.classes == train_set.classes or set(val_set.classes) - set(train_set.classes):
        return val_set
    return Renumbered(val_set, train_set.classes)


def fingerprint(source: Source) -> str:
    """What the order of an epoch and the labels hang on: the same for the same listing."""
    labels = b"" if source.labels is None else np.ascontiguousarray(source.labels, np.int64).tobytes()
    return f"{len(source)} images, {hashlib.sha256(labels).hexdigest()[:12]}"


def split_indices(labels: np.ndarray | None, count: int, fraction: float, split: str) -> np.ndarray:
    """Sorted indices of the "train" or "val" part: `fraction` of each class is held out, always the same.

    The draw hangs on nothing but the listing, so that runs of all seeds and stages hold out the same images.
    """
    if fraction == 1 and split == "val":
        return np.arange(count)
    if not 0 < fraction < 1:
        raise ValueError(
            f"data.val_fraction={fraction:g} leaves nothing to {'train on' if fraction else 'validate'}: it must lie "
            "in (0, 1) where there is no val/ folder. (With task=evaluate, 1 takes every image.)"
        )
    chance = np.random.default_rng(2111_06377).random(count)
    own: np.ndarray = np.zeros(count, np.int64) if labels is None else labels - labels.min()
    order = np.argsort(own + chance)  # by class, at random within it
    sizes = np.bincount(own)
    ranks = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the class
    wanted, total = np.round(sizes * fraction), count * fraction
    if abs(wanted.sum() - total) > max(2, 0.1 * total):  # classes too small to be rounded each by itself
        wanted = np.floor(sizes * fraction)
        most = np.argsort(wanted - sizes * fraction, kind="stable")  # the largest remainder first
        wanted[most[: round(total - wanted.sum())]] += 1
    held = np.zeros(count, bool)
    held[order[ranks < np.repeat(wanted, sizes)]] = True
    if held.all() or not held.any():  # too few images for the fraction: neither part may be empty
        held[np.argmin(chance)] = not held.any()
    return np.flatnonzero(held if split == "val" else ~held)


def reduced(source: Source, fraction: float, per_class: int | None, seed: int) -> Source:
    """A part of the training images by seed: `fraction` of them, then at most `per_class` of each class.
    A larger fraction or count of the same seed contains the smaller one."""
    count = len(source)
    if fraction >= 1 and per_class is None:
        return source
    if per_class is not None and source.labels is None:
        raise ValueError("data.per_class needs labels, and these images have none: use data.fraction.")
    order = np.random.default_rng([seed, 0x5B5E7]).permutation(count)
    order = order[: max(1, round(count * fraction))]
    if per_class is not None:
        assert source.labels is not None
        by_class = np.argsort(source.labels[order], kind="stable")
        sorted_labels = source.labels[order][by_class]
        ranks = np.arange(len(order)) - np.searchsorted(sorted_labels, sorted_labels, side="left")
        order = order[by_class[ranks < per_class]]
    return Subset(source, np.sort(order))


def replicate(images: Tensor, in_chans: int, name: str) -> Tensor:
    """Grey images (..., 1, H, W) on `in_chans` equal channels, RGB as it is; else raises ValueError."""
    if images.shape[-3] == in_chans:
        return images
    if images.shape[-3] == 1:
        return torch.repeat_interleave(images, in_chans, dim=-3)
    raise ValueError(f"data.in_chans={in_chans}, but the images of {name} have {images.shape[-3]} channels.")
