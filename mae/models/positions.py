"""Position embeddings: the fixed sine-cosine table, and its resizing to another grid of patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae.errors import UserError


def sincos_pos_embed(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Fixed position embedding (1 + h * w, dim) in float64 of a grid of (h, w) patches, row by row.

    A row is [sin(col) | cos(col) | sin(row) | cos(row)]: the first half encodes the column (released weights
    depend on it). Row 0 is the class token's and zero. Raises UserError unless dim is a multiple of 4.
    """
    if dim % 4:
        raise UserError(f"A 2-D sine-cosine position embedding needs a width that 4 divides, got {dim}.")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, col = (torch.arange(n, dtype=torch.float64)[:, None] * omega for n in grid_size)  # (h | w, dim / 4)
    row, col = torch.broadcast_tensors(row[:, None], col[None])  # (h, w, dim / 4)
    grid = torch.cat([col.sin(), col.cos(), row.sin(), row.cos()], dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), grid])


def fixed_position(dim: int, grid_size: tuple[int, int]) -> nn.Parameter:
    """Sine-cosine embedding (1, 1 + L, dim) as a fixed parameter, rounded to float32 as in released checkpoints."""
    embed = sincos_pos_embed(dim, grid_size).float().to(torch.get_default_dtype())
    return nn.Parameter(embed[None], requires_grad=False)


def resize_pos_embed(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embedding (1, 1 + h * w, D) of `old_grid` for `new_grid`: bicubic, the class row untouched.

    As the reference does it for fine-tuning at another resolution. Raises ValueError where `pos_embed` does
    not belong to `old_grid`.
    """
    if pos_embed.shape[1] != 1 + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"The position embedding has {pos_embed.shape[1]} rows, "
            f"but a grid of {old_grid[0]} x {old_grid[1]} patches and a class token need "
            f"{1 + old_grid[0] * old_grid[1]}."
        )
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    return torch.cat([pos_embed[:, :1], resize_rows(pos_embed[:, 1:], old_grid, new_grid)], dim=1)


def resize_rows(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """A table (1, h * w, D) without a class row for another grid: bicubic, also where the grids are equal."""
    grid = table.unflatten(1, old_grid).permute(0, 3, 1, 2)  # (1, D, h, w)
    grid = F.interpolate(grid, size=tuple(new_grid), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)
