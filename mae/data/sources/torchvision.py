"""Data sets that fit in memory and are known by name: embedded ones and torchvision's."""

from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from mae.data.paths import given_root
from mae.data.settings import Count, Split
from mae.data.source import Arrays, Source, replicate
from mae.data.subsets import split_indices
from mae.errors import UserError


def digits(split: Split, *, in_chans: Count, val_fraction: Annotated[float, "[0, 1]"]) -> Source:
    """scikit-learn's 1797 handwritten digits (8 x 8, ten classes; UCI "optdigits"), which need no network."""
    images, labels = read_digits()
    pixels = torch.from_numpy(np.round(images * (255 / 16)).astype(np.uint8))[:, None]  # 0..16 -> 8 bit
    classes = [str(digit) for digit in range(10)]
    indices = split_indices(labels, len(labels), val_fraction, split)
    return Arrays(replicate(pixels[indices], in_chans, "digits"), labels[indices], classes, f"digits/{split}")


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits (1797, 8, 8), from 0 to 16, and their classes (1797,).

    Importing scikit-learn would take a second of every process's start, so its file is read where it lies.
    """
    file = Path(str(distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")))
    if file.exists():
        table = np.loadtxt(file, np.uint8, delimiter=",")
        return table[:, :64].reshape(-1, 8, 8), table[:, 64].astype(np.int64)
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    return np.asarray(images).reshape(-1, 8, 8), np.asarray(classes, np.int64)


def cifar10(split: Split, *, root: str | None, in_chans: Count, download: bool) -> Source:
    """CIFAR-10 through torchvision, which checks the files' MD5 sums before it opens them."""
    from torchvision.datasets import CIFAR10

    data = fetched(CIFAR10, "CIFAR-10", root, download, train=split == "train")
    return arrays(data.data.transpose(0, 3, 1, 2), data.targets, data.classes, in_chans, f"cifar10/{split}")


def cifar100(split: Split, *, root: str | None, in_chans: Count, download: bool) -> Source:
    """CIFAR-100 (fine labels) through torchvision, which checks the files' MD5 sums before it opens them."""
    from torchvision.datasets import CIFAR100

    data = fetched(CIFAR100, "CIFAR-100", root, download, train=split == "train")
    return arrays(data.data.transpose(0, 3, 1, 2), data.targets, data.classes, in_chans, f"cifar100/{split}")


def stl10(split: Split, *, root: str | None, in_chans: Count, download: bool, unlabelled: bool) -> Source:
    """STL-10: 5000 labelled images of 96 x 96 to train on or, with `unlabelled`, 100000 more without labels."""
    from torchvision.datasets import STL10

    name = "test" if split == "val" else "train+unlabeled" if unlabelled else "train"
    data = fetched(STL10, "STL-10", root, download, split=name)
    labels = None if unlabelled and split == "train" else data.labels
    return arrays(data.data, labels, data.classes, in_chans, f"stl10/{split}")


def fashion_mnist(split: Split, *, root: str | None, in_chans: Count, download: bool) -> Source:
    """Fashion-MNIST: 60000 + 10000 grey images of 28 x 28."""
    from torchvision.datasets import FashionMNIST

    data = fetched(FashionMNIST, "Fashion-MNIST", root, download, train=split == "train")
    return arrays(data.data[:, None], data.targets, data.classes, in_chans, f"fashion_mnist/{split}")


def fetched(kind: Callable, title: str, root: str | None, download: bool, **options: Any) -> Any:
    """A data set of torchvision. Raises UserError where it is not in `data.root`."""
    try:
        return kind(str(given_root(root, must_exist=not download)), download=download, **options)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{title} was not found in data.root={root} ({str(error).splitlines()[0]}): "
            "set data.download=true or another data.root."
        ) from error


def arrays(images: Any, labels: Any, classes: list[str], in_chans: int, name: str) -> Arrays:
    """Images (N, C, H, W) of torchvision as a source; an unlabelled one has no classes."""
    pixels = torch.as_tensor(np.ascontiguousarray(images))
    known = None if labels is None else np.asarray(labels, np.int64)
    return Arrays(replicate(pixels, in_chans, name), known, [] if known is None else list(classes), name)
