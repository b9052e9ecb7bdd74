"""What we are measured against, rebuilt from descriptions or taken from their packages."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mae.models.positions import sincos_pos_embed

MASK_RATIO = 0.75
VIT_BASE: dict[str, Any] = dict(
    img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0
)
DECODER: dict[str, Any] = dict(
    decoder_embed_dim=512,
    decoder_depth=8,
    decoder_num_heads=16,
    norm_pix_loss=True,
    decoder="self",
    mask_tokens="decoder",
)


class ReferenceMAE(nn.Module):
    """facebookresearch/mae's ViT-B/16 as described: standard attention, every gather, mask tokens put in order,
    predictions and targets of all patches. Written from the paper and the reference's description.
    """

    def __init__(self, depth: int = 12, decoder_depth: int = 8):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.proj = nn.Conv2d(3, 768, 16, 16)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 768) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(1, 1, 512) * 0.02)
        embeds = (sincos_pos_embed(dim, (14, 14)).float()[None] for dim in (768, 512))
        self.pos_embed, self.decoder_pos_embed = (nn.Parameter(e, requires_grad=False) for e in embeds)
        block = partial(Block, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(block(768, 12) for _ in range(depth))
        self.norm = norm(768)
        self.decoder_embed = nn.Linear(768, 512)
        self.decoder_blocks = nn.ModuleList(block(512, 16) for _ in range(decoder_depth))
        self.decoder_norm = norm(512)
        self.decoder_pred = nn.Linear(512, 768)
        for attn in self.modules():
            if isinstance(attn, Attention):
                attn.fused_attn = False  # type: ignore[misc]  # the reference's timm had no fused kernel

    def forward(self, images: Tensor, mask_ratio: float) -> Tensor:
        x = self.proj(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        batch, length, dim = x.shape
        shuffle = torch.rand(batch, length, device=x.device).argsort(1)
        restore, keep = shuffle.argsort(1), int(length * (1 - mask_ratio))
        x = x.gather(1, shuffle[:, :keep, None].expand(-1, -1, dim))
        mask = torch.ones(batch, length, device=x.device)
        mask[:, :keep] = 0
        mask = mask.gather(1, restore)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        tokens = torch.cat([x[:, 1:], self.mask_token.repeat(batch, length - keep, 1)], 1)
        tokens = tokens.gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], tokens], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        target = images.reshape(batch, 3, 14, 16, 14, 16).permute(0, 2, 4, 3, 5, 1).reshape(batch, length, -1)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


def transformers_mae() -> nn.Module:
    """transformers' ViTMAEForPreTraining, ViT-B/16, with norm_pix_loss; its attention as it comes (SDPA)."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True, mask_ratio=MASK_RATIO, layer_norm_eps=1e-6))


def timm_classifier() -> nn.Module:
    """timm's ViT-B/16 classifier as it comes (SDPA), mean pooling, drop path .1 as in fine-tuning."""
    return VisionTransformer(global_pool="avg", drop_path_rate=0.1)


def training_step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    device: str,
    dtype: torch.dtype,
    lr: float = 1e-4,
    fused: bool = False,
) -> Callable[[], None]:
    """A whole step: forward, backward, AdamW. `fused=False` is the optimiser as `torch.optim.AdamW` comes."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True if fused else None)

    def step() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def soft_targets(batch: int, classes: int, device: str) -> Tensor:
    """Mixup-like soft labels (batch, classes)."""
    return F.softmax(math.sqrt(classes) * torch.randn(batch, classes, device=device), -1)
