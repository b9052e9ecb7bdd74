"""The parts of a checkpoint that may differ from the model's: decoder, classifier, class token, positions.

Each function edits `state`, the tensors about to be loaded, and returns sentences on what it did.
"""

import math
from typing import Any, Literal

from torch import nn

from mae.models.layers import resize_pos_embed
from mae.weights.read import DECODER, PretrainedWeights, State

HeadMode = Literal["fit", "require", "fresh"]
BATCH_NORM_EPS = 1e-6  # of the linear probe's BatchNorm; PyTorch's own default is 1e-5


def keep_decoder(
    state: State, target: State, pretrained: PretrainedWeights, ours: dict[str, Any], where: str, need: bool
) -> list[str]:
    """Leaves the file's decoder in `state` if the model has one of its size."""
    if "decoder_pred.weight" not in target:
        drop(state, *DECODER)
        return []
    if not pretrained.has_decoder:
        if need:
            raise ValueError(
                f"{where} holds no decoder, so nothing can be reconstructed from it. Files that hold one: "
                "a pre-training run of this project, the reference's mae_pretrain_vit_*_full.pth and "
                "mae_visualize_vit_*.pth, and Hugging Face's ViTMAEForPreTraining. The attention alone needs none "
                "(task.reconstruction=false)."
            )
        drop(state, *DECODER)
        return ["The file holds no decoder: ours starts afresh."]
    theirs = pretrained.arch
    keys = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
    differing = [key for key in keys if key in theirs and theirs[key] != ours[key]]
    if not differing:
        return []
    settings = " ".join(f"model.{key}={theirs[key]}" for key in differing)
    if need:
        raise ValueError(f"{where} has a decoder of another size than the model: set {settings}.")
    drop(state, *DECODER)
    return [f"The file's decoder has another size ({settings}): ours starts afresh."]


def keep_head(state: State, target: State, pretrained: PretrainedWeights, where: str, mode: HeadMode) -> list[str]:
    """Leaves the file's classifier in `state`, in the form that the model's has, or drops it and says why."""
    drop(state, *(name for name in ("norm.", "fc_norm.") if f"{name}weight" not in target))
    if "head.weight" not in target and "head.1.weight" not in target:
        drop(state, "head.")
        return []
    reason = _misfit(target, pretrained)
    if reason and mode == "require":
        raise ValueError(
            f"{where} cannot be evaluated: {reason}. Fine-tune it first (task=finetune), "
            "or name a classifier that fits the data and the model."
        )
    if reason or mode == "fresh":
        drop(state, "head.")
        return [f"The head starts afresh: {reason or 'a new one was asked for'}."] if pretrained.head else []
    if "head.1.weight" in state and "head.weight" in target:
        fold_batch_norm(state)
        return ["The BatchNorm before its head was folded into the head."]
    return []


def _misfit(target: State, pretrained: PretrainedWeights) -> str:
    """Why the file's classifier does not fit the model's, or ""."""
    theirs, pool = pretrained.head, "avg" if "fc_norm.weight" in target else "token"
    classes = target.get("head.weight", target.get("head.1.weight"))
    assert classes is not None
    if theirs is None:
        return "it holds no classifier"
    if pretrained.head_difference:
        return pretrained.head_difference
    if theirs.pool != pool:
        reads = {"avg": "the mean of the patch tokens", "token": "the class token"}
        return (
            f"its classifier reads {reads[theirs.pool]} (global_pool={theirs.pool}), "
            f"the model's reads {reads[pool]} (global_pool={pool})"
        )
    if theirs.classes != classes.shape[0]:
        return f"its classifier knows {theirs.classes} classes, the model has {classes.shape[0]}"
    if not theirs.batch_norm and "head.weight" not in target:
        return "its classifier has no BatchNorm before it, the model's has"
    return ""


def fold_batch_norm(state: State) -> None:
    """`head.0` (BatchNorm without affine) and `head.1` as one linear `head`: in evaluation the same."""
    mean, var = (state.pop(f"head.0.running_{name}").double() for name in ("mean", "var"))
    state.pop("head.0.num_batches_tracked", None)
    weight, bias = state.pop("head.1.weight"), state.pop("head.1.bias")
    folded = weight.double() / (var + BATCH_NORM_EPS).sqrt()
    state["head.weight"] = folded.to(weight.dtype)
    state["head.bias"] = (bias.double() - folded @ mean).to(bias.dtype)


def class_token_absent(
    state: State, target: State, pretrained: PretrainedWeights, model: Any, where: str, mode: HeadMode
) -> tuple[bool, list[str]]:
    """Whether the model must do without its class token, as the file did: wherever the encoder is not trained further.

    Raises ValueError where the class token is what such a model would read.
    """
    if "cls_token" not in target:
        drop(state, "cls_token")
        return False, []
    if pretrained.has_class_token:
        return False, []
    if mode == "fresh" and model.global_pool == "token":
        raise ValueError(f"{where} was trained without a class token: read its patches, with task.global_pool=avg.")
    if mode != "fit":
        return True, ["The file was trained without a class token: the model does without its own."]
    return False, [
        "The file was trained without a class token: the model's own starts afresh, with a position row of "
        "zeros, so features differ from the file's until it is trained."
    ]


def drop_class_token(model: Any) -> None:
    """Makes a timm VisionTransformer one without a class token."""
    old = model.pos_embed
    model.pos_embed = nn.Parameter(old.detach()[:, 1:].clone(), requires_grad=old.requires_grad)
    model.cls_token, model.has_class_token, model.num_prefix_tokens = None, False, 0


def place_positions(state: State, target: State, pretrained: PretrainedWeights, model: Any, where: str) -> list[str]:
    """Puts position embeddings into `state`, interpolated to the model's grid."""
    notes = []
    new = tuple(getattr(model, "grid_size", None) or model.patch_embed.grid_size)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name not in target or (name != "pos_embed" and "decoder_embed.weight" not in state):
            continue
        table = pretrained.position_table(name, new)
        if table is None:
            continue
        old = new if name not in pretrained.state else pretrained.grid(table.shape[1] - 1, new)
        if old is None:
            raise ValueError(
                f"{where} has position embeddings of {table.shape[1] - 1} patches, which is no square, and "
                "does not say its image size. Check model.img_size and model.patch_size."
            )
        rows = old[0] * old[1]
        if old == new and math.isqrt(rows) ** 2 == rows and old[0] != old[1] and pretrained.stated_grid(rows) is None:
            side = math.isqrt(rows)
            notes.append(
                f"Its {name} of {rows} patches was taken as {_by(old)}, the model's grid; the file does not say "
                f"whether it was {_by((side, side))}."
            )
        if old != new:
            notes.append(f"Its {name} was interpolated from {_by(old)} to {_by(new)} patches.")
        table = resize_pos_embed(table, old, new)
        state[name] = table if "cls_token" in target else table[:, 1:]
    return notes


def _by(grid: tuple[int, ...]) -> str:
    return " x ".join(map(str, grid))


def drop(state: State, *prefixes: str) -> None:
    """Removes every name that starts with one of `prefixes`."""
    for name in [name for name in state if name.startswith(prefixes)]:
        del state[name]
