"""Data sets that are known by name: embedded ones and those of torchvision."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mae.data.source import Arrays, Source, replicate, split_indices

Split = Literal["train", "val"]


def digits(split: Split, *, in_chans: int, val_fraction: float) -> Source:
    """scikit-learn's 1797 handwritten digits (8 x 8, ten classes; UCI "optdigits"), which need no network."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    bunch: Any = load_digits()
    pixels = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))[:, None]  # 0..16 -> 8 bit
    whole = Arrays(replicate(pixels, in_chans, "digits"), bunch.target, [str(d) for d in bunch.target_names], "digits")
    assert whole.labels is not None
    kept = split_indices(whole.labels, len(whole), val_fraction, split)
    return Arrays(whole.images[kept], whole.labels[kept], whole.classes, f"digits/{split}")


def cifar10(split: Split, *, root: str | None, in_chans: int, download: bool) -> Source:
    """CIFAR-10 through torchvision, which checks the files' MD5 sums before it opens them."""
    from torchvision.datasets import CIFAR10

    try:
        found = CIFAR10(str(given_root(root, must_exist=not download)), train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"CIFAR-10 was not found in data.root={root} ({error}): set data.download=true or another data.root."
        ) from error
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return Arrays(replicate(images, in_chans, "cifar10"), np.array(found.targets), found.classes, f"cifar10/{split}")


def given_root(root: str | None, must_exist: bool = True) -> Path:
    """`data.root` as a directory that is there; raises ValueError."""
    if root is None:
        raise ValueError("data.root is not set: give the directory of the images, as data.root=DIR.")
    path = Path(root).expanduser()
    if path.is_file():
        raise ValueError(f"data.root={root} is a file, not a directory.")
    if must_exist and not path.is_dir():
        raise ValueError(f"data.root={root} does not exist: give the directory of the images.")
    return path
