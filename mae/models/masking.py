"""Masks: noise decides which patches are visible, those where it is smallest.

Training draws uniform noise for each sample. `MASKS` holds other ways of masking, for pictures (paper, figure 6).
"""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mae.errors import UserError

MaskName = Literal["random", "block", "grid"]
SMALLEST_BLOCK = 4  # patches; aspect ratios from 0.3 to 1 / 0.3: BEiT (arXiv 2106.08254, algorithm 1)
ASPECT = 0.3


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """Visible patches of an image. Raises UserError where no patch would be visible."""
    visible = int(num_patches * (1 - mask_ratio))
    if not 1 <= visible <= num_patches:
        raise UserError(
            f"task.mask_ratio {mask_ratio} keeps {visible} of {num_patches} patches, but at least one "
            "must be kept: choose a ratio in [0, 1) that does."
        )
    return visible


def order_by_noise(noise: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Patches (B, L) in the order of their noise, visible ones first, and the mask (B, L), 1 = masked."""
    order = noise.argsort(dim=1, stable=True)  # stable: equal values have the same order on every device
    return order, torch.ones_like(noise).scatter_(1, order[:, :num_visible], 0.0)


def mask_noise(name: MaskName, grid: tuple[int, int], mask_ratio: float, count: int, seed: int) -> Tensor:
    """Noise (count, L) float32 in [0, 1) of a way of masking: its `count_visible` smallest patches are visible."""
    generator = np.random.default_rng([seed, 0x3A5C])
    rows = [MASKS[name](generator, grid, mask_ratio) for _ in range(count)]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def random_mask(generator: np.random.Generator, grid: tuple[int, int], mask_ratio: float) -> np.ndarray:
    """Any patches."""
    return generator.random(grid[0] * grid[1])


def block_mask(generator: np.random.Generator, grid: tuple[int, int], mask_ratio: float) -> np.ndarray:
    """Rectangles are masked until there are enough patches."""
    height, width = grid
    number = height * width - int(height * width * (1 - mask_ratio))
    masked = np.zeros(grid, bool)
    while (missing := number - int(masked.sum())) > 0:
        area = generator.uniform(min(SMALLEST_BLOCK, missing), missing) if missing > 1 else 1.0
        aspect = math.exp(generator.uniform(math.log(ASPECT), -math.log(ASPECT)))
        h = min(height, max(1, round(math.sqrt(area * aspect))))
        w = min(width, max(1, round(math.sqrt(area / aspect))))
        top, left = generator.integers(height - h + 1), generator.integers(width - w + 1)
        block = np.zeros(grid, bool)
        block[top : top + h, left : left + w] = True
        masked.reshape(-1)[np.flatnonzero(block & ~masked)[:missing]] = True
    return (generator.random(masked.size) + masked.reshape(-1)) / 2  # below 0.5 where visible, above where masked


def grid_mask(generator: np.random.Generator, grid: tuple[int, int], mask_ratio: float) -> np.ndarray:
    """Visible patches at even distances, the same for all images: one of each 2 x 2 at 75 %, every other at 50 %."""
    order = np.zeros((1, 1))
    while len(order) < max(grid):  # the matrix of ordered dithering (Bayer, 1973): even at every level
        order = np.block([[4 * order, 4 * order + 2], [4 * order + 3, 4 * order + 1]])
    return order[: grid[0], : grid[1]].reshape(-1) / order.size


MASKS = {"random": random_mask, "block": block_mask, "grid": grid_mask}
