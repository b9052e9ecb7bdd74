"""What may differ between a checkpoint and the model: decoder, classifier, class token, positions.

Each function edits `Loading.state`, the tensors about to be loaded, and notes what it did.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.errors import UserError
from mae.models.mae import MaskedAutoencoder
from mae.models.positions import resize_pos_embed
from mae.weights.layouts import DECODER
from mae.weights.names import State
from mae.weights.read import PretrainedWeights
from mae.weights.sizes import as_text, differing, sizes_of_model
from mae.weights.target_difference import target_difference

HeadMode = Literal["match", "require", "fresh"]
DECODER_KEYS = {
    "kind": ("decoder", "mask_tokens"),
    "size": ("decoder_embed_dim", "decoder_depth", "decoder_num_heads"),
}
LAST_LAYER = ("head.weight", "head.1.weight", "head.2.weight")  # of a classifier, a linear and an attentive probe
DECODE_HEAD = "decode_head."  # of a segmenter
BATCH_NORM_EPS = 1e-6  # of the linear probe's BatchNorm; PyTorch's own default is 1e-5


@dataclass
class Loading:
    """Weights on their way into a model."""

    model: MaskedAutoencoder | VisionTransformer
    pretrained: PretrainedWeights
    state: State = field(init=False)  # about to be loaded
    target: State = field(init=False)  # the model's own
    notes: list[str] = field(default_factory=list)  # sentences on what was done

    def __post_init__(self) -> None:
        self.target = self.model.state_dict()
        self.state = {k: v for k, v in self.pretrained.state.items() if not k.endswith("pos_embed")}

    def drop(self, *prefixes: str) -> None:
        """Leaves out every tensor whose name starts with one of `prefixes`."""
        self.state = {name: tensor for name, tensor in self.state.items() if not name.startswith(prefixes)}


def select_decoder(loading: Loading, required: bool, trained: bool) -> None:
    """Leaves the file's decoder in if the model has one of its kind and size; if `trained`, also of its target."""
    pretrained, model = loading.pretrained, loading.model
    if not isinstance(model, MaskedAutoencoder):
        loading.drop(*DECODER)
        return
    if not pretrained.has_decoder:
        if required:
            raise UserError(
                f"{pretrained} holds no decoder, so nothing can be reconstructed from it. Files that hold one: "
                "a pre-training run of this project, the reference's mae_pretrain_vit_*_full.pth and "
                "mae_visualize_vit_*.pth, CrossMAE's, and Hugging Face's ViTMAEForPreTraining. The attention alone "
                "needs none (task.reconstruction=false)."
            )
        loading.drop(*DECODER)
        own = pretrained.position_patch is None
        what = "The file holds no decoder" if own else "A decoder of its first layer's own patches is not taken"
        loading.notes.append(f"{what}: ours starts afresh.")
        return
    if mismatch := _decoder_mismatch(model, pretrained):
        what, settings = mismatch
        if required:
            raise UserError(f"{pretrained} has a decoder of another {what} than the model: set {settings}.")
        loading.drop(*DECODER)
        loading.notes.append(f"The file's decoder has another {what} ({settings}): ours starts afresh.")
        return
    if pretrained.predicted_values != model.target.size:
        values = f"predicts {pretrained.predicted_values} values of a patch, and the model's {model.target.size}"
        if required:
            raise UserError(f"{pretrained} has a decoder that {values}: choose its target, as target=NAME.")
        loading.drop(*DECODER)
        loading.notes.append(f"The file's decoder {values}: ours starts afresh.")
        return
    if trained and (difference := target_difference(model, pretrained)):
        loading.drop(*DECODER)
        loading.notes.append(f"The file's decoder {difference}: ours starts afresh.")
        return
    lacking = [name for name in loading.target if name.startswith("target.") and name not in loading.state]
    if required and lacking:
        raise UserError(f"{pretrained} lacks {lacking[0]}, so its decoder predicts another target: leave target= out.")


def _decoder_mismatch(model: MaskedAutoencoder, pretrained: PretrainedWeights) -> tuple[str, str] | None:
    """In what the file's decoder differs from the model's, and the settings of one like it; None where in nothing."""
    theirs, ours = pretrained.sizes, sizes_of_model(model)
    for what, keys in DECODER_KEYS.items():
        if differ := differing(keys, theirs, ours):
            return what, " ".join(as_text(differ, theirs, "model.{}={}"))
    of_decoder = (name for name in pretrained.state if name.startswith(DECODER) and not name.startswith("target."))
    if any(name not in model.decoder_keys() for name in of_decoder):
        return "kind", "model.decoder to the one that it was trained with"
    return None


def select_head(loading: Loading, mode: HeadMode) -> None:
    """Leaves the file's classifier in, in the form that the model's has, or drops it and says why."""
    target, pretrained = loading.target, loading.pretrained
    loading.drop(*(name for name in ("norm.", "fc_norm.") if f"{name}weight" not in target))
    if not any(name in target for name in LAST_LAYER):
        loading.drop("head.")
        return
    reason = _head_mismatch(loading)
    if reason and mode == "require":
        raise UserError(
            f"{pretrained} cannot be evaluated: {reason}. Fine-tune it first (task=finetune), "
            "or name a classifier that fits the data and the model."
        )
    if reason or mode == "fresh":
        loading.drop("head.")
        if pretrained.head:
            loading.notes.append(f"The head starts afresh: {reason or 'a new one was asked for'}.")
    elif "head.1.weight" in loading.state and "head.weight" in target:
        fold_batch_norm(loading.state)
        loading.notes.append("The BatchNorm before its head was folded into the head.")


def select_decode_head(loading: Loading, mode: HeadMode) -> None:
    """Leaves a segmenter's head in where the model has one of the same layers, or drops it and says why."""
    ours, theirs = (
        {name: tensor.shape for name, tensor in state.items() if name.startswith(DECODE_HEAD)}
        for state in (loading.target, loading.state)
    )
    if ours == theirs and mode != "fresh":
        return
    if ours and mode == "require":
        raise UserError(
            f"{loading.pretrained} cannot be evaluated: it holds no segmenter of this head and number of classes. "
            "Train one first (task=segment)."
        )
    loading.drop(DECODE_HEAD)
    if ours and theirs:
        reason = "a new one was asked for" if ours == theirs else "the file's has other layers or classes"
        loading.notes.append(f"The head of segmentation starts afresh: {reason}.")


def _head_mismatch(loading: Loading) -> str:
    """Why the file's classifier is not one for the model, or ""."""
    target, pretrained = loading.target, loading.pretrained
    theirs, pool = pretrained.head, "avg" if "fc_norm.weight" in target else "token"
    pool = "patches" if "head.0.query" in target else pool
    classes = next(len(target[name]) for name in LAST_LAYER if name in target)
    if theirs is None:
        return "it holds no classifier"
    if pretrained.head_difference:
        return pretrained.head_difference
    if "patches" in (theirs.pool, pool) and theirs.pool != pool:
        return f"its classifier is {'an' if theirs.pool == 'patches' else 'no'} attentive probe, unlike the model's"
    if theirs.pool != pool:
        reads = {"avg": "the mean of the patch tokens", "token": "the class token"}
        return (
            f"its classifier reads {reads[theirs.pool]} (global_pool={theirs.pool}), "
            f"the model's reads {reads[pool]} (global_pool={pool})"
        )
    if theirs.classes != classes:
        return f"its classifier knows {theirs.classes} classes, the model has {classes}"
    if theirs.layer != (ours := getattr(loading.model, "layer", None)):
        reads = ["the last norm" if layer is None else f"block {layer}" for layer in (theirs.layer, ours)]
        return f"its classifier reads the output of {reads[0]}, the model's of {reads[1]}"
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


def lacks_class_token(loading: Loading, mode: HeadMode) -> bool:
    """Whether the model must do without its class token, as the file did: wherever the encoder is not trained further.

    Raises UserError where the class token is what such a model would read.
    """
    if "cls_token" not in loading.target:
        loading.drop("cls_token")
        return False
    if loading.pretrained.has_class_token:
        return False
    if mode == "fresh" and isinstance(loading.model, VisionTransformer) and loading.model.global_pool == "token":
        raise UserError(
            f"{loading.pretrained} was trained without a class token: read its patches, with task.global_pool=avg."
        )
    note = "The file was trained without a class token: the model"
    if mode != "match":
        loading.notes.append(f"{note} does without its own.")
        return True
    loading.notes.append(
        f"{note}'s own starts afresh, with a position row of "
        "zeros, so features differ from the file's until it is trained."
    )
    return False


def drop_class_token(model: VisionTransformer) -> None:
    """Makes a classifier one without a class token."""
    old = model.pos_embed
    assert isinstance(old, nn.Parameter)
    model.pos_embed = nn.Parameter(old.detach()[:, 1:].clone(), requires_grad=old.requires_grad)
    model.cls_token, model.has_class_token, model.num_prefix_tokens = None, False, 0


def add_positions(loading: Loading) -> None:
    """Puts position embeddings into the state, interpolated to the model's grid."""
    model, pretrained = loading.model, loading.pretrained
    height, width = model.patch_embed.grid_size
    new = height, width
    for name in ("pos_embed", "decoder_pos_embed"):
        if name not in loading.target or (name != "pos_embed" and "decoder_pred.weight" not in loading.state):
            continue
        table = pretrained.position_table(name, new)
        if table is None:
            continue
        rows = table.shape[1] - 1
        old = pretrained.grid(rows, new) if name in pretrained.state else new
        if old is None:
            raise UserError(
                f"{pretrained} has position embeddings of {rows} patches, which is no square, and "
                "does not say its image size. Check model.img_size and model.patch_size."
            )
        side = math.isqrt(rows)
        if old == new and side**2 == rows and old[0] != old[1] and pretrained.stated_grid(rows) is None:
            loading.notes.append(
                f"Its {name} of {rows} patches was taken as {_by(old)}, the model's grid; the file does not say "
                f"whether it was {_by((side, side))}."
            )
        if old != new:
            loading.notes.append(f"Its {name} was interpolated from {_by(old)} to {_by(new)} patches.")
        table = resize_pos_embed(table, old, new)
        loading.state[name] = table if "cls_token" in loading.target else table[:, 1:]


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"
