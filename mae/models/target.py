"""What a target is: what is predicted for a masked patch, and the loss of a prediction."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae.models import renderings
from mae.models.teacher import Teacher, no_teacher


@dataclass(frozen=True)
class Patches:
    """The patches of a model's images, and what a target may need beside them."""

    grid: tuple[int, int]  # rows, columns
    size: tuple[int, int]  # height and width in pixels
    in_chans: int
    norm_pix_loss: bool  # of the task: pixels are predicted normalised per patch
    undo: Callable[[Tensor], Tensor] = nn.Identity()  # normalised images as values in [0, 1]
    read_teacher: Callable[[str], Teacher] = no_teacher  # of a name as `init` takes it

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
    gives_ids: bool = False  # whether `forward` gives class indices
    settings: Mapping[str, object]  # of the group `target`, as an export states them
    one_size: bool = False  # whether images must be of the model's own size, and so of `patches.grid`
    fit_images: int | None = None  # training images that `estimate` is shown; None: none are needed

    def __init__(self, patches: Patches):
        super().__init__()
        self.patches = patches

    def forward(self, images: Tensor, patches: Tensor) -> Tensor:
        """What is to be predicted for every patch: (B, L, size), or class indices (B, L)."""
        raise NotImplementedError

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """The mean () over predicted patches (B, K, size) and their targets; the squared error unless overridden."""
        return F.mse_loss(pred, target)

    def estimate(self, patches: Iterable[Tensor], total: Callable[[Tensor], Tensor]) -> None:
        """Fits buffers to patches (b, L, p * p * C) of training images. `total` sums a float64 tensor over ranks."""

    def fit_from_file(self) -> bool:
        """Fits buffers from a file that the group's keys name, where they name one. Raises UserError."""
        return False

    def to_pixels(self, pred: Tensor, patches: Tensor) -> Tensor | None:
        """Predictions (B, L, size) as patches (B, L, p * p * C), for pictures; None where pixels cannot be had back."""
        return None

    def pictures(self, target: Tensor, pred: Tensor) -> tuple[Tensor, Tensor]:
        """Both as images (B, 3, h, w) in [0, 1], where pixels cannot be had back.

        Unless overridden, the three main components of the targets shown are red, green and blue.
        """
        rgb = renderings.principal_colours(target, pred)
        return renderings.in_grid(rgb[0], self.patches.grid), renderings.in_grid(rgb[1], self.patches.grid)


class ShapesOnly(Target):
    """Zeros in place of another target's values, for plans: nothing is read or computed."""

    def __init__(self, target: Target):
        super().__init__(target.patches)
        self.size, self.gives_ids, self.loss_of = target.size, target.gives_ids, target.loss

    def forward(self, images: Tensor, patches: Tensor) -> Tensor:
        shape = (*patches.shape[:2], self.size)
        return images.new_zeros(shape[:2], dtype=torch.int64) if self.gives_ids else images.new_zeros(shape)

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.loss_of(pred, target)
