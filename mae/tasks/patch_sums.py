"""What `task=stats target=pca` sums over the patches of the training images, beside their mean and deviation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from mae.config.build import call
from mae.config.values import pair
from mae.data.prepare import top_of
from mae.data.transforms import CenterCrop
from mae.models.targets import PATCH_SUMS, product_sums
from mae.runs.files import replacing


def images_to_fit(count: int, most: int | None) -> np.ndarray:
    """The numbers of at most `most` of `count` images, spread evenly; all where None."""
    return np.unique(np.linspace(0, count - 1, min(count, most or count)).astype(int))


class PatchSums:
    """Sums of [1, patch] times [1, patch], of values in [0, 1], over the centre crops that fitting sees."""

    def __init__(self, cfg: DictConfig, count: int):
        self.patch, self.size, self.in_chans = pair(cfg.model.patch_size), pair(cfg.model.img_size), cfg.model.in_chans
        self.transform = call(CenterCrop, {"img_size": cfg.model.img_size, "crop_fraction": cfg.data.crop_fraction})
        self.chosen = set(images_to_fit(count, cfg.target.images).tolist())
        width = 1 + self.patch[0] * self.patch[1] * self.in_chans
        self.sums = torch.zeros(width, width, dtype=torch.float64)

    def crop(self, index: int, image: Tensor) -> Tensor | None:
        """The crop of an image that is fitted to; None for any other."""
        return self.transform(image).contiguous() if index in self.chosen else None

    def add(self, crop: Tensor) -> None:
        """Adds the patches of a crop (C, H, W): values in the order row, column, channel."""
        (p, q), top = self.patch, top_of(crop)
        patches = crop.unfold(1, p, p).unfold(2, q, q).permute(1, 2, 3, 4, 0).reshape(1, -1, p * q * len(crop))
        self.sums += product_sums(patches.double() / top)

    def write(self, run: Path, total: Callable[[Tensor], Tensor], main: bool) -> None:
        """Writes the sums over all ranks into a run; all ranks must call."""
        sums = total(self.sums).cpu().numpy()
        if main:
            with replacing(run / PATCH_SUMS) as temporary, temporary.open("wb") as file:
                np.savez(file, sums=sums, patch_size=self.patch, img_size=self.size, in_chans=self.in_chans)
