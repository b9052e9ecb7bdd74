"""Decoders: from the encoder's tokens to a prediction of patches.

A decoder is a class in `DECODERS`, which `model.decoder` chooses.
"""

from typing import NamedTuple

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae.errors import UserError
from mae.models.layers import BlockBase, LayerNorm, attention, check_heads, transformer_block
from mae.models.recompute import norm_linear


class DecoderSizes(NamedTuple):
    """Sizes of a decoder; `width` is that of its tokens."""

    width: int
    depth: int
    num_heads: int
    mlp_ratio: float

    @property
    def hidden(self) -> int:
        """Width of the MLPs."""
        return int(self.width * self.mlp_ratio)


class Sequence(NamedTuple):
    """The tokens [class, visible, masked] of each image as a decoder knows them: by their positions.

    A prediction is asked for every token from number `first` on. That is 1 for pictures, and past the visible ones in
    training.
    """

    mask_token: Tensor  # (1, 1, W); (1, 1, D) where the encoder has had it already
    positions: Tensor  # (1 + L, W), the class token's first
    rows: Tensor  # (B, 1 + L): each token's row of `positions`
    first: int

    def position(self, start: int, end: int | None = None) -> Tensor:
        """Position embeddings (B, end - start, W) of the tokens from `start` to before `end`."""
        return self.positions[self.rows[:, start:end]]


class Decoder(nn.Module):
    """Base class of decoders.

    They predict `outputs` values a patch from the tokens of an encoder `embed_dim` wide with `depth` blocks. The
    autoencoder registers a decoder's layers as its own, since the reference's state dict has `decoder_norm` and not
    `decoder.decoder_norm`. So the names of layers begin with `decoder_`, and every parameter lies in a layer.
    """

    reads_blocks = False  # whether `tokens` are those of all encoder blocks, and the encoder's last norm is left out

    def __init__(self, embed_dim: int, depth: int, outputs: int, sizes: DecoderSizes):
        super().__init__()
        self.sizes = sizes

    def forward(self, tokens: Tensor, sequence: Sequence) -> Tensor:
        """Predictions (B, 1 + L - first, outputs) of the sequence [class, visible, masked] from `first` on.

        `tokens` (B, N, D) are the encoder's of the first N of the sequence: class and visible patches, or all where
        `model.mask_tokens=encoder`. With `reads_blocks` they are (1 + depth, B, N, D): the encoder's input and the
        output of each block.
        """
        raise NotImplementedError


class SelfAttentionDecoder(Decoder):
    """The paper's decoder: self-attention among the tokens of all patches (section 3).

    The last block computes queries of the predicted tokens only, which changes neither loss nor gradients.
    """

    def __init__(self, embed_dim: int, depth: int, outputs: int, sizes: DecoderSizes):
        super().__init__(embed_dim, depth, outputs, sizes)
        check_sizes(sizes)
        width, blocks, num_heads, mlp_ratio = sizes
        self.decoder_embed = nn.Linear(embed_dim, width)
        self.decoder_blocks = nn.ModuleList(transformer_block(width, num_heads, mlp_ratio) for _ in range(blocks))
        self.decoder_norm = LayerNorm(width)
        self.decoder_pred = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor, sequence: Sequence) -> Tensor:
        encoded = tokens.shape[1]
        x = self.decoder_embed(tokens) + sequence.position(0, encoded)
        if encoded < sequence.rows.shape[1]:
            x = torch.cat([x, sequence.mask_token + sequence.position(encoded)], dim=1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, sequence.first)
        return norm_linear(x, self.decoder_norm, self.decoder_pred.weight, self.decoder_pred.bias)


class CrossAttention(nn.Module):
    """The layers of attention from a decoder's tokens to the encoder's."""

    def __init__(self, embed_dim: int, width: int):
        super().__init__()
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(embed_dim, 2 * width)
        self.proj = nn.Linear(width, width)


class CrossBlock(BlockBase):
    """Attention to the encoder's tokens, and an MLP; tokens of the decoder do not see each other."""

    def __init__(self, embed_dim: int, sizes: DecoderSizes):
        super().__init__()
        self.num_heads = sizes.num_heads
        self.norm1 = LayerNorm(sizes.width)
        self.cross_attn = CrossAttention(embed_dim, sizes.width)
        self.norm2 = LayerNorm(sizes.width)
        self.mlp = Mlp(sizes.width, sizes.hidden)

    def forward(self, x: Tensor, encoded: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Tokens (B, M, W) after attention to `norm(encoded)`, which is (B, N, D)."""
        if self.checkpointing == "blocks" and torch.is_grad_enabled():
            return checkpoint(self._forward, x, encoded, norm, use_reentrant=False)
        return self._forward(x, encoded, norm)

    def _forward(self, x: Tensor, encoded: Tensor, norm: nn.LayerNorm) -> Tensor:
        attn, recompute = self.cross_attn, self.checkpointing != "none"
        q = norm_linear(x, self.norm1, attn.q.weight, attn.q.bias, recompute)
        k, v = norm_linear(encoded, norm, attn.kv.weight, attn.kv.bias, recompute).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        x = x + attn.proj(attention(q, k, v, self.kernel).flatten(2))
        return x + self._mlp(x)


class BlockMixture(nn.Module):
    """Learned weights (decoder blocks, 1 + encoder blocks) of the encoder's states, without a bias."""

    def __init__(self, states: int, mixtures: int):
        super().__init__()
        self.linear = nn.Linear(states, mixtures, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """States (S, B, N, D) to their mixtures (M, B, N, D)."""
        return (self.linear.weight @ states.flatten(1)).unflatten(1, states.shape[1:])


class CrossAttentionDecoder(Decoder):
    """CrossMAE's decoder (Fu et al., arXiv 2401.14391, section 3): masked patches attend to the encoder's tokens alone.

    Each block attends to its own mixture of the encoder's input and the outputs of its blocks. A patch is predicted
    whichever others are. Names of layers are the published code's, also where they do not begin with `decoder_`.
    """

    reads_blocks = True

    def __init__(self, embed_dim: int, depth: int, outputs: int, sizes: DecoderSizes):
        super().__init__(embed_dim, depth, outputs, sizes)
        check_sizes(sizes)
        self.dec_norms = nn.ModuleList(LayerNorm(embed_dim) for _ in range(sizes.depth))
        self.wfm = BlockMixture(1 + depth, sizes.depth)
        self.decoder_blocks = nn.ModuleList(CrossBlock(embed_dim, sizes) for _ in range(sizes.depth))
        self.decoder_norm = LayerNorm(sizes.width)
        self.decoder_pred = nn.Linear(sizes.width, outputs)

    def forward(self, tokens: Tensor, sequence: Sequence) -> Tensor:
        x = sequence.mask_token + sequence.position(sequence.first)
        for block, norm, mixture in zip(self.decoder_blocks, self.dec_norms, self.wfm(tokens).unbind(), strict=True):
            x = block(x, mixture, norm)
        return norm_linear(x, self.decoder_norm, self.decoder_pred.weight, self.decoder_pred.bias)


class LinearDecoder(Decoder):
    """One layer on the encoder's tokens, as in SimMIM (arXiv 2111.09886): for mask tokens in the encoder."""

    def __init__(self, embed_dim: int, depth: int, outputs: int, sizes: DecoderSizes):
        super().__init__(embed_dim, depth, outputs, sizes._replace(width=embed_dim, depth=0))
        self.decoder_pred = nn.Linear(embed_dim, outputs)

    def forward(self, tokens: Tensor, sequence: Sequence) -> Tensor:
        return self.decoder_pred(tokens[:, sequence.first :])


def check_sizes(sizes: DecoderSizes) -> None:
    """Raises UserError where sizes of a decoder of blocks contradict each other."""
    check_heads("decoder_", sizes.width, sizes.num_heads)
    if sizes.depth < 1:
        raise UserError(f"model.decoder_depth must be at least 1, got {sizes.depth}.")


DECODERS = {
    "self": SelfAttentionDecoder,
    "cross": CrossAttentionDecoder,
    "linear": LinearDecoder,
}
