"""The head in a checkpoint: of a classifier, a probe or a segmenter, told by its tensors."""

from typing import Literal, NamedTuple

from mae.weights.metadata import Settings, section
from mae.weights.names import State


class Head(NamedTuple):
    """The classifier in a checkpoint: what it reads and how many classes it knows."""

    classes: int
    pool: Literal["avg", "token", "patches"]  # mean of patch tokens after `fc_norm`, class token, all patch tokens
    batch_norm: bool  # a probe: BatchNorm without affine before the matrix
    queries: int = 0  # of an attentive probe; 0: none
    projection: bool = False  # whether an attentive probe projects its values
    layer: int | None = None  # the block whose output a probe reads; None: after the last norm


class DecodeHeadKind(NamedTuple):
    """The head of a segmenter in a checkpoint."""

    kind: str  # as `task.head` names it
    classes: int


# task.head -> the tensor of its last layer, which has a row for each class
LAST_LAYERS = {
    "linear": "decode_head.conv_seg.weight",
    "dpt": "decode_head.segmentation_head.head.4.weight",
    "upernet": "decode_head.segmentation_head.0.weight",
}
EVAL_WINDOWS = ("eval_size", "eval_stride")  # keys of task=segment, also in an export's metadata: its sliding window


def contents(state: State) -> str:
    """What a checkpoint holds, as a fragment of a sentence."""
    if "decoder_pred.weight" in state:
        text = "pretrained (encoder and decoder)"
    elif any(name in state for name in LAST_LAYERS.values()):
        text = "segmenter"
    elif head := head_of(state):
        read = "class token" if "cls_token" in state else "mean of all tokens"
        read = {"avg": "mean of the patch tokens", "patches": "patch tokens"}.get(head.pool, read)
        kind = "attentive probe" if head.queries else "linear probe" if head.batch_norm else "classifier"
        text = f"{kind} of {head.classes} classes ({read})"
    else:
        text = "pretrained (encoder only)"
    return text if "cls_token" in state else f"{text}, no class token"


def head_difference_of(state: State, config: Settings) -> str:
    """Why the tensors' classifier is none of ours, as a part of a sentence, or ""."""
    pool = config.get("global_pool") or section(config, "model_args").get("global_pool")
    norm, pooled_norm = "norm.weight" in state, "fc_norm.weight" in state
    head = head_of(state)
    if head is None or head.queries:
        return ""
    if norm == pooled_norm:
        return f"its classifier has {'two norms' if norm else 'no norm'} before it"
    if norm and (pool == "avg" or "cls_token" not in state):
        return "its classifier reads the mean of tokens after their norm, and none here does (timm's fc_norm=False)"
    return ""


def head_of(state: State) -> Head | None:
    """The classifier among the tensors, or None. Its `layer` no tensor tells."""
    query = state.get("head.0.query")
    if query is not None and "head.2.weight" in state:
        projection = "head.0.value.weight" in state
        return Head(len(state["head.2.weight"]), "patches", True, queries=len(query), projection=projection)
    weight = state.get("head.weight", state.get("head.1.weight"))
    if weight is None:
        return None
    return Head(weight.shape[0], "avg" if "fc_norm.weight" in state else "token", "head.0.running_var" in state)
