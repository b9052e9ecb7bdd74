"""Semantic segmentation: timm's VisionTransformer on our blocks, with a head that gives each pixel's class."""

from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.models.decode_heads import DECODE_HEADS, DecodeHead
from mae.models.layers import Block, LayerNorm, check_heads, patch_grid
from mae.models.positions import resize_rows


class Segmenter(VisionTransformer):
    """Images (B, C, H, W) of `img_size` to logits (B, classes, H, W).

    The encoder's names are timm's; the head's begin with `decode_head.`, as mmsegmentation's do.
    """

    decode_head: DecodeHead
    any_size = False  # whether images of any size are computed at once, with interpolated positions

    def features(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Patch tokens (B, D, h, w) after each block that the head reads, and the tokens before them (B, P, D)."""
        if self.any_size:
            x, grid = self._embed_any_size(images)
        else:
            x, grid = self._pos_embed(self.patch_embed(images)), self.patch_embed.grid_size
        x, last = self.norm_pre(self.patch_drop(x)), self.decode_head.blocks[-1]
        maps, prefixes = [], []
        for number, block in enumerate(self.blocks[: last + 1]):
            x = block(x)
            if number in self.decode_head.blocks:
                tokens = self.norm(x)  # no norm where the head brings its own
                patches = tokens[:, self.num_prefix_tokens :].transpose(1, 2)
                maps.append(patches.unflatten(2, (grid[0], grid[1])))
                prefixes.append(tokens[:, : self.num_prefix_tokens])
        return maps, prefixes

    def _embed_any_size(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The first block's input (B, P + h * w, D) and the grid (h, w), for sides that are whole patches."""
        patches = self.patch_embed.proj(images)
        (height, width), first = patches.shape[2:], self.num_prefix_tokens
        table = self.pos_embed
        assert isinstance(table, Tensor)
        x = patches.flatten(2).transpose(1, 2)
        x = x + resize_rows(table[:, first:], self.patch_embed.grid_size, (height, width))  # type: ignore[arg-type]
        if self.cls_token is not None:
            x = torch.cat([(self.cls_token + table[:, :1]).expand(x.shape[0], -1, -1), x], 1)  # len() would fix it
        return x, (height, width)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (B, classes, H, W), of a lower resolution enlarged bilinearly."""
        logits = self.decode_head(*self.features(images))
        if logits.shape[2:] == images.shape[2:]:
            return logits
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)


def segmenter(
    *,
    img_size: int | list[int],
    patch_size: int | list[int],
    in_chans: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    num_classes: int,
    drop_path: float,
    head: Literal["linear", "dpt", "upernet"],
) -> Segmenter:
    """A segmenter with initial weights. Raises UserError where sizes contradict each other or a package is missing."""
    img, patch, _ = patch_grid(img_size, patch_size)
    check_heads("", embed_dim, num_heads)
    model = Segmenter(
        img_size=img,
        patch_size=patch,  # type: ignore[arg-type]
        in_chans=in_chans,
        num_classes=0,
        global_pool="",
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        drop_path_rate=drop_path,
        norm_layer=LayerNorm,
        block_fn=Block,
    )
    model.decode_head = DECODE_HEADS[head](model, num_classes)
    if not model.decode_head.normed:
        model.norm = nn.Identity()
    return model


@torch.no_grad()
def sliding_logits(model: Segmenter, images: Tensor, stride: tuple[int, int], most: int) -> Tensor:
    """Logits (B, classes, H, W) of images (B, C, H, W) that are no smaller than the model's windows.

    Windows lie `stride` (down, across) apart, the last ones at the border. Where they overlap, logits are averaged, as
    in mmsegmentation's mode "slide". At most `most` windows are computed at a time.
    """
    height, width = model.patch_embed.img_size  # type: ignore[misc]
    tops, lefts = (
        window_starts(side, window, step)
        for side, window, step in zip(images.shape[2:], (height, width), stride, strict=True)
    )
    corners = [(top, left) for top in tops for left in lefts]
    total, count = None, None
    per_pass = max(1, most // len(images))
    for first in range(0, len(corners), per_pass):
        chosen = corners[first : first + per_pass]
        windows = [images[:, :, top : top + height, left : left + width] for top, left in chosen]
        logits = model(torch.cat(windows)).float()
        if len(corners) == 1:
            return logits
        if total is None or count is None:
            total = logits.new_zeros(len(images), logits.shape[1], *images.shape[2:])
            count = logits.new_zeros(1, 1, *images.shape[2:])
        for (top, left), window in zip(chosen, logits.split(len(images)), strict=True):
            total[:, :, top : top + height, left : left + width] += window
            count[:, :, top : top + height, left : left + width] += 1
    assert total is not None and count is not None
    return total / count


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side so that they cover it: every `stride`, and the last one at the border."""
    return [*range(0, side - window, stride), max(0, side - window)]
