"""Pictures of what has no pixels: features, histograms of orientations, token ids."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mae.device import exact

GLYPH = 16  # pixels of a cell's side
GOLDEN_RATIO = 0.618034  # of a turn of the colour circle: neighbouring ids get distant colours


def in_grid(colours: Tensor, grid: tuple[int, int]) -> Tensor:
    """Colours (B, L, 3) of patches as images (B, 3, rows, columns)."""
    return colours.transpose(1, 2).unflatten(2, grid)


def principal_colours(target: Tensor, pred: Tensor) -> tuple[Tensor, Tensor]:
    """Both (B, L, D) as colours (B, L, 3) in [0, 1]: the three main components of the targets, from their 2nd to their
    98th percentile. Patches that are not finite are black."""
    rows = target.float().flatten(0, -2)
    rows, count = rows[rows.isfinite().all(1)], min(3, rows.shape[1])
    if not len(rows):
        return target.new_zeros(*target.shape[:-1], 3), pred.new_zeros(*pred.shape[:-1], 3)
    mean = rows.mean(0)
    basis = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:count].T
    low, high = (torch.quantile((rows - mean) @ basis, share, dim=0) for share in (0.02, 0.98))
    values = [(tokens.float() - mean) @ basis for tokens in (target, pred)]
    first, second = (((v - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).nan_to_num() for v in values)
    return F.pad(first, (0, 3 - count)), F.pad(second, (0, 3 - count))


def id_colours(ids: Tensor) -> Tensor:
    """Ids (B, L) as colours (B, L, 3) in [0, 1], each of its own hue and brightness."""
    number = ids.to(exact(ids.device)).double()
    hue = (number * GOLDEN_RATIO) % 1
    thirds = torch.tensor([0.0, 1 / 3, 2 / 3], device=number.device, dtype=torch.float64)
    light = 0.6 + 0.4 * ((number * GOLDEN_RATIO**2 * 7) % 1)
    return (light[..., None] * (0.5 + 0.5 * torch.cos(2 * math.pi * (hue[..., None] + thirds)))).float().to(ids.device)


def glyphs(histogram: Tensor) -> Tensor:
    """Histograms (B, rows, columns, n) of cells as images (B, 3, rows * s, columns * s) of lines along the edges.

    Orientation k is an angle from k / n to (k + 1) / n of a half turn, between the gradient and the vertical axis.
    """
    n = histogram.shape[-1]
    angle = (torch.arange(n, device=histogram.device) + 0.5) * (math.pi / n)
    at = torch.arange(GLYPH, device=histogram.device) - (GLYPH - 1) / 2
    across = at[None] * angle.sin()[:, None, None] + at[:, None] * angle.cos()[:, None, None]  # along the gradient
    along = at[None] * angle.cos()[:, None, None] - at[:, None] * angle.sin()[:, None, None]
    lines = (1 - across.abs()).clamp(min=0) * (along.abs() < GLYPH / 2 - 0.5)  # (n, s, s)
    drawn = torch.einsum("brcn,nst->brsct", histogram.clamp(min=0), lines).clamp(max=1)
    return drawn.flatten(3, 4).flatten(1, 2)[:, None].expand(-1, 3, -1, -1)
