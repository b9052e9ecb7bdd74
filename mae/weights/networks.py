"""Whether a checkpoint's network computes the same function as ours, by its config and its tensors' names and shapes.

Any other network is refused by name.
"""

import re

from mae.errors import UserError
from mae.models.layers import LAYER_NORM_EPS
from mae.weights import huggingface, timm
from mae.weights.files import Opened
from mae.weights.metadata import Settings, section
from mae.weights.names import State

ASSUMED = (
    f"No config says how its tensors are used. Assumed are exact GELU, LayerNorms of eps {LAYER_NORM_EPS:g} before "
    "attention and MLP, no rotary positions, and the model's number of heads."
)

UNDESCRIBED = (
    "Neither its manifest nor a run around it says how its tensors are used. Assumed are the model's number of heads, "
    "and images that are normalised as data.mean and data.std say."
)

# The first pattern that a tensor's name has wins: the special stand before the general.
NETWORKS = (
    (r"(^|\.)(dist_token|distillation_token)$", "a distilled DeiT, with a second class token"),
    (r"(^|\.)(detection_tokens|mid_position_embeddings|det_token)$", "a YOLOS, with detection tokens"),
    (r"(^|\.)(storage_tokens|rope_embed\.periods)$", "a DINOv3, with register tokens and rotary positions"),
    (r"(^|\.)(reg_token|register_tokens?)$", "a vision transformer with register tokens, as DINOv2's and DINOv3's"),
    (r"layer_scale1\.lambda1$", "a DINOv2 of Hugging Face"),
    (r"^dinov2\.", "a DINOv2 of Hugging Face"),
    (r"(^|\.)vision_model\.", "a CLIP or SigLIP of Hugging Face"),
    (r"(^|\.)(resblocks\.\d+|class_embedding|pre_layrnorm|ln_pre)(\.|$)", "a CLIP or a Perception Encoder"),
    (r"(^|\.)attn_pool\.", "a vision transformer that pools by attention, as SigLIP's"),
    (r"(^|\.)norm_pre\.", "a vision transformer with a norm before its blocks, as CLIP's"),
    (r"(^|\.)(beit|data2vec_vision)\.", "a BEiT of Hugging Face"),
    (r"(^|[._])(rope|freqs|rotary)", "a vision transformer with rotary positions, as EVA-02's"),
    (r"^layers\.\d+\.(blocks|downsample)\.", "a Swin Transformer or another network of stages"),
    (r"^(stages|stage\d*|network)\.", "a network of stages"),
    (r"rel(ative)?_pos|relative_position", "a vision transformer with relative positions, as BEiT's and SAM's"),
    (r"mlp\.(w1|w2|w3|w12|fc1_g|fc1_x|gate_proj|weights_in)\.", "a vision transformer with SwiGLU layers"),
    (r"attn\w*\.(q_norm|k_norm|query_norm|key_norm)\.", "a vision transformer that normalises queries and keys"),
    (r"blocks\.\d+\.(attn|mlp)\.(norm|ln|inner_attn_ln|ffn_ln)\.", "a vision transformer with norms inside its layers"),
    (r"attn\.gate\.", "a vision transformer with gated attention"),
    (r"self_attn\.(q_proj|in_proj)", "the image encoder of a CLIP or SigLIP"),
    (r"\.attn\.(q_proj|k_proj|v_proj)\.", "an EVA or another network with separate queries, keys and values"),
    (r"blocks\.\d+\.(attns|ffns|in_proj|in_norm)\.", "a vision transformer with parallel layers in a block"),
    (r"patch_embed\.(norm|backbone|proj\.\d|conv)", "a network with another patch embedding than one convolution"),
    (r"cls_attn|blocks_token_only|local_patch_interaction", "a network with class attention, as CaiT and XCiT"),
)


def unsupported_network(tensors: State) -> str:
    """The network that these tensors belong to, with the tensor that shows it, if it is not computed here; else ""."""
    for pattern, network in NETWORKS:
        name = next((name for name in tensors if re.search(pattern, name)), None)
        if name:
            return f"{network} ({name})"
    return _by_shape(tensors)


def _by_shape(tensors: State) -> str:
    """As `unsupported_network`, by shapes and by combinations of names."""
    for name, tensor in tensors.items():
        if name.endswith(("patch_embed.proj.weight", "patch_embeddings.projection.weight")) and tensor.ndim == 5:
            sides = " x ".join(map(str, tensor.shape[2:]))
            return f"a network for videos or series of images, as Prithvi and VideoMAE: {name} has patches of {sides}"
        if name.endswith(("pos_embed", "position_embeddings")) and tensor.ndim > 3:
            return f"a network whose positions are a map, as SAM's ({name} has {tensor.ndim} dimensions)"
    first, second = (tensors.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if first is not None and second is not None and first.shape[0] != second.shape[1]:
        return "a vision transformer with SwiGLU layers (blocks.0.mlp.fc1 has more outputs than fc2 has inputs)"
    for layer, kind in (("norm1", "norms have no bias, as RMSNorm"), ("attn.proj", "linear layers have no bias")):
        name = next((name for name in tensors if name.endswith(f".{layer}.weight")), None)
        if name and not any(name.endswith(f".{layer}.bias") for name in tensors):
            return f"a vision transformer whose {kind} ({name})"
    class_token = any(re.search(r"(^|\.)cls_token$", name) for name in tensors)
    biases = next((name for name in tensors if name.endswith("attn.q_bias")), None)
    if biases and class_token:
        return f"a BEiT or EVA ({biases} beside a class token)"
    table = next((name for name in tensors if name.endswith("embeddings.position_embeddings")), None)
    return f"an I-JEPA of Hugging Face ({table} without a class token)" if table and not class_token else ""


def check_network(opened: Opened, path: str) -> tuple[str, list[str]]:
    """Why the file's classifier is none of ours ("" if it is), and notes on what had to be assumed.

    Raises UserError where the network is not one that is computed here.
    """
    if opened.origin == "ours":
        return "", [] if section(opened.meta.config, "model") else [UNDESCRIBED]
    config, name = opened.meta.config, ""
    if "architecture" in config:
        name = f" ({config['architecture']})"
    elif "model_type" in config:
        name = f" ({huggingface.model_name(config)})"
    if network := unsupported_network(opened.tensors):
        raise UserError(f"init={path}{name} is another kind of network than is computed here: {network}.")
    if opened.network is None and "architecture" not in config:
        return "", _check_settings(config, opened.meta.args, path)
    return _check_timm(opened, path)


def _check_settings(config: Settings, args: Settings, path: str) -> list[str]:
    """Compares a Hugging Face config, or what an export of ours says of itself; notes what had to be assumed."""
    if "model_type" in config:
        reason = huggingface.config_difference(config)
    elif "hidden_act" in args:
        reason = huggingface.setting_difference(args)
    else:
        return [ASSUMED]
    if reason:
        raise UserError(f"init={path} computes another function than this project's networks: {reason}.")
    return []


def _check_timm(opened: Opened, path: str) -> tuple[str, list[str]]:
    config = opened.meta.config
    name = config.get("architecture", "")
    try:
        network = opened.network or timm.network_of(config)
    except ValueError as error:
        raise UserError(f"init={path} cannot be taken: {error}.") from error
    if reason := timm.network_difference(network):
        raise UserError(
            f"init={path}{name and f' ({name})'} computes another function than this project's networks: {reason}."
        )
    notes = []
    if timm.has_tensors(network, opened.tensors):
        stated = {key: value for key, value in section(config, "model_args").items() if value is not None}
        config["model_args"] = timm.image_size_and_heads(network) | stated
    else:
        assumed = ASSUMED.replace("No config says how its tensors are used. ", "")
        notes.append(f"Its config.json describes a {config.get('architecture')} of other tensors. {assumed}")
    head_difference = timm.head_difference(network)
    return f"{head_difference} ({name})" if head_difference and name else head_difference, notes
