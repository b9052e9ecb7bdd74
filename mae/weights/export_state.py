"""What every export format needs of a model: its tensors and its sizes."""

from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.errors import UserError
from mae.models.decoders import DecoderSizes
from mae.models.mae import MaskedAutoencoder
from mae.models.vit import EncoderSizes, encoder_sizes
from mae.weights.names import State
from mae.weights.parts import fold_batch_norm


class Architecture(NamedTuple):
    """Sizes of a model, and what its classifier reads."""

    encoder: EncoderSizes
    decoder: DecoderSizes | None
    num_classes: int  # 0: no classifier
    global_pool: str
    class_token: bool


def architecture(model: nn.Module) -> Architecture:
    """Raises UserError where no format can hold such a model."""
    if isinstance(model, MaskedAutoencoder):
        return Architecture(encoder_sizes(model), model.decoder.sizes, 0, "token", True)
    if isinstance(model, VisionTransformer):
        has_class_token = model.cls_token is not None
        return Architecture(encoder_sizes(model), None, model.num_classes, model.global_pool, has_class_token)
    raise UserError(
        f"Only masked autoencoders and timm's vision transformers are exported, not a {type(model).__name__}."
    )


def weights(model: nn.Module, *, fold: bool) -> State:
    """The state dict on the CPU, each tensor on its own; `fold` joins a linear probe's BatchNorm and matrix."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    if fold and "head.1.weight" in state:
        fold_batch_norm(state)
    return state


def encoder_weights(model: nn.Module) -> State:
    """Tensors that timm's VisionTransformer has: a classifier's all, a masked autoencoder's encoder.

    A norm without weights, as the encoder of `model.decoder=cross` has, is one of ones and zeros.
    """
    decoder = model.decoder_keys() if isinstance(model, MaskedAutoencoder) else set()
    state = {name: tensor for name, tensor in weights(model, fold=True).items() if name not in decoder}
    if isinstance(model, MaskedAutoencoder) and "norm.weight" not in state:
        width = model.cls_token.shape[-1]
        state |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return state
