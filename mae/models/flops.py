"""Floating point operations of the models, by formula."""

from typing import NamedTuple

from mae.models.layers import pair


class Flops(NamedTuple):
    """Operations of one image's forward pass, two a multiply-add; training takes three times that."""

    encoder: int
    decoder: int

    @property
    def total(self) -> int:
        return self.encoder + self.decoder


def flops(
    *,
    img_size: int | list[int],
    patch_size: int | list[int],
    in_chans: int,
    embed_dim: int,
    depth: int,
    mlp_ratio: float,
    decoder_embed_dim: int,
    decoder_depth: int,
    mask_ratio: float,
) -> Flops:
    """Matrix products of `MaskedAutoencoder.forward`; an encoder or classifier alone is `mask_ratio=0`."""
    img, patch = pair(img_size, "model.img_size"), pair(patch_size, "model.patch_size")
    patches = (img[0] // patch[0]) * (img[1] // patch[1])
    values = patch[0] * patch[1] * in_chans
    keep = int(patches * (1 - mask_ratio))
    removed = patches - keep
    encoder = keep * values * embed_dim + depth * _block(embed_dim, mlp_ratio, 1 + keep, 1 + keep)
    decoder = (1 + keep) * embed_dim * decoder_embed_dim + removed * decoder_embed_dim * values
    decoder += (decoder_depth - 1) * _block(decoder_embed_dim, mlp_ratio, 1 + patches, 1 + patches)
    decoder += _block(decoder_embed_dim, mlp_ratio, 1 + patches, removed)  # the last one's queries
    return Flops(2 * encoder, 2 * decoder)


def _block(dim: int, mlp_ratio: float, tokens: int, queries: int) -> int:
    """Multiply-adds of a block: keys and values of all tokens, the rest of those that go on."""
    hidden = int(dim * mlp_ratio)
    return 2 * dim**2 * tokens + queries * (2 * dim**2 + 2 * dim * hidden + 2 * dim * tokens)
