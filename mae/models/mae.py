"""The masked autoencoder (He et al., arXiv 2111.06377) with the reference implementation's state dict.

The encoder is in `vit.py`, the decoder in `decoders.py`, what is predicted in `targets.py`; here they are joined.
"""

from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae.errors import UserError
from mae.models.decoders import DECODERS, Decoder, DecoderSizes, Sequence
from mae.models.layers import LayerNorm
from mae.models.masking import count_predicted, count_visible, order_by_noise
from mae.models.positions import fixed_position
from mae.models.target import Patches, Target
from mae.models.targets import PixelTarget
from mae.models.vit import Encoder


class MaskedLoss(NamedTuple):
    """Result of a training step's forward pass."""

    loss: Tensor  # (): mean over the predicted patches of all images
    mask: Tensor  # (B, L), 1 = masked


class Prediction(NamedTuple):
    """Predictions of every patch, in the image's order."""

    pred: Tensor  # (B, L, size), as the target has its values
    mask: Tensor  # (B, L), 1 = masked


class MaskedAutoencoder(Encoder):
    """Encoder over the visible patches, small decoder over all, loss on the masked ones (paper, section 3).

    Two savings change neither loss nor gradients. Only visible patches are embedded. The decoder takes its tokens as
    [class, visible, masked] with their own positions, so that no token has to be put back in the image's order.

    With `mask_tokens="encoder"` mask tokens stand for the masked patches in the encoder already (table 1c).

    Images are (B, C, H, W) floats, already normalised. `target` is what is predicted, pixels where None. Raises
    UserError where sizes contradict each other.
    """

    decoder: Decoder

    def __init__(
        self,
        target: Target | None = None,
        *,
        img_size: Annotated[int, "[1, inf)"] | list[Annotated[int, "[1, inf)"]],
        patch_size: Annotated[int, "[1, inf)"] | list[Annotated[int, "[1, inf)"]],
        in_chans: Annotated[int, "[1, inf)"],
        embed_dim: Annotated[int, "[1, inf)"],
        depth: Annotated[int, "[1, inf)"],
        num_heads: Annotated[int, "[1, inf)"],
        mlp_ratio: Annotated[float, "(0, inf)"],
        decoder: str,
        mask_tokens: Literal["decoder", "encoder"],
        decoder_embed_dim: Annotated[int, "[1, inf)"],
        decoder_depth: Annotated[int, "[1, inf)"],
        decoder_num_heads: Annotated[int, "[1, inf)"],
        norm_pix_loss: bool,
    ):
        super().__init__(img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio)
        self.norm_pix_loss = norm_pix_loss
        self.target = target or PixelTarget(Patches(self.grid_size, self.patch_size, in_chans, norm_pix_loss))
        self.decoder_name, self.mask_tokens = decoder, mask_tokens
        sizes = DecoderSizes(decoder_embed_dim, decoder_depth, decoder_num_heads, mlp_ratio)
        self._register(DECODERS[decoder](embed_dim, depth, self.target.size, sizes))
        self._init_weights()

    def _register(self, decoder: Decoder) -> None:
        """Makes a decoder's layers the autoencoder's own: the state dict has `decoder_norm`, as the reference's.

        Where the decoder reads all blocks, the encoder's norm gets no weights, which nothing would train.
        """
        assert not [*decoder.parameters(recurse=False)], "a decoder's parameters lie in its layers"
        embed_dim = self.cls_token.shape[-1]
        if decoder.reads_blocks:
            self.norm = LayerNorm(embed_dim, elementwise_affine=False)
        width = embed_dim if self.mask_tokens == "encoder" else decoder.sizes.width
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed = fixed_position(decoder.sizes.width, self.grid_size)
        for name, layer in decoder.named_children():
            self.add_module(name, layer)
        vars(self)["decoder"] = decoder  # an attribute that is no submodule

    def _init_weights(self) -> None:
        """The reference's initialisation (its code; the paper's appendix A.1 names xavier-uniform)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)  # qkv counts as one matrix
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.patch_embed.proj.out_channels, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def decoder_keys(self) -> set[str]:
        """Names of the tensors of the decoder and the target in the state dict."""
        of_target = (f"target.{name}" for name in self.target.state_dict())
        return {"mask_token", "decoder_pos_embed", *self.decoder.state_dict(), *of_target}

    def forward(
        self, images: Tensor, mask_ratio: float, noise: Tensor | None = None, predict_ratio: float | None = None
    ) -> MaskedLoss:
        """The target's mean loss over the masked patches of each image, or over those of largest noise.

        Images may also be of one of `smaller_sizes`: their grid is then a corner of the model's own, whose positions it
        has. `noise` is (B, L), new and uniform where None; the `int(L * (1 - mask_ratio))` smallest are visible.
        `predict_ratio` is the share of all patches that is predicted, None for all masked ones. Raises UserError where
        no patch is visible or none is masked, or where images have another size than the model.
        """
        patches = self.patchify(images)
        count = patches.shape[1]
        num_visible = count_visible(count, mask_ratio)
        if num_visible == count:
            raise UserError(f"task.mask_ratio {mask_ratio} removes none of {count} patches: raise it.")
        order, mask = order_by_noise(self._noise(patches, noise), num_visible)
        predicted = order[:, count - count_predicted(count, mask_ratio, predict_ratio) :]
        pred = self._predict(patches, self.grid_of(images), order, num_visible, predicted.shape[1])
        with torch.no_grad():
            target = _gather(self.target(images, patches), predicted)
        return MaskedLoss(self.target.loss(pred, target), mask)

    def predict(self, images: Tensor, mask_ratio: float, noise: Tensor | None = None) -> Prediction:
        """Predictions of all patches, visible ones too, in the image's order; arguments as in `forward`."""
        patches = self.patchify(images)
        num_visible = count_visible(patches.shape[1], mask_ratio)
        order, mask = order_by_noise(self._noise(patches, noise), num_visible)
        pred = self._predict(patches, self.grid_of(images), order, num_visible, patches.shape[1])
        return Prediction(_gather(pred, order.argsort(1)), mask)

    def _noise(self, patches: Tensor, noise: Tensor | None) -> Tensor:
        return torch.rand(patches.shape[:2], device=patches.device) if noise is None else noise

    def _predict(
        self, patches: Tensor, grid: tuple[int, int], order: Tensor, num_visible: int, num_predicted: int
    ) -> Tensor:
        """Predictions of the last `num_predicted` patches in the `order` (B, L): visible first, then masked."""
        positions = self.own_positions(order, grid)
        rows = F.pad(positions + 1, (1, 0))  # (B, 1 + L): rows of the position embedding, the class token's is 0
        first = rows.shape[1] - num_predicted
        tokens = self.encode_masked(_gather(patches, order[:, :num_visible]), positions)
        return self.decoder(tokens, Sequence(self.mask_token, self.decoder_pos_embed[0], rows, first))

    def own_positions(self, order: Tensor, grid: tuple[int, int]) -> Tensor:
        """Numbers (B, L) of patches in a `grid` of at most the model's, as numbers in the model's own grid.

        Sine-cosine positions depend on row and column alone. So the rows of the model's own table are exactly the table
        of the smaller grid.
        """
        if grid == self.grid_size:
            return order
        return order.div(grid[1], rounding_mode="floor") * self.grid_size[1] + order % grid[1]

    def encode_masked(self, visible: Tensor, positions: Tensor) -> Tensor:
        """What the decoder reads, of visible patches (B, K, p * p * C) and the `positions` (B, L) of all, theirs first.

        That is tokens (B, N, D) of the class and visible patches, of all with mask tokens in the encoder; for a decoder
        that reads all blocks (1 + depth, B, N, D).
        """
        num_visible = visible.shape[1]
        x = self.embed(visible, positions[:, :num_visible])
        if self.mask_tokens == "encoder":
            x = torch.cat([x, self.mask_token + self.pos_embed[0, 1:][positions[:, num_visible:]]], dim=1)
        if not self.decoder.reads_blocks:
            return self.norm(self.run_blocks(x))
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return torch.stack(states)


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, N, D) or numbers (B, N) at positions `index` (B, K)."""
    if tokens.ndim == 2:
        return tokens.gather(1, index)
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
