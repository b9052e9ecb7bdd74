"""Masks: which patches of a sample the encoder sees.

A masking is a function of the samples' keys (B,), the grid of patches, and the mask ratio. It returns noise (B, L) as
float32. The `int(L * (1 - mask_ratio))` patches of smallest noise are visible. Noise is a function of the sample's key
alone, so masks do not depend on ranks, workers or restarts. Settings are keyword-only; their values stand in
`conf/masking/NAME.yaml`. A new masking is a function here, its entry in `MASKINGS`, and its YAML.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from mae.errors import UserError
from mae.rng import uniform

Grid = tuple[int, int]  # patches: rows, columns
Deviation = Annotated[float, "(0, 64]"]  # of a blur, in patches: 64 is a blur over all of 448 pixels in patches of 14
RECTANGLES, WINDOWS = np.uint64(0xB10C), np.uint64(0x317D)  # separate a sample's random numbers by their use
MOST_RECTANGLES = 64
RATIOS = 9  # that are drawn from a range: each has shapes of its own, to be compiled; the middle is one of them


def ratios_of(mask_ratio: float | Sequence[float], num_patches: int) -> tuple[float, ...]:
    """The ratios of which each batch gets one, evenly over a range [low, high]; none where all batches have the same.

    Of ratios that show equally many patches the first is taken.
    """
    if isinstance(mask_ratio, int | float):
        return ()
    low, high = mask_ratio
    ratios = [low + (high - low) * k / (RATIOS - 1) for k in range(RATIOS)]
    by_count: dict[int, float] = {}
    for ratio in ratios:
        by_count.setdefault(count_visible(num_patches, ratio), ratio)
    return tuple(by_count.values())


def middle_ratio(mask_ratio: float | Sequence[float]) -> float:
    """The ratio of validations and pictures: the middle of a range."""
    return mask_ratio if isinstance(mask_ratio, int | float) else sum(mask_ratio) / 2


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """Visible patches of an image. Raises UserError where no patch would be visible."""
    visible = int(num_patches * (1 - mask_ratio))
    if not 1 <= visible <= num_patches:
        raise UserError(
            f"A mask ratio of {mask_ratio} keeps {visible} of {num_patches} patches, and at least one must be kept: "
            "choose a ratio in [0, 1) that does."
        )
    return visible


def count_predicted(num_patches: int, mask_ratio: float, predict_ratio: float | None) -> int:
    """Patches that are predicted: all masked ones, or a share of all patches, rounded up as CrossMAE's code does."""
    masked = num_patches - count_visible(num_patches, mask_ratio)
    return masked if predict_ratio is None else masked - int(num_patches * (mask_ratio - predict_ratio))


def order_by_noise(noise: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Patches (B, L) in the order of their noise, visible ones first, and the mask (B, L), 1 = masked."""
    order = noise.argsort(dim=1, stable=True)  # stable: equal values have the same order on every device
    return order, torch.ones_like(noise).scatter_(1, order[:, :num_visible], 0.0)


def random_masking(keys: np.ndarray, grid: Grid, mask_ratio: float) -> np.ndarray:
    """Every patch is equally likely to be visible (paper, section 3)."""
    return uniform(keys, grid[0] * grid[1]).astype(np.float32)


def block_masking(
    keys: np.ndarray,
    grid: Grid,
    mask_ratio: float,
    *,
    smallest_block: Annotated[int, "[1, inf)"],
    aspect_ratio: Annotated[float, "(0, 1]"],
) -> np.ndarray:
    """Rectangles are masked until enough patches are (table 1f; algorithm 1 of BEiT, arXiv 2106.08254).

    A rectangle has at least `smallest_block` patches. Its sides have a ratio of `aspect_ratio` at least, and of its
    inverse at most.
    """
    num_patches = grid[0] * grid[1]
    count = num_patches - count_visible(num_patches, mask_ratio)
    rows = uniform(keys ^ RECTANGLES, 4 * MOST_RECTANGLES).reshape(len(keys), -1, 4)
    masked = np.stack([_rectangles(numbers, grid, count, smallest_block, aspect_ratio) for numbers in rows])
    below_one = uniform(keys, num_patches) * (1 - 2.0**-20)  # also after rounding to float32
    return ((below_one + masked) / 2).astype(np.float32)  # every masked patch comes after every visible one


def _rectangles(numbers: np.ndarray, grid: Grid, count: int, smallest_block: int, aspect_ratio: float) -> np.ndarray:
    """(L,) True for `count` patches, masked by one rectangle for each row of `numbers` until there are enough."""
    height, width = grid
    masked = np.zeros(grid, bool)
    limit = -math.log(aspect_ratio)
    for area, side, row, column in numbers.tolist():
        if not count:
            break
        smallest = min(smallest_block, count)
        patches = smallest + area * (count - smallest)
        ratio = math.exp((2 * side - 1) * limit)
        h = min(height, max(1, round(math.sqrt(patches * ratio))))
        w = min(width, max(1, round(math.sqrt(patches / ratio))))
        top, left = int(row * (height - h + 1)), int(column * (width - w + 1))
        new = np.argwhere(~masked[top : top + h, left : left + w])[:count]
        masked[top + new[:, 0], left + new[:, 1]] = True
        count -= len(new)
    flat = masked.reshape(-1)
    flat[np.flatnonzero(~flat)[:count]] = True  # where all rectangles are used, which is rare
    return flat


def grid_masking(keys: np.ndarray, grid: Grid, mask_ratio: float) -> np.ndarray:
    """Patches at even distances are visible, the same of all samples (table 1f): at 75 % one of each 2 x 2."""
    return np.broadcast_to(_bayer(grid), (len(keys), grid[0] * grid[1])).copy()


@functools.cache
def _bayer(grid: Grid) -> np.ndarray:
    """(L,) ranks of the matrix of ordered dithering (Bayer, 1973), whose smallest are evenly spread for any ratio."""
    order = np.zeros((1, 1))
    while len(order) < max(grid):
        order = np.block([[4 * order, 4 * order + 2], [4 * order + 3, 4 * order + 1]])
    return (order[: grid[0], : grid[1]].reshape(-1) / order.size).astype(np.float32)


def uniform_masking(
    keys: np.ndarray, grid: Grid, mask_ratio: float, *, window: Annotated[int, "[2, inf)"]
) -> np.ndarray:
    """Every window has equally many visible patches (UM-MAE, arXiv 2205.10063: one of each 2 x 2).

    Where the ratio gives no whole number a window, some windows at random have one more. A window that the grid's edge
    cuts counts as a whole one, so its patches are visible more often. At 75 % of 7 x 9 patches, the last one is visible
    three times of four, and one in the middle once in five.
    """
    numbers = uniform(keys, grid[0] * grid[1]).reshape(-1, *grid)
    rank = np.zeros_like(numbers)
    for row in range(0, grid[0], window):
        for column in range(0, grid[1], window):
            inside = numbers[:, row : row + window, column : column + window]
            order = inside.reshape(len(keys), -1).argsort(1).argsort(1)
            rank[:, row : row + window, column : column + window] = order.reshape(inside.shape)
    ties = uniform(keys ^ WINDOWS, grid[0] * grid[1]).reshape(-1, *grid)
    return ((rank + ties) / window**2).reshape(len(keys), -1).astype(np.float32)


def red_masking(keys: np.ndarray, grid: Grid, mask_ratio: float, *, sigma: Deviation) -> np.ndarray:
    """Low-passed noise (ColorMAE, arXiv 2407.13036): visible patches form large areas. `sigma` is in patches."""
    return _coloured(keys, grid, lambda white: _blurred(white, sigma), sigma)


def blue_masking(keys: np.ndarray, grid: Grid, mask_ratio: float, *, sigma: Deviation) -> np.ndarray:
    """High-passed noise (ColorMAE): visible patches are spread evenly."""
    return _coloured(keys, grid, lambda white: white - _blurred(white, sigma), sigma)


def green_masking(
    keys: np.ndarray,
    grid: Grid,
    mask_ratio: float,
    *,
    sigma: Deviation,
    wide_sigma: Deviation,
) -> np.ndarray:
    """Band-passed noise (ColorMAE): visible patches form groups of one size, between `sigma` and `wide_sigma`."""
    return _coloured(keys, grid, lambda white: _band(white, sigma, wide_sigma), wide_sigma)


def purple_masking(
    keys: np.ndarray,
    grid: Grid,
    mask_ratio: float,
    *,
    sigma: Deviation,
    wide_sigma: Deviation,
) -> np.ndarray:
    """Noise without the band that `green` passes (ColorMAE)."""
    return _coloured(keys, grid, lambda white: white - _band(white, sigma, wide_sigma), wide_sigma)


def _blurred(white: np.ndarray, sigma: float) -> np.ndarray:
    """White noise (B, H, W) after a Gaussian filter of that deviation, in patches."""
    from scipy.ndimage import gaussian_filter  # slow to import, and few maskings need it

    return gaussian_filter(white, (0, sigma, sigma), mode="wrap")


def _band(white: np.ndarray, sigma: float, wide_sigma: float) -> np.ndarray:
    """What a filter of `sigma` passes and one of `wide_sigma` does not."""
    return _blurred(white, sigma) - _blurred(white, wide_sigma)


def _coloured(keys: np.ndarray, grid: Grid, colour: Callable[[np.ndarray], np.ndarray], sigma: float) -> np.ndarray:
    """A window of filtered white noise for each sample, (B, L), the strongest values smallest.

    The noise is filtered on a larger grid, so that no value depends on the window's edge.
    """
    edge = math.ceil(2 * sigma)
    size = (grid[0] + 2 * edge, grid[1] + 2 * edge)
    white = uniform(keys, size[0] * size[1]).reshape(-1, *size)
    window = colour(white)[:, edge : edge + grid[0], edge : edge + grid[1]]
    return -window.reshape(len(keys), -1).astype(np.float32)


def bind_masking(settings: Mapping[str, Any], grid: Grid, mask_ratio: float) -> Callable[[np.ndarray], np.ndarray]:
    """The masking of a config's group `masking`, as a function of the samples' keys; it can be sent to a worker."""
    options = {str(key): value for key, value in settings.items() if key != "name"}
    return functools.partial(MASKINGS[settings["name"]], grid=grid, mask_ratio=mask_ratio, **options)


MASKINGS = {
    "random": random_masking,
    "block": block_masking,
    "grid": grid_masking,
    "uniform": uniform_masking,
    "red": red_masking,
    "blue": blue_masking,
    "green": green_masking,
    "purple": purple_masking,
}
