"""Classifiers: timm's VisionTransformer on our blocks."""

from functools import partial
from typing import Literal

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.models.layers import LAYER_NORM_EPS, Block, check_sizes

HEAD_STD = 2e-5  # reference, fine-tuning: the new head starts almost silent


def classifier(
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
    global_pool: Literal["avg", "token"],
) -> VisionTransformer:
    """A ViT classifier (B, C, H, W) -> (B, num_classes) whose state dict is exactly timm's.

    `global_pool="avg"`: mean of the patch tokens, `fc_norm`, head; no `norm` (reference, fine-tuning).
    `"token"`: `norm`, then the class token. `drop_path` rises linearly over the blocks from 0 to its value.
    Raises ValueError where sizes do not fit together.
    """
    img, patch = check_sizes(img_size, patch_size, embed_dim=(embed_dim, num_heads))
    model = VisionTransformer(
        img_size=img,
        patch_size=patch,  # type: ignore[arg-type]
        in_chans=in_chans,
        num_classes=num_classes,
        global_pool=global_pool,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        drop_path_rate=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),  # type: ignore[arg-type]
        block_fn=Block,
    )
    if isinstance(model.head, nn.Linear):
        nn.init.trunc_normal_(model.head.weight, std=HEAD_STD)
        nn.init.zeros_(model.head.bias)
    return model
