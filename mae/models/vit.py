"""Vision transformers: the autoencoder's encoder, and classifiers, which are timm's VisionTransformer on our blocks."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.errors import UserError
from mae.models.layers import Block, LayerNorm, block_sizes, check_heads, patch_grid, transformer_block
from mae.models.positions import fixed_position

HEAD_STD = 2e-5  # reference, fine-tuning: a new head starts with outputs near zero


class EncoderSizes(NamedTuple):
    """Sizes of an encoder or a classifier; image and patch are (height, width), `hidden` is the width of the MLPs."""

    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    hidden: int


class Encoder(nn.Module):
    """A vision transformer without a head, over all patches of an image or some; its state dict is timm's.

    Images are (B, C, H, W) floats, already normalised. Raises UserError where sizes contradict each other.
    """

    def __init__(
        self,
        img_size: int | list[int],
        patch_size: int | list[int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
    ):
        super().__init__()
        self.img_size, self.patch_size, self.grid_size = patch_grid(img_size, patch_size)
        check_heads("", embed_dim, num_heads)
        self.in_chans, self.num_patches = in_chans, self.grid_size[0] * self.grid_size[1]
        self.patch_values = self.patch_size[0] * self.patch_size[1] * in_chans
        self.patch_embed = PatchEmbed(self.img_size, self.patch_size, in_chans, embed_dim)  # type: ignore[arg-type]
        self.smaller_sizes: tuple[tuple[int, int], ...] = ()  # of images that an autoencoder trains with beside its own
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = fixed_position(embed_dim, self.grid_size)
        self.blocks = nn.ModuleList(transformer_block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(embed_dim)

    def encode(self, patches: Tensor, visible: Tensor | None) -> Tensor:
        """Patches (B, K, p * p * C) at positions `visible` (B, K), or all in order, to tokens (B, 1 + K, D)."""
        return self.norm(self.run_blocks(self.embed(patches, visible)))

    def run_blocks(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) after all blocks."""
        for block in self.blocks:
            x = block(x)
        return x

    def embed(self, patches: Tensor, visible: Tensor | None) -> Tensor:
        """The first block's input (B, 1 + K, D); arguments as in `encode`."""
        proj = self.patch_embed.proj
        weight = proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p * p * C), values in the order of `patchify`
        position = self.pos_embed[:, 1:] if visible is None else self.pos_embed[0, 1:][visible]
        x = F.linear(patches, weight, proj.bias) + position
        cls_token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens (B, 1 + L, D) of whole images, class token first, after `norm`."""
        return self.encode(self.patchify(images), None)

    def patchify(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to patches (B, L, p * p * C), values in the order row, column, channel."""
        channels, *size = images.shape[1:]
        if channels != self.in_chans or (*size,) not in (self.img_size, *self.smaller_sizes):
            raise UserError(
                f"Images are {' x '.join(map(str, images.shape[1:]))} (channels, height, width), but "
                f"the model takes {self.in_chans} x {self.img_size[0]} x {self.img_size[1]}: "
                "check model.in_chans and model.img_size."
            )
        (h, w), (p, q) = self.grid_of(images), self.patch_size
        x = images.reshape(-1, self.in_chans, h, p, w, q)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, h * w, p * q * self.in_chans)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of images."""
        return images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1]

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Patches (B, L, p * p * C) back to images (B, C, H, W)."""
        (h, w), (p, q) = self.grid_size, self.patch_size
        x = patches.reshape(-1, h, w, p, q, self.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_chans, h * p, w * q)


class Classifier(VisionTransformer):
    """timm's VisionTransformer, whose head may read a block's output, or all patch tokens."""

    layer: int | None = None  # the block whose output the head reads; None: after the last norm
    reads_patches = False  # whether the head gets all patch tokens (B, L, D)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.forward_head(self.head_tokens(x))

    def head_tokens(self, images: Tensor) -> Tensor:
        """The tokens (B, N, D) that `forward_head` takes."""
        return self.forward_features(images) if self.layer is None else block_output(self, images, self.layer)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return x[:, self.num_prefix_tokens :] if self.reads_patches else super().pool(x, pool_type)


def block_output(model: VisionTransformer, images: Tensor, layer: int) -> Tensor:
    """Tokens (B, N, D) after a block, 0 the first and -1 the last, without a norm."""
    return layer_tokens(model, images, [layer])[0]


def layer_tokens(model: VisionTransformer, images: Tensor, layers: Sequence[int | None]) -> list[Tensor]:
    """Tokens (B, N, D) after each of `layers` in one pass: blocks as in `block_output`, None after the last norm."""
    depth = len(model.blocks)
    blocks = [depth - 1 if layer is None else layer % depth for layer in layers]
    numbers = sorted(set(blocks))
    outputs = model.forward_intermediates(
        images,
        indices=numbers,
        return_prefix_tokens=True,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    assert isinstance(outputs, list)
    if model.num_prefix_tokens:  # each is then a pair, of which timm's annotation names only the first
        outputs = [torch.cat([prefix, patches], 1) for patches, prefix in outputs]
    tokens = dict(zip(numbers, outputs, strict=True))
    return [model.norm(tokens[k]) if layer is None else tokens[k] for layer, k in zip(layers, blocks, strict=True)]


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
    global_pool: Literal["avg", "token", ""],
) -> Classifier:
    """A ViT classifier (B, C, H, W) -> (B, num_classes) whose state dict is exactly timm's.

    `global_pool="avg"`: mean of the patch tokens, `fc_norm`, head; no `norm` (reference, fine-tuning).
    `"token"`: `norm`, then the class token. `""`: `norm`, and every token.
    `drop_path` rises linearly over the blocks from 0 to its value.
    Raises UserError where sizes contradict each other.
    """
    img, patch, _ = patch_grid(img_size, patch_size)
    check_heads("", embed_dim, num_heads)
    model = Classifier(
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
        norm_layer=LayerNorm,
        block_fn=Block,
    )
    if isinstance(model.head, nn.Linear):
        nn.init.trunc_normal_(model.head.weight, std=HEAD_STD)
        nn.init.zeros_(model.head.bias)
    return model


def encoder_sizes(model: Encoder | VisionTransformer) -> EncoderSizes:
    """Sizes of a classifier, or of an encoder or autoencoder."""
    proj = model.patch_embed.proj
    assert isinstance(proj, nn.Conv2d)
    (height, width), (down, across) = model.patch_embed.img_size, proj.kernel_size  # type: ignore[misc]
    num_heads, hidden = block_sizes(model.blocks[0])
    return EncoderSizes(
        img_size=(height, width),
        patch_size=(down, across),
        in_chans=proj.in_channels,
        embed_dim=proj.out_channels,
        depth=len(model.blocks),
        num_heads=num_heads,
        hidden=hidden,
    )
