"""Targets: what is predicted for a masked patch, and the loss of a prediction.

A target is a subclass of `Target` and its entry in `TARGETS`. Its keyword-only settings stand in conf/target/NAME.yaml.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae.errors import UserError


@dataclass(frozen=True)
class Patches:
    """The patches of a model's images, for which a target is built."""

    grid: tuple[int, int]  # rows, columns
    size: tuple[int, int]  # height and width in pixels
    in_chans: int
    norm_pix_loss: bool  # of the task: pixels are predicted normalised per patch

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def values(self) -> int:
        """Values of a patch."""
        return self.size[0] * self.size[1] * self.in_chans


class Target(nn.Module):
    """Base class of targets. The constructor is called with the model's `Patches` and the group's keys.

    Buffers are saved with the model. Images are (B, C, H, W) as the encoder sees them; patches (B, L, p * p * C) are
    theirs. No gradient flows into a target.
    """

    size: int  # values predicted for a patch: the width of the decoder's output

    def __init__(self, patches: Patches):
        super().__init__()
        self.patches = patches

    def forward(self, images: Tensor, patches: Tensor) -> Tensor:
        """What is to be predicted for every patch: (B, L, size), or class indices (B, L)."""
        raise NotImplementedError

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """The mean () over predicted patches (B, K, size) and their targets; the squared error unless overridden."""
        return F.mse_loss(pred, target)

    def to_pixels(self, pred: Tensor, patches: Tensor) -> Tensor | None:
        """Predictions (B, L, size) as patches (B, L, p * p * C), for pictures; None where pixels cannot be had back."""
        return None


class PixelTarget(Target):
    """The pixels of a patch; with `norm_pix_loss` less their mean, over their deviation (paper, section 3)."""

    def __init__(self, patches: Patches):
        super().__init__(patches)
        if patches.norm_pix_loss and patches.values < 2:
            raise UserError("task.norm_pix_loss needs patches of more than one value: raise model.patch_size.")
        self.size = patches.values

    def forward(self, images: Tensor, patches: Tensor) -> Tensor:
        if not self.patches.norm_pix_loss:
            return patches
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased, as the reference's
        return (patches - mean) / (var + 1e-6).sqrt()

    def to_pixels(self, pred: Tensor, patches: Tensor) -> Tensor:
        """A normalised prediction has no brightness or contrast of its own: it gets those of the original patch, as in
        the paper's figures."""
        if not self.patches.norm_pix_loss:
            return pred
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return pred * (var + 1e-6).sqrt() + mean


TARGETS = {
    "pixels": PixelTarget,
}
