"""Masks to look at, as noise for the model: the patches of smallest noise are kept (paper, figure 6)."""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["random", "block", "grid"]
SMALLEST_BLOCK = 4  # patches; aspect ratios from 0.3 to 1 / 0.3: BEiT (arXiv 2106.08254, algorithm 1)
ASPECT = 0.3


def noise(kind: Kind, grid: tuple[int, int], mask_ratio: float, count: int, seed: int) -> Tensor:
    """Noise (count, L) float32 in [0, 1) whose `int(L * (1 - mask_ratio))` smallest patches form such a mask.

    random: any patches. block: rectangles are removed until there are enough. grid: patches are kept at even
    distances, one of each 2 x 2 at 75 %, every other one at 50 %, the same for all images.
    """
    make = {"random": _random, "block": _block, "grid": _grid}[kind]
    generator = np.random.default_rng([seed, 0x3A5C])
    rows = [make(generator, grid, mask_ratio) for _ in range(count)]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def _random(generator: np.random.Generator, grid: tuple[int, int], mask_ratio: float) -> np.ndarray:
    return generator.random(grid[0] * grid[1])


def _later(generator: np.random.Generator, removed: np.ndarray) -> np.ndarray:
    """Noise in which all that is to be removed comes after all that is to be kept."""
    return (generator.random(removed.size) + removed.reshape(-1)) / 2


def _block(generator: np.random.Generator, grid: tuple[int, int], mask_ratio: float) -> np.ndarray:
    height, width = grid
    wanted = height * width - int(height * width * (1 - mask_ratio))
    removed = np.zeros(grid, bool)
    while (left := wanted - int(removed.sum())) > 0:
        area = generator.uniform(min(SMALLEST_BLOCK, left), left) if left > 1 else 1.0
        aspect = math.exp(generator.uniform(math.log(ASPECT), -math.log(ASPECT)))
        h = min(height, max(1, round(math.sqrt(area * aspect))))
        w = min(width, max(1, round(math.sqrt(area / aspect))))
        top, start = generator.integers(height - h + 1), generator.integers(width - w + 1)
        block = np.zeros(grid, bool)
        block[top : top + h, start : start + w] = True
        new = np.flatnonzero(block & ~removed)[:left]
        removed.reshape(-1)[new] = True
    return _later(generator, removed)


def _grid(generator: np.random.Generator, grid: tuple[int, int], mask_ratio: float) -> np.ndarray:
    order = np.zeros((1, 1))
    while len(order) < max(grid):  # the matrix of ordered dithering (Bayer, 1973): even at every level
        order = np.block([[4 * order, 4 * order + 2], [4 * order + 3, 4 * order + 1]])
    return order[: grid[0], : grid[1]].reshape(-1) / order.size
