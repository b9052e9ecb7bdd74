"""Sizes of a network under the names of `model.*`: of a model, of a state dict, and as files beside one say."""

import re
from collections.abc import Mapping, Sequence
from typing import TypedDict

from timm.models.vision_transformer import VisionTransformer

from mae.models.mae import MaskedAutoencoder
from mae.models.vit import encoder_sizes
from mae.weights.metadata import Metadata, section
from mae.weights.names import State


class OptionalSizes(TypedDict, total=False):
    """Sizes that not every file tells."""

    mlp_ratio: float
    decoder: str
    mask_tokens: str
    decoder_embed_dim: int
    decoder_depth: int
    img_size: int | list[int]  # this and the following are in no tensor's shape
    num_heads: int
    decoder_num_heads: int
    layer_norm_eps: float


class Sizes(OptionalSizes):
    """What is known of a network's sizes."""

    patch_size: list[int]
    in_chans: int
    embed_dim: int
    depth: int


def sizes_of_model(model: MaskedAutoencoder | VisionTransformer) -> Sizes:
    encoder = encoder_sizes(model)
    sizes = Sizes(
        patch_size=[*encoder.patch_size],
        in_chans=encoder.in_chans,
        embed_dim=encoder.embed_dim,
        depth=encoder.depth,
        mlp_ratio=encoder.hidden / encoder.embed_dim,
        num_heads=encoder.num_heads,
    )
    if isinstance(model, MaskedAutoencoder):
        sizes["decoder"], sizes["mask_tokens"] = model.decoder_name, model.mask_tokens
        width, depth, heads, _ = model.decoder.sizes
        if depth:  # else it has no blocks
            sizes["decoder_embed_dim"], sizes["decoder_depth"], sizes["decoder_num_heads"] = width, depth, heads
    return sizes


def sizes_of_state(state: State) -> Sizes:
    """Sizes that a state dict under the reference's names tells."""
    width, chans, *patch = state["patch_embed.proj.weight"].shape
    sizes = Sizes(patch_size=patch, in_chans=chans, embed_dim=width, depth=_depth(state, "blocks"))
    if "blocks.0.mlp.fc1.weight" in state:
        sizes["mlp_ratio"] = state["blocks.0.mlp.fc1.weight"].shape[0] / width
    if depth := _depth(state, "decoder_blocks"):
        sizes["decoder_depth"] = depth
    norm, mask_token = state.get("decoder_norm.weight"), state.get("mask_token")
    if norm is not None:
        sizes["decoder_embed_dim"] = len(norm)
    if norm is not None and mask_token is not None and len(norm) != width:  # else no width tells them apart
        sizes["mask_tokens"] = "encoder" if mask_token.shape[-1] == width else "decoder"
    if "wfm.linear.weight" in state:
        sizes["decoder"], sizes["mask_tokens"] = "cross", "decoder"
    elif "decoder_embed.weight" in state:
        sizes["decoder"] = "self"
    return sizes


def _depth(state: State, blocks: str) -> int:
    return 1 + max((int(m[1]) for name in state if (m := re.match(rf"{blocks}\.(\d+)\.", name))), default=-1)


def stated_sizes(meta: Metadata) -> OptionalSizes:
    """Sizes that no tensor tells: from config.yaml, config.json or the saved arguments."""
    config, args = meta.config, meta.args
    model, timm_args = section(config, "model"), section(config, "model_args")
    images = (
        model.get("img_size"),
        config.get("image_size"),
        timm_args.get("img_size"),
        section(config, "pretrained_cfg").get("input_size"),
        args.get("img_size"),  # timm's training script's, our exports'
        args.get("input_size"),  # the reference's, MAE-pytorch's
        args.get("input_resolution"),  # MAE-repo's
    )
    key, theirs = "num_heads", "num_attention_heads"
    heads = (model.get(key), config.get(theirs), timm_args.get(key), args.get(key))
    decoder_heads = (values.get(f"decoder_{name}") for values, name in ((model, key), (config, theirs), (args, key)))
    sizes = OptionalSizes()
    for values in (args, model):  # our exports say it, and our runs
        if isinstance(decoder := values.get("decoder"), str):
            sizes["decoder"] = decoder
        if isinstance(mask_tokens := values.get("mask_tokens"), str):
            sizes["mask_tokens"] = mask_tokens
    if size := next(filter(None, map(_image_size, images)), None):
        sizes["img_size"] = size
    if number := next((number for number in heads if isinstance(number, int) and number), None):
        sizes["num_heads"] = number
    if number := next((number for number in decoder_heads if isinstance(number, int) and number), None):
        sizes["decoder_num_heads"] = number
    eps = config.get("layer_norm_eps")
    if isinstance(eps, int | float):
        sizes["layer_norm_eps"] = eps
    return sizes


def _image_size(value: object) -> int | list[int] | None:
    """A side, or (height, width), which may stand after the channels; None for anything else."""
    if isinstance(value, int):
        return value
    if isinstance(value, list | tuple) and len(value) in (2, 3) and all(isinstance(side, int) for side in value):
        return list(value[-2:])
    return None


def differing(keys: Sequence[str], theirs: Mapping[str, object], ours: Mapping[str, object]) -> list[str]:
    """The keys in which two networks' sizes are known and differ."""
    return [key for key in keys if key in theirs and key in ours and theirs[key] != ours[key]]


def as_text(keys: Sequence[str], sizes: Mapping[str, object], form: str) -> list[str]:
    """Sizes as a user types them, in a form such as "model.{}={}"."""
    return [form.format(key, _plain(sizes[key])) for key in keys]


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return str(value[0]) if len(set(value)) == 1 else f"[{','.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
