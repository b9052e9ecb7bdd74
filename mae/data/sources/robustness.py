"""ImageNet's robustness sets in the layouts their authors ship, labelled by ImageNet-1k's 1000 classes.

ImageNet-A and -R (Hendrycks et al., 1907.07174, 2006.16241) are of 200 classes each, among which alone a classifier of
1000 decides. ImageNet-C (Hendrycks and Dietterich, 1903.12261) is 15 corruptions of 5 severities.
"""

import functools
import importlib.resources
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from mae.data.decode import Decoder
from mae.data.paths import given_root, hidden
from mae.data.settings import FileSettings, Split
from mae.data.source import Source, Target
from mae.data.sources.folder import Files
from mae.data.sources.listing import cached_scan
from mae.data.splits import stays
from mae.errors import UserError

# Error of AlexNet in percent, mean over the five severities: 1903.12261, table 1, to the digits of its code
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
SEVERITIES = ("1", "2", "3", "4", "5")
UNPACKED = {"a": "imagenet-a", "r": "imagenet-r", "sketch": "sketch", "v2": "imagenetv2-*"}  # folder in the archive


@functools.cache
def synsets(which: Literal["", "_a", "_r"] = "") -> tuple[str, ...]:
    """WordNet ids of ImageNet-1k's classes in the order of a classifier's logits, or of a part of them."""
    path = importlib.resources.files("timm.data") / "_info" / f"imagenet{which}_synsets.txt"
    return tuple(path.read_text().split())


class Robustness(Source):
    """Several trees of class folders as one set of images.

    `groups` are the names of the trees where there are several, and `group` (N,) the number of each image's tree.
    """

    def __init__(self, trees: Sequence[Files], groups: list[str], subset: list[int] | None):
        self.trees, self.groups, self.subset = trees, groups, subset
        self.ends = np.cumsum([len(tree) for tree in trees])
        self.group = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])
        self.labels = np.concatenate([np.asarray(tree.listing.labels, np.int64) for tree in trees])
        self.classes = list(synsets())
        self.root = os.path.commonpath([str(tree.root) for tree in trees])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _find(self, index: int) -> tuple[Files, int]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.trees[number], index - int(self.ends[number] - len(self.trees[number]))

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        tree, inside = self._find(index)
        return tree[inside]

    def name(self, index: int) -> str:
        tree, inside = self._find(index)
        prefix = self.groups[int(self.group[index])] if self.groups else ""
        return f"{prefix}/{tree.name(inside)}" if prefix else tree.name(inside)


def robustness(
    split: Split, *, files: FileSettings, variant: Literal["a", "r", "sketch", "v2", "c"], decoder: Decoder
) -> Source:
    """A robustness set, to evaluate on. Raises UserError where it is asked for training images, or the
    folders of its layout are missing."""
    if split == "train":
        raise UserError(f"ImageNet-{variant.upper()} has no training images: use it with task=evaluate.")
    top = given_root(files.root)
    names = [str(k) for k in range(1000)] if variant == "v2" else list(synsets())

    def images(folder: Path) -> Files:
        stays(top, folder, files.follow_links)
        tree = Files(cached_scan(folder, names, files.follow_links, files.cache_dir), decoder)
        if not len(tree) or int(tree.listing.labels.min()) < 0:
            what = "images outside of these folders" if len(tree) else "no image"
            raise UserError(
                f"data.root={files.root}: {folder} should hold folders such as {names[0]}, each with the images of one "
                f"class of ImageNet, and has {what}."
            )
        return tree

    if variant == "c":
        folders = corruptions(top, files.root)
        return Robustness([images(folder) for folder in folders.values()], list(folders), None)
    classes = {"a": synsets("_a"), "r": synsets("_r")}.get(variant)
    unpacked = any((top / name).is_dir() for name in names)
    folder = top if unpacked else next(iter(sorted(top.glob(UNPACKED[variant]))), top)
    tree = images(folder)
    if classes is None:
        return Robustness([tree], [], None)
    subset = [names.index(name) for name in classes]
    if strange := sorted(set(np.unique(tree.listing.labels).tolist()) - set(subset)):
        raise UserError(
            f"data.root={files.root}: {folder} holds images of {names[strange[0]]}, which is not among the 200 classes "
            f"of ImageNet-{variant.upper()}: is it another set?"
        )
    return Robustness([tree], [], subset)


def corruptions(top: Path, root: str | None) -> dict[str, Path]:
    """`corruption/severity` -> folder, for those under `top` or, as the archives unpack, one level deeper."""
    folders = {}
    for name in ALEXNET_ERRORS:
        paths = (p for p in (top / name, *sorted(top.glob(f"*/{name}"))) if not hidden(str(p.relative_to(top))))
        if (folder := next((p for p in paths if p.is_dir()), None)) is None:
            continue
        for severity in SEVERITIES:
            if not (folder / severity).is_dir():
                raise UserError(
                    f"data.root={root}: {folder} lacks the folder {severity}: all five severities are needed."
                )
            folders[f"{name}/{severity}"] = folder / severity
    if not folders:
        raise UserError(
            f"data.root={root} holds no corruption of ImageNet-C: folders such as gaussian_noise/1/n01440764."
        )
    return folders


def corruption_errors(groups: list[str], group: np.ndarray, hit: np.ndarray) -> tuple[dict[str, float], float | None]:
    """Corruption errors in percent of AlexNet's, and their mean (mCE), None unless all 15 are there.

    A corruption's error is the mean over severities of the top-1 error, over AlexNet's.
    """
    ratios: dict[str, list[float]] = {}
    for number, name in enumerate(groups):
        ratios.setdefault(name.split("/")[0], []).append(100.0 * float(1 - hit[group == number].mean()))
    errors = {name: 100.0 * sum(values) / len(values) / ALEXNET_ERRORS[name] for name, values in ratios.items()}
    return errors, sum(errors.values()) / len(errors) if len(errors) == len(ALEXNET_ERRORS) else None
