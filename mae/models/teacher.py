"""The frozen network whose features are predicted by `target=features`."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class Teacher(nn.Module):
    """Features of the patches of whole images.

    `scale` and `shift` (C, 1, 1) turn images as they are normalised for the model into those that the network knows.
    Without a network only the width of its features is known.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, width: int, depth: int, network: VisionTransformer | None, scale: Tensor, shift: Tensor):
        super().__init__()
        self.width, self.depth, self.network = width, depth, network
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, layer: int | None) -> Tensor:
        """(B, L, width) after block `layer`, the last where None, before the network's own last norm."""
        network = self.network
        assert network is not None, "the teacher's features are not needed here"
        x = network._pos_embed(network.patch_embed(images * self.scale + self.shift))
        for block in list(network.blocks)[:layer]:
            x = block(x)
        return x[:, network.num_prefix_tokens :]


def absent_teacher(width: int) -> Teacher:
    """One that is not needed: of a model whose predictions are not compared."""
    return Teacher(width, 1 << 30, None, torch.ones(1, 1, 1), torch.zeros(1, 1, 1))


def no_teacher(name: str) -> Teacher:
    """Where nobody can read one: a bug of whoever built the target."""
    raise AssertionError(f"nothing reads the teacher {name}")
