"""Decoders: from the encoder's tokens of the visible patches to a prediction of every patch.

A decoder is a class in `DECODERS`. `MaskedAutoencoder` builds the one called "self", from the keys of conf/model.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mae.errors import UserError
from mae.models.layers import LayerNorm, check_heads, transformer_block
from mae.models.recompute import norm_linear


class DecoderSizes(NamedTuple):
    """Sizes of a decoder; `width` is that of its tokens, `hidden` of its MLPs."""

    width: int
    depth: int
    num_heads: int
    hidden: int


class Decoder(nn.Module):
    """Base class of decoders.

    The autoencoder registers a decoder's layers as its own, since the reference's state dict has `decoder_norm` and not
    `decoder.decoder_norm`. So the names of layers begin with `decoder_`, and every parameter lies in a layer.
    """

    sizes: DecoderSizes

    def forward(self, tokens: Tensor, mask_token: Tensor, position: Tensor, first: int) -> Tensor:
        """Predictions (B, 1 + L - first, p * p * C) of the sequence [class, visible, masked] from its `first` token on.

        `tokens` (B, 1 + K, D) are the encoder's of class and visible patches, `mask_token` is (1, 1, W), and `position`
        (B, 1 + L, W) holds the position embedding of the whole sequence. `first` is 1 + K in training, 1 for pictures.
        """
        raise NotImplementedError


class SelfAttentionDecoder(Decoder):
    """The paper's decoder: self-attention among the tokens of all patches (section 3).

    The last block computes queries of the predicted tokens only, which changes neither loss nor gradients.
    """

    def __init__(
        self,
        embed_dim: int,
        patch_values: int,
        mlp_ratio: float,
        *,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
    ):
        super().__init__()
        check_heads("decoder_", decoder_embed_dim, decoder_num_heads)
        if decoder_depth < 1:
            raise UserError(f"model.decoder_depth must be at least 1, got {decoder_depth}.")
        hidden = int(decoder_embed_dim * mlp_ratio)
        self.sizes = DecoderSizes(decoder_embed_dim, decoder_depth, decoder_num_heads, hidden)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(
            transformer_block(decoder_embed_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = LayerNorm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_values)

    def forward(self, tokens: Tensor, mask_token: Tensor, position: Tensor, first: int) -> Tensor:
        encoded = tokens.shape[1]
        visible = self.decoder_embed(tokens) + position[:, :encoded]
        x = torch.cat([visible, mask_token + position[:, encoded:]], dim=1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, first)
        return norm_linear(x, self.decoder_norm, self.decoder_pred.weight, self.decoder_pred.bias)


DECODERS = {
    "self": SelfAttentionDecoder,
}
