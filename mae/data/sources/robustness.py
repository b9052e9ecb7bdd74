"""ImageNet's robustness sets in the layouts their authors ship, labelled by ImageNet-1k's 1000 classes.

ImageNet-A and -R (Hendrycks et al., 1907.07174, 2006.16241) are of 200 classes each, and a classifier of 1000
is asked among these alone. ImageNet-C (Hendrycks and Dietterich, 1903.12261) is 15 corruptions of 5 severities.
"""

import functools
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from torch import Tensor

from mae.data.decode import Decoder
from mae.data.paths import given_root, hidden
from mae.data.source import Source, Target
from mae.data.sources.folder import Files
from mae.data.sources.listing import cached_scan
from mae.data.splits import stays

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
    place = importlib.resources.files("timm.data") / "_info" / f"imagenet{which}_synsets.txt"
    return tuple(place.read_text().split())


class Robustness(Source):
    """Several trees of class folders as one set of images.

    `groups` are the names of the trees where there are several, and `group` (N,) the number of each image's tree.
    """

    def __init__(self, parts: Sequence[Files], groups: list[str], subset: list[int] | None):
        self.parts, self.groups, self.subset = parts, groups, subset
        self.ends = np.cumsum([len(part) for part in parts])
        self.group = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        self.labels: np.ndarray | None = np.concatenate([np.asarray(part.listing.labels, np.int64) for part in parts])
        self.classes = list(synsets())

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _find(self, index: int) -> tuple[Files, int]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part], index - int(self.ends[part] - len(self.parts[part]))

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        part, inside = self._find(index)
        return part[inside]

    def name(self, index: int) -> str:
        part, inside = self._find(index)
        prefix = self.groups[int(self.group[index])] if self.groups else ""
        return f"{prefix}/{part.name(inside)}" if prefix else part.name(inside)


def robustness(
    split: Literal["train", "val"],
    *,
    root: str | None,
    variant: Literal["a", "r", "sketch", "v2", "c"],
    in_chans: Annotated[int, "[1, inf)"],
    exif_orientation: bool,
    max_pixels: Annotated[int, "[1, inf)"],
    follow_links: bool,
    cache_dir: str | None,
) -> Source:
    """A robustness set, to evaluate on. Raises ValueError where it is asked for training images, or the
    folders of its layout are missing."""
    if split == "train":
        raise ValueError(f"ImageNet-{variant.upper()} has no training images: use it with task=evaluate.")
    decoder = Decoder(in_chans, exif_orientation, max_pixels)
    top = given_root(root)
    names = [str(k) for k in range(1000)] if variant == "v2" else list(synsets())

    def files(place: Path) -> Files:
        stays(top, place, follow_links)
        found = Files(cached_scan(place, names, follow_links, cache_dir), decoder)
        if not len(found) or int(found.listing.labels.min()) < 0:
            what = "images outside of these folders" if len(found) else "no image"
            raise ValueError(
                f"data.root={root}: {place} should hold folders such as {names[0]}, each with the images of one class "
                f"of ImageNet, and has {what}."
            )
        return found

    if variant == "c":
        places = corruptions(top, root)
        return Robustness([files(place) for place in places.values()], list(places), None)
    part = {"a": synsets("_a"), "r": synsets("_r")}.get(variant)
    place = (
        top if any((top / name).is_dir() for name in names) else next(iter(sorted(top.glob(UNPACKED[variant]))), top)
    )
    found = files(place)
    if part is None:
        return Robustness([found], [], None)
    subset = [names.index(name) for name in part]
    if strange := sorted(set(np.unique(found.listing.labels).tolist()) - set(subset)):
        raise ValueError(
            f"data.root={root}: {place} holds images of {names[strange[0]]}, which is not among the 200 classes of "
            f"ImageNet-{variant.upper()}: is it another set?"
        )
    return Robustness([found], [], subset)


def corruptions(top: Path, root: str | None) -> dict[str, Path]:
    """`corruption/severity` -> folder, for those under `top` or, as the archives unpack, one level deeper."""
    found = {}
    for name in ALEXNET_ERRORS:
        places = (p for p in (top / name, *sorted(top.glob(f"*/{name}"))) if not hidden(str(p.relative_to(top))))
        place = next((p for p in places if p.is_dir()), None)
        for severity in SEVERITIES if place is not None else ():
            assert place is not None
            if not (place / severity).is_dir():
                raise ValueError(
                    f"data.root={root}: {place} lacks the folder {severity}: all five severities are needed."
                )
            found[f"{name}/{severity}"] = place / severity
    if not found:
        raise ValueError(
            f"data.root={root} holds no corruption of ImageNet-C: folders such as gaussian_noise/1/n01440764."
        )
    return found


def corruption_errors(groups: list[str], group: np.ndarray, hit: np.ndarray) -> tuple[dict[str, float], float | None]:
    """Corruption errors in percent of AlexNet's, and their mean (mCE), None unless all 15 are there.

    A corruption's error is the mean over severities of the top-1 error, over AlexNet's.
    """
    ratios: dict[str, list[float]] = {}
    for number, name in enumerate(groups):
        ratios.setdefault(name.split("/")[0], []).append(100.0 * float(1 - hit[group == number].mean()))
    errors = {name: 100.0 * sum(values) / len(values) / ALEXNET_ERRORS[name] for name, values in ratios.items()}
    return errors, sum(errors.values()) / len(errors) if len(errors) == len(ALEXNET_ERRORS) else None
