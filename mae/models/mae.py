"""The masked autoencoder (He et al., arXiv 2111.06377) with the reference implementation's state dict."""

from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from mae.models.layers import LAYER_NORM_EPS, Block, check_sizes, sincos_pos_embed
from mae.models.recompute import norm_linear


class MaskedLoss(NamedTuple):
    """What pretraining needs: the mean loss over removed patches, and which those were."""

    loss: Tensor  # ()
    mask: Tensor  # (B, L), 1 = removed


class Prediction(NamedTuple):
    """What pictures need: every patch's prediction, in the image's order."""

    pred: Tensor  # (B, L, p * p * C), normalised per patch where norm_pix_loss is on
    mask: Tensor  # (B, L), 1 = removed


class MaskedAutoencoder(nn.Module):
    """Encoder over the kept patches, light decoder over all, loss on the removed ones (paper, section 3).

    Three savings change neither loss nor gradients: only kept patches are embedded; the decoder takes its
    tokens as [class, kept, removed] with matching positions, so that nothing is put back in order; its last
    block computes queries, and the head predictions, of removed patches only.

    Images are (B, C, H, W) floats, already normalised. Raises ValueError where sizes do not fit together.
    """

    def __init__(
        self,
        *,
        img_size: Annotated[int, "[1, inf)"] | list[Annotated[int, "[1, inf)"]],
        patch_size: Annotated[int, "[1, inf)"] | list[Annotated[int, "[1, inf)"]],
        in_chans: Annotated[int, "[1, inf)"],
        embed_dim: Annotated[int, "[1, inf)"],
        depth: Annotated[int, "[1, inf)"],
        num_heads: Annotated[int, "[1, inf)"],
        mlp_ratio: Annotated[float, "(0, inf)"],
        decoder_embed_dim: Annotated[int, "[1, inf)"],
        decoder_depth: Annotated[int, "[1, inf)"],
        decoder_num_heads: Annotated[int, "[1, inf)"],
        norm_pix_loss: bool,
    ):
        super().__init__()
        self.img_size, self.patch_size = check_sizes(
            img_size,
            patch_size,
            embed_dim=(embed_dim, num_heads),
            decoder_embed_dim=(decoder_embed_dim, decoder_num_heads),
        )
        values = self.patch_size[0] * self.patch_size[1] * in_chans  # in a patch
        if decoder_depth < 1:
            raise ValueError(f"model.decoder_depth must be at least 1, got {decoder_depth}.")
        if norm_pix_loss and values < 2:
            raise ValueError("task.norm_pix_loss needs patches of more than one value: raise model.patch_size.")
        self.in_chans, self.norm_pix_loss = in_chans, norm_pix_loss
        norm: Any = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        block = partial(Block, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm)

        self.patch_embed = PatchEmbed(self.img_size, self.patch_size, in_chans, embed_dim)  # type: ignore[arg-type]
        self.grid_size: tuple[int, int] = self.patch_embed.grid_size  # type: ignore[assignment]
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = self._position(embed_dim)
        self.blocks = nn.ModuleList(block(embed_dim, num_heads) for _ in range(depth))
        self.norm = norm(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = self._position(decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = norm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, values)
        self._init_weights()

    def _position(self, dim: int) -> nn.Parameter:
        """Fixed position embedding (1, 1 + L, dim), rounded to float32 as in released checkpoints."""
        embed = sincos_pos_embed(dim, self.grid_size).float().to(torch.get_default_dtype())
        return nn.Parameter(embed[None], requires_grad=False)

    def _init_weights(self) -> None:
        """The reference's initialisation (its code; the paper's appendix A.1 names xavier-uniform)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)  # qkv counts as one matrix
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.patch_embed.proj.out_channels, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask_ratio: float, noise: Tensor | None = None) -> MaskedLoss:
        """Mean squared error over the removed patches of each image.

        `noise` is (B, L), fresh and uniform where None; the `int(L * (1 - mask_ratio))` smallest are kept.
        Raises ValueError where that keeps none or all, or where images have another size than the model.
        """
        keep = self._num_kept(mask_ratio)
        if keep == self.num_patches:
            raise ValueError(f"task.mask_ratio {mask_ratio} removes none of {self.num_patches} patches: raise it.")
        patches = self.patchify(images)
        order, mask = self._masking(images, keep, noise)
        kept, removed = order[:, :keep], order[:, keep:]
        pred = self._decode(self._encode(_take(patches, kept), kept), order, first=1 + keep)
        return MaskedLoss(F.mse_loss(pred, self._normalise(_take(patches, removed))), mask)

    def predict(self, images: Tensor, mask_ratio: float, noise: Tensor | None = None) -> Prediction:
        """Predictions of all patches, kept ones too, in the image's order; arguments as in `forward`."""
        order, mask = self._masking(images, keep := self._num_kept(mask_ratio), noise)
        kept = order[:, :keep]
        pred = self._decode(self._encode(_take(self.patchify(images), kept), kept), order, first=1)
        return Prediction(_take(pred, order.argsort(1)), mask)

    def forward_features(self, images: Tensor) -> Tensor:
        """Encoder output (B, 1 + L, D) of whole images, class token first, after `norm`."""
        return self._encode(self.patchify(images), None)

    def target(self, images: Tensor) -> Tensor:
        """What is to be predicted for every patch, (B, L, p * p * C)."""
        return self._normalise(self.patchify(images))

    def patchify(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to patches (B, L, p * p * C), values in the order row, column, channel."""
        if images.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(
                f"Images are {' x '.join(map(str, images.shape[1:]))} (channels, height, width), but "
                f"the model takes {self.in_chans} x {self.img_size[0]} x {self.img_size[1]}: "
                "check model.in_chans and model.img_size."
            )
        (h, w), (p, q) = self.grid_size, self.patch_size
        x = images.reshape(-1, self.in_chans, h, p, w, q)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, h * w, p * q * self.in_chans)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Patches (B, L, p * p * C) back to images (B, C, H, W)."""
        (h, w), (p, q) = self.grid_size, self.patch_size
        x = patches.reshape(-1, h, w, p, q, self.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_chans, h * p, w * q)

    @staticmethod
    def random_mask(noise: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Order (B, L) of patches by noise, the first `keep` being kept, and mask (B, L), 1 = removed."""
        order = noise.argsort(dim=1, stable=True)  # stable: ties fall the same way on every device
        return order, torch.ones_like(noise).scatter_(1, order[:, :keep], 0.0)

    def _masking(self, images: Tensor, keep: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        if noise is None:
            noise = torch.rand(images.shape[0], self.num_patches, device=images.device)
        return self.random_mask(noise, keep)

    def _num_kept(self, mask_ratio: float) -> int:
        keep = int(self.num_patches * (1 - mask_ratio))
        if not 1 <= keep <= self.num_patches:
            raise ValueError(
                f"task.mask_ratio {mask_ratio} keeps {keep} of {self.num_patches} patches, but at least one "
                "must be kept: choose a ratio in [0, 1) that does."
            )
        return keep

    def _encode(self, patches: Tensor, kept: Tensor | None) -> Tensor:
        """Patches (B, K, p * p * C) at positions `kept` (B, K), or all in order, to tokens (B, 1 + K, D)."""
        proj = self.patch_embed.proj
        weight = proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p * p * C), values in the order of `patchify`
        position = self.pos_embed[:, 1:] if kept is None else self.pos_embed[0, 1:][kept]
        x = F.linear(patches, weight, proj.bias) + position
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _decode(self, latent: Tensor, order: Tensor, first: int) -> Tensor:
        """Encoder's tokens (B, 1 + K, D) to predictions from `first` on in [class, kept, removed]."""
        position = self.decoder_pos_embed[0, 1:][order]  # (B, L, D), kept patches' first
        keep = latent.shape[1] - 1
        x = self.decoder_embed(latent)
        kept = x[:, 1:] + position[:, :keep]
        cls_token = (x[:, :1] + self.decoder_pos_embed[:, :1]).to(kept.dtype)
        x = torch.cat([cls_token, kept, self.mask_token + position[:, keep:]], dim=1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, first)
        return norm_linear(x, self.decoder_norm, self.decoder_pred.weight, self.decoder_pred.bias)

    def _normalise(self, patches: Tensor) -> Tensor:
        """Patches less their mean, over their deviation, where norm_pix_loss is on (paper, section 3)."""
        if not self.norm_pix_loss:
            return patches
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased, as the reference's
        return (patches - mean) / (var + 1e-6).sqrt()


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, N, D) at positions `index` (B, K)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
