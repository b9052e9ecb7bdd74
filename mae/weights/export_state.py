"""What every export format needs of a model: its tensors and its sizes."""

from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.errors import UserError
from mae.models.decoders import DecoderSizes
from mae.models.mae import MaskedAutoencoder
from mae.models.segmenter import Segmenter
from mae.models.vit import EncoderSizes, encoder_sizes
from mae.weights.names import State
from mae.weights.parts import fold_batch_norm

TIMM_NAMES = {  # (patch, width, blocks, heads) of timm's plain ViTs
    (16, 192, 12, 3): "vit_tiny_patch16_224",
    (32, 384, 12, 6): "vit_small_patch32_224",
    (16, 384, 12, 6): "vit_small_patch16_224",
    (8, 384, 12, 6): "vit_small_patch8_224",
    (32, 768, 12, 12): "vit_base_patch32_224",
    (16, 768, 12, 12): "vit_base_patch16_224",
    (8, 768, 12, 12): "vit_base_patch8_224",
    (32, 1024, 24, 16): "vit_large_patch32_224",
    (16, 1024, 24, 16): "vit_large_patch16_224",
    (14, 1024, 24, 16): "vit_large_patch14_224",
    (14, 1280, 32, 16): "vit_huge_patch14_224",
}


class Architecture(NamedTuple):
    """Sizes of a model, and what its classifier reads."""

    encoder: EncoderSizes
    decoder: DecoderSizes | None
    num_classes: int  # of a classifier or a segmenter; 0: neither
    global_pool: str
    class_token: bool


def architecture(model: nn.Module) -> Architecture:
    """Raises UserError where no format can hold such a model."""
    if isinstance(model, MaskedAutoencoder):
        return Architecture(encoder_sizes(model), model.decoder.sizes, 0, "token", True)
    if isinstance(model, VisionTransformer):
        has_class_token = model.cls_token is not None
        classes = model.decode_head.num_classes if isinstance(model, Segmenter) else model.num_classes
        return Architecture(encoder_sizes(model), None, classes, model.global_pool, has_class_token)
    raise UserError(
        f"Only masked autoencoders and timm's vision transformers are exported, not a {type(model).__name__}."
    )


def timm_model(net: Architecture) -> tuple[str, dict[str, object]]:
    """timm's name for such a model, and what must be passed besides `num_classes`."""
    size, (height, width) = net.encoder, net.encoder.patch_size
    key = (height, size.embed_dim, size.depth, size.num_heads)
    arguments: dict[str, object] = {"global_pool": net.global_pool}
    plain = height == width and size.hidden == 4 * size.embed_dim and key in TIMM_NAMES
    if not plain:
        arguments |= {"patch_size": height if height == width else [height, width]}
        arguments |= {"embed_dim": size.embed_dim, "depth": size.depth, "num_heads": size.num_heads}
        arguments["mlp_ratio"] = size.hidden / size.embed_dim
    if size.img_size != (224, 224):
        arguments["img_size"] = list(size.img_size)
    if size.in_chans != 3:
        arguments["in_chans"] = size.in_chans
    if not net.class_token:
        arguments["class_token"] = False
    return TIMM_NAMES[key] if plain else "vit_base_patch16_224", arguments


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
