"""Whether a timm model computes the same function as ours.

Activation, norms, pooling and the order of layers are in no tensor, so the model object is read. Only layers of a list
of known ones pass.
"""

import re
from inspect import signature
from typing import Any

import timm
import torch
from timm.layers.activations import GELU
from timm.models import is_model_in_modules
from timm.models.vision_transformer import (  # whose layers moved to timm.layers in later versions
    Attention,  # pyright: ignore[reportPrivateImportUsage]
    Block,
    LayerScale,  # pyright: ignore[reportPrivateImportUsage]
    Mlp,  # pyright: ignore[reportPrivateImportUsage]
    PatchEmbed,  # pyright: ignore[reportPrivateImportUsage]
    VisionTransformer,
)
from torch import nn

from mae.errors import UserError
from mae.models.layers import LAYER_NORM_EPS
from mae.weights.metadata import Settings
from mae.weights.names import State

MODULES = ("vision_transformer", "deit")  # of timm.models: those that hold plain vision transformers
NORMS = ("LayerNorm", "LayerNormFp32")  # the same function in float32
INERT = (nn.Identity, nn.Dropout)  # do nothing in evaluation
TYPES: tuple[tuple[str, tuple[type, ...]], ...] = (
    (r"patch_embed", (PatchEmbed,)),
    (r"patch_embed\.proj", (nn.Conv2d,)),
    (r"blocks", (nn.Sequential,)),
    (r"blocks\.\d+", (Block,)),
    (r"blocks\.\d+\.attn", (Attention,)),
    (r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])", (nn.Linear,)),
    (r"blocks\.\d+\.ls[12]", (LayerScale,)),  # folded into the matrix before it
    (r"blocks\.\d+\.mlp", (Mlp,)),
    (r"blocks\.\d+\.mlp\.act", (nn.GELU, GELU)),
    (r"head", (nn.Linear,)),
)
NORM_PATHS = r"blocks\.\d+\.norm[12]|norm|fc_norm"
TRAINING = r"patch_drop|blocks\.\d+\.drop_path[12]"  # modules that act in training alone


def network_of(config: Settings) -> nn.Module:
    """The timm model, without memory for its weights, that a hub folder's config.json describes.

    Raises UserError, a part of a sentence, where timm lacks it or it is no plain vision transformer.
    """
    name, arguments = str(config["architecture"]).partition(".")[0], config.get("model_args") or {}
    if not timm.is_model(name):
        raise UserError(f"its config.json names the architecture {name}, which timm {timm.__version__} does not have")
    if not is_model_in_modules(name, MODULES):
        raise UserError(
            f"its config.json names timm's {name}, which is not timm's plain VisionTransformer: only that is computed"
        )
    if not isinstance(arguments, dict):
        raise UserError("the model_args of its config.json are not names with values")
    if unknown := arguments.keys() - signature(VisionTransformer).parameters:
        raise UserError(f"the model_args of its config.json hold {', '.join(sorted(unknown))}, which is not known here")
    options: dict[str, Any] = {"num_classes": config.get("num_classes", 1000)}
    if isinstance(config.get("global_pool"), str):
        options["global_pool"] = config["global_pool"]
    options |= arguments  # which timm once did not record
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"timm {timm.__version__} cannot build {name} with the model_args of its config.json ({error})"
        ) from error


def network_difference(model: nn.Module) -> str:
    """How the encoder of a timm model differs from this project's, as a part of a sentence, or ""."""
    if type(model) is not VisionTransformer:
        return f"it is a {type(model).__name__}, not timm's plain VisionTransformer"
    for path, module in model.named_modules():
        if path and (reason := _module_difference(path, module)):
            return f"its {path} {reason}"
    return _model_difference(model)


def _module_difference(path: str, module: nn.Module) -> str:
    if isinstance(module, INERT) or re.fullmatch(TRAINING, path):
        return ""
    if re.fullmatch(NORM_PATHS, path) and isinstance(module, nn.LayerNorm) and type(module).__name__ in NORMS:
        if module.eps > LAYER_NORM_EPS:
            return f"has eps {module.eps:g}, ours has {LAYER_NORM_EPS:g}"
        return "" if module.bias is not None else "has no bias"
    types = next((types for pattern, types in TYPES if re.fullmatch(pattern, path)), None)
    if types is None:
        return f"({type(module).__name__}) is a layer that ours lacks"
    if type(module) not in types:
        return f"is {type(module).__name__}, ours is {types[0].__name__}"
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return f"is the {module.approximate} approximation of GELU, ours is exact"
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is None and not path.endswith("qkv"):
        return "has no bias"
    if isinstance(module, nn.Conv2d) and module.stride != module.kernel_size:
        return "has patches that overlap"
    return _attention_difference(module) if isinstance(module, Attention) else ""


def _attention_difference(attn: Attention) -> str:
    if attn.num_heads * attn.head_dim != attn.proj.out_features:
        return f"has heads of width {attn.head_dim}, which do not make up the width of its tokens"
    if abs(attn.scale - attn.head_dim**-0.5) > 1e-12:
        return f"scales its products by {attn.scale:g}, ours by {attn.head_dim**-0.5:g}"
    return ""


def _model_difference(model: VisionTransformer) -> str:
    """Differences that show in a model's attributes, not in its modules."""
    if model.pos_embed is None:
        return "it has no position embedding"
    if getattr(model, "reg_token", None) is not None:
        return "it has register tokens"
    if isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity):
        return "it has no norm after its blocks"
    return ""


def head_difference(model: nn.Module) -> str:
    """Why the classifier of a timm model is none of ours, as a part of a sentence, or ""."""
    pool, pooled_norm = str(model.global_pool), not isinstance(model.fc_norm, nn.Identity)
    if pool not in ("avg", "token"):
        return f"its classifier pools its tokens in another way (global_pool={pool or 'none'})"
    if getattr(model, "pool_include_prefix", False):
        return "its classifier reads the mean of all tokens, the class token among them"
    if pool == "avg" and not pooled_norm:
        return "its classifier reads the mean of tokens after their norm, and none here does (timm's fc_norm=False)"
    if pool == "token" and pooled_norm:
        return "its classifier reads the class token after fc_norm"
    return ""


def image_size_and_heads(model: nn.Module) -> Settings:
    """Image size and number of heads, which no tensor tells, under timm's names."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    blocks = getattr(model, "blocks", None)
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None
    return {"img_size": list(size) if size else None, "num_heads": heads}


def has_tensors(model: nn.Module, tensors: State) -> bool:
    """Whether the model has exactly these tensors, so that its config.json is complete."""
    return {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in tensors.items()}
