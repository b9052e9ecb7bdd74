"""What every export format needs of a model: its tensors and its sizes."""

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.models.layers import LAYER_NORM_EPS
from mae.models.mae import MaskedAutoencoder
from mae.weights.export_card import Facts
from mae.weights.parts import fold_batch_norm
from mae.weights.read import DECODER

State = dict[str, Tensor]
LIBRARY = "mae-experiments"  # in files of ours that have no config.json


def weights(model: nn.Module, *, fold: bool) -> State:
    """The state dict on the CPU, each tensor on its own; `fold` joins a linear probe's BatchNorm and matrix."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    if fold and "head.1.weight" in state:
        fold_batch_norm(state)
    return state


def encoder_weights(model: nn.Module) -> State:
    """Tensors that timm's VisionTransformer has: a classifier's all, a masked autoencoder's encoder."""
    state = weights(model, fold=True)
    return {name: tensor for name, tensor in state.items() if not name.startswith(DECODER)}


def sizes(model: nn.Module) -> dict[str, Any]:
    """Sizes under the names of `model.*`, image and patch as (height, width); and what a classifier reads."""
    if not isinstance(model, MaskedAutoencoder | VisionTransformer):
        raise ValueError(
            f"Only masked autoencoders and timm's vision transformers are exported, not a {type(model).__name__}."
        )
    blocks: Any = model.blocks
    size = {
        "img_size": tuple(model.patch_embed.img_size),  # type: ignore[arg-type]
        "patch_size": tuple(model.patch_embed.patch_size),  # type: ignore[arg-type]
        "in_chans": model.in_chans,
        "embed_dim": model.pos_embed.shape[-1],  # type: ignore[union-attr]
        "depth": len(blocks),
        "num_heads": blocks[0].attn.num_heads,
        "hidden": blocks[0].mlp.fc1.out_features,
    }
    if isinstance(model, MaskedAutoencoder):
        decoder = model.decoder.sizes
        return size | {
            "num_classes": 0,
            "global_pool": "token",
            "class_token": True,
            "decoder_embed_dim": decoder.width,
            "decoder_depth": decoder.depth,
            "decoder_num_heads": decoder.num_heads,
            "decoder_hidden": decoder.hidden,
        }
    return size | {
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "class_token": model.cls_token is not None,
    }


def description(model: nn.Module, facts: Facts) -> dict[str, Any]:
    """What no tensor says of a model, in numbers and text: for the formats that have no config of their own."""
    size = sizes(model)
    stated: dict[str, Any] = {"library": LIBRARY, "layer_norm_eps": LAYER_NORM_EPS, "hidden_act": "gelu"}
    stated |= {key: list(size[key]) for key in ("img_size", "patch_size")} | {"num_heads": size["num_heads"]}
    stated |= {"mean": list(facts.mean), "std": list(facts.std)}
    stated |= {"rescale_factor": 1 / facts.top} if facts.top else {}
    if isinstance(model, MaskedAutoencoder) and not facts.encoder_only:
        stated |= {"decoder_num_heads": size["decoder_num_heads"], "norm_pix_loss": model.norm_pix_loss}
        stated |= {"mask_ratio": facts.mask_ratio}
    return stated
