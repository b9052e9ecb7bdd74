"""What is done to batches on the device: flip and normalisation."""

import torch
from torch import Tensor, nn


def flipped(values: Tensor, flip: Tensor) -> Tensor:
    """Images (B, C, H, W) and target maps (B, ..., H, W), mirrored where `flip` (B,) is true; other targets as they
    are."""
    if values.ndim < 3:
        return values
    return torch.where(flip.view(-1, *[1] * (values.ndim - 1)), values.flip(-1), values)


def top_of(image: Tensor) -> float:
    """What an image's values are divided by: the largest value of an integer type, 1 where they are floating."""
    return 1.0 if image.is_floating_point() else float(torch.iinfo(image.dtype).max)


class Prepare(nn.Module):
    """Flip and normalise on the device, without waiting for it.

    `mean` and `std` have one value, or one a channel. They are of images in [0, 1] where the host type is an integer,
    whose values are divided by its largest. Of floating images they are in the images' own units.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor, flip: Tensor | None = None) -> Tensor:
        """image (B, C, H, W) of any type, flip (B,) bool -> float32 (B, C, H, W)."""
        top = top_of(image)
        if image.dtype != torch.uint8:  # flipped as bytes where it can be: a quarter of the traffic
            image = image.to(torch.float32)
        if flip is not None:
            image = flipped(image, flip)
        return (image / top).sub_(self.mean).div_(self.std)

    def undo(self, image: Tensor) -> Tensor:
        """Normalised (..., C, H, W) -> values in [0, 1] (integer images) or the images' own units."""
        return image * self.std + self.mean
