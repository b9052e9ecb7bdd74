"""Some images of a source: the training or validation split, a fraction of them, other numbers of the classes."""

import numpy as np
from torch import Tensor

from mae.data.crops import Boxed
from mae.data.source import UNLABELLED, Source, Target
from mae.errors import UserError


class Subset(Source):
    """Some images of a source, in the order of `indices`."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices, self.classes = source, indices, source.classes
        self.labels = None if source.labels is None else source.labels[indices]
        self.decoder, self.root = source.decoder, source.root

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def identities(self, indices: np.ndarray) -> bytes:
        return self.source.identities(self.indices[indices])

    def region(self, index: int, box: Boxed) -> tuple[Tensor, Target]:
        return self.source.region(int(self.indices[index]), box)

    def raw(self, index: int) -> bytearray | None:
        return self.source.raw(int(self.indices[index]))

    def encoded(self, index: int) -> tuple[bytearray, Target] | None:
        return self.source.encoded(int(self.indices[index]))

    def order(self, seed: int, epoch: int, mask: np.ndarray | None = None) -> np.ndarray | None:
        wanted = np.zeros(len(self.source), bool)
        wanted[self.indices] = True if mask is None else mask
        order = self.source.order(seed, epoch, wanted)
        if order is None:
            return None
        number = np.full(len(self.source), -1, np.int64)
        number[self.indices] = np.arange(len(self.indices))
        return number[order]

    def prefetch(self, seed: int, epoch: int, indices: np.ndarray) -> None:
        self.source.prefetch(seed, epoch, self.indices[indices])


class Renumbered(Subset):
    """A labelled source whose classes have the numbers that they have in `classes`, which holds all their names."""

    def __init__(self, source: Source, classes: list[str]):
        super().__init__(source, np.arange(len(source)))
        number = {name: k for k, name in enumerate(classes)}
        new = np.array([*(number[name] for name in source.classes), UNLABELLED], np.int64)  # the last is that of -1
        self.classes = classes
        self.labels = None if source.labels is None else new[source.labels]

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return super().__getitem__(index)[0], self._target(index)

    def region(self, index: int, box: Boxed) -> tuple[Tensor, Target]:
        return super().region(index, box)[0], self._target(index)

    def encoded(self, index: int) -> tuple[bytearray, Target] | None:
        encoded = super().encoded(index)
        return None if encoded is None else (encoded[0], self._target(index))

    def _target(self, index: int) -> int:
        return UNLABELLED if self.labels is None else int(self.labels[index])


def matched(train_set: Source, val_set: Source) -> Source:
    """The validation images, their classes numbered as the training images' where those have them all by name.

    Splits that are listed apart, as shards and Parquet files are, each number the classes that they happen to hold.
    """
    if val_set.labels is None or val_set.classes == train_set.classes or set(val_set.classes) - set(train_set.classes):
        return val_set
    return Renumbered(val_set, train_set.classes)


def split_indices(labels: np.ndarray | None, count: int, fraction: float, split: str) -> np.ndarray:
    """Sorted indices of the "train" or "val" images: `fraction` of each class is held out, always the same.

    The random numbers depend on nothing but the listing, so that runs of all seeds and tasks hold out the same images.
    """
    if fraction == 1 and split == "val":
        return np.arange(count)
    if not 0 < fraction < 1:
        raise UserError(
            f"data.val_fraction={fraction:g} leaves nothing to {'train on' if fraction else 'validate'}: it must lie "
            "in (0, 1) where there is no val/ folder. (With task=evaluate, 1 takes every image.)"
        )
    numbers = np.random.default_rng(2111_06377).random(count)
    own: np.ndarray = np.zeros(count, np.int64) if labels is None else labels - labels.min()
    order = np.argsort(own + numbers)  # by class, at random within it
    sizes = np.bincount(own)
    ranks = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the class
    wanted, total = np.round(sizes * fraction), count * fraction
    if abs(wanted.sum() - total) > max(2, 0.1 * total):  # classes too small to be rounded each by itself
        wanted = np.floor(sizes * fraction)
        most = np.argsort(wanted - sizes * fraction, kind="stable")  # the largest remainder first
        wanted[most[: round(total - wanted.sum())]] += 1
    held = np.zeros(count, bool)
    held[order[ranks < np.repeat(wanted, sizes)]] = True
    if held.all() or not held.any():  # too few images for the fraction: neither split may be empty
        held[np.argmin(numbers)] = not held.any()
    return np.flatnonzero(held if split == "val" else ~held)


def held_out(source: Source, fraction: float, split: str) -> Source:
    """The training or validation images of a source that is not split. Raises UserError where they are too few."""
    if len(source) < 2 and fraction < 1:
        raise UserError("data.root holds one image only: two are needed, to train and to validate.")
    return Subset(source, split_indices(source.labels, len(source), fraction, split))


def reduced(source: Source, fraction: float, per_class: int | None, seed: int) -> Source:
    """Some training images, chosen by seed: `fraction` of them, then at most `per_class` of each class.

    A larger fraction or count of the same seed contains the smaller one. Raises UserError where labels are missing."""
    count = len(source)
    if fraction >= 1 and per_class is None:
        return source
    if per_class is not None and source.labels is None:
        raise UserError("data.per_class needs labels, and these images have none: use data.fraction.")
    order = np.random.default_rng([seed, 0x5B5E7]).permutation(count)
    order = order[: max(1, round(count * fraction))]
    if per_class is not None:
        assert source.labels is not None
        by_class = np.argsort(source.labels[order], kind="stable")
        sorted_labels = source.labels[order][by_class]
        ranks = np.arange(len(order)) - np.searchsorted(sorted_labels, sorted_labels, side="left")
        order = order[by_class[ranks < per_class]]
    return Subset(source, np.sort(order))
