"""Putting a checkpoint that was read into a model, and saying in words what fitted and what did not."""

import logging
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mae.models.layers import LAYER_NORM_EPS, set_layer_norm_eps
from mae.weights.parts import HeadMode, class_token_absent, drop_class_token, keep_decoder, keep_head, place_positions
from mae.weights.read import DECODER, PretrainedWeights, State, architecture

log = logging.getLogger(__name__)

CLASSIFIER = ("head.", "norm.", "fc_norm.")
SIZES = ("embed_dim", "depth", "num_heads", "patch_size", "in_chans", "mlp_ratio")


@dataclass
class LoadReport:
    """What came of fitting: names by fate, and sentences for what a user should know."""

    kind: str
    loaded: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)  # in the model, not in the file: as initialised
    unused: list[str] = field(default_factory=list)  # in the file, not in the model
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"recognised as {self.kind}: {len(self.loaded)} tensors loaded"
        if self.fresh:
            text += f"; as initialised: {_families(self.fresh)}"
        if self.unused:
            text += f"; in the file but not used: {_families(self.unused)}"
        return " ".join([f"{text}.", *self.notes])


def load_pretrained(
    model: nn.Module,
    pretrained: PretrainedWeights,
    *,
    need_decoder: bool = False,
    head: HeadMode = "fit",
    trained: bool = True,
) -> LoadReport:
    """Loads `pretrained` into a MaskedAutoencoder or a timm VisionTransformer, in place.

    Position embeddings are interpolated where the grid differs. A MaskedAutoencoder takes the decoder if it
    is there and fits, and must find one under `need_decoder`. A classifier takes the file's head if it has
    as many classes and reads the same tokens (`"fit"`), must find that (`"require"`, for evaluation), or
    keeps its own (`"fresh"`). A model that nobody trains (`trained=False`, `"require"`, `need_decoder`) gets the eps
    of the file's LayerNorms; a checkpoint of a trained one would not record it. Raises ValueError in plain words
    where what is needed does not fit; the model is then unchanged.
    """
    target = model.state_dict()
    ours = architecture(target) | _heads(model)
    where = f"init={pretrained.path} ({pretrained.kind})"
    _check_sizes(pretrained.arch, ours, where)
    adopt_eps = not trained or need_decoder or head == "require"
    notes = [*pretrained.notes, *_eps_note(pretrained, adopt_eps)]
    state = {name: tensor for name, tensor in pretrained.state.items() if not name.endswith("pos_embed")}
    notes += keep_decoder(state, target, pretrained, ours, where, need_decoder)
    notes += keep_head(state, target, pretrained, where, head)
    bare, said = class_token_absent(state, target, pretrained, model, where, head)
    notes += said + place_positions(state, target, pretrained, model, where)
    if bare:  # the model is to do without its class token, as the file did
        state["pos_embed"] = state["pos_embed"][:, 1:]
        target["pos_embed"] = target["pos_embed"][:, 1:]
        del target["cls_token"]
    loaded = [name for name in target if name in state]
    report = LoadReport(
        pretrained.kind,
        loaded=loaded,
        fresh=[name for name in target if name not in state],
        unused=[name for name in pretrained.state if name not in loaded],
        notes=notes,
    )
    _check_names(report, pretrained, where)
    _check_shapes(state, target, where)
    if bare:
        drop_class_token(model)
    model.load_state_dict({name: state[name] for name in loaded}, strict=False)
    if adopt_eps:
        set_layer_norm_eps(model, pretrained.arch.get("layer_norm_eps", LAYER_NORM_EPS))
    log.info("init=%s: %s", pretrained.path, report)
    return report


def _families(names: list[str]) -> str:
    """Names in a sentence, all of `blocks` as one."""
    return ", ".join(dict.fromkeys(f"{n.split('.')[0]}.*" if "." in n else n for n in names))


def _eps_note(pretrained: PretrainedWeights, adopted: bool) -> list[str]:
    eps = pretrained.arch.get("layer_norm_eps", LAYER_NORM_EPS)
    if eps == LAYER_NORM_EPS:
        return []
    if adopted:
        return [f"Its LayerNorms have eps {eps:g}, which the model's get."]
    return [f"Its LayerNorms had eps {eps:g}; ours have {LAYER_NORM_EPS:g}, as the reference's."]


def _heads(model: nn.Module) -> dict[str, int]:
    """Numbers of attention heads, which no tensor tells."""
    heads = {}
    for key, name in (("num_heads", "blocks"), ("decoder_num_heads", "decoder_blocks")):
        blocks: Any = getattr(model, name, None)
        if blocks is not None and len(blocks):
            heads[key] = blocks[0].attn.num_heads
    return heads


def _check_sizes(theirs: dict[str, Any], ours: dict[str, Any], where: str) -> None:
    """Raises ValueError where the encoders differ in size, naming the keys that would make them equal."""
    differing = [key for key in SIZES if key in theirs and key in ours and theirs[key] != ours[key]]
    if not differing:
        return
    has = ", ".join(f"{key} {_plain(theirs[key])}" for key in differing)
    wants = ", ".join(f"{key} {_plain(ours[key])}" for key in differing)
    settings = " ".join(f"model.{key}={_plain(theirs[key])}" for key in differing)
    raise ValueError(
        f"{where} is a vision transformer with {has}, but the model has {wants}. "
        f"Set {settings}, or name another checkpoint."
    )


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return str(value[0]) if len(set(value)) == 1 else f"[{','.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_names(report: LoadReport, pretrained: PretrainedWeights, where: str) -> None:
    """Raises ValueError where the encoder, or a decoder that was taken, would be incomplete or other."""
    known = (*CLASSIFIER, *DECODER, "pos_embed", "cls_token")
    if strange := [name for name in report.unused if not name.startswith(known)]:
        raise ValueError(f"{where} is another kind of network: the model has no place for {_some(strange)}.")
    optional = [*CLASSIFIER] if pretrained.has_class_token else [*CLASSIFIER, "cls_token"]
    if not any(name.startswith("decoder_") for name in report.loaded):
        optional += DECODER
    if lacking := [name for name in report.fresh if not name.startswith(tuple(optional))]:
        raise ValueError(
            f"{where} is incomplete: it lacks {len(lacking)} tensors that the model needs, {_some(lacking)}."
        )


def _check_shapes(state: State, target: State, where: str) -> None:
    wrong = [
        f"{name} is {_shape(state[name])} and should be {_shape(tensor)}"
        for name, tensor in target.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"{where} does not fit the model: {'; '.join(wrong[:3])}.")


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
