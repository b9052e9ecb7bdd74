"""Loads pretrained weights into a model, and reports what was loaded and what was not."""

import logging
import math
from dataclasses import dataclass, field

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.errors import UserError
from mae.models.layers import LAYER_NORM_EPS, set_layer_norm_eps
from mae.models.mae import MaskedAutoencoder
from mae.weights.adapt import Adaptation, adapted
from mae.weights.layouts import DECODER
from mae.weights.parts import (
    DECODE_HEAD,
    HeadMode,
    Loading,
    add_positions,
    drop_class_token,
    lacks_class_token,
    select_decode_head,
    select_decoder,
    select_head,
)
from mae.weights.read import PretrainedWeights
from mae.weights.sizes import Sizes, as_text, differing, sizes_of_model

log = logging.getLogger(__name__)

CLASSIFIER = ("head.", "norm.", "fc_norm.", DECODE_HEAD)
SIZES = ("embed_dim", "depth", "num_heads", "patch_size", "in_chans", "mlp_ratio")


@dataclass
class LoadReport:
    """Names of loaded and other tensors, and sentences that a user should read."""

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
    model: MaskedAutoencoder | VisionTransformer,
    pretrained: PretrainedWeights,
    *,
    need_decoder: bool = False,
    head: HeadMode = "match",
    trained: bool = True,
    adaptation: Adaptation | None = None,
) -> LoadReport:
    """Loads weights into a model, in place. Raises UserError, with the model unchanged, where they do not belong to it.

    Position embeddings are interpolated where the grid differs, and the first layer is as `adaptation` allows. A
    MaskedAutoencoder loads a decoder of its size, and must find one under `need_decoder`. A classifier loads a head
    with as many classes that reads the same tokens (`"match"`), must find one (`"require"`, for evaluation), or keeps
    its own (`"fresh"`).

    A model that nobody trains (`trained=False`, `"require"`, `need_decoder`) gets the eps of the file's LayerNorms; the
    checkpoint of a trained one would not record it.
    """
    if adaptation is not None:
        pretrained = adapted(pretrained, sizes_of_model(model), adaptation)
    _check_sizes(pretrained, sizes_of_model(model), adaptation)
    adopt_eps = not trained or need_decoder or head == "require"
    loading = Loading(model, pretrained, notes=[*pretrained.notes, *_eps_note(pretrained, adopt_eps)])
    select_decoder(loading, need_decoder, trained and not need_decoder)
    select_head(loading, head)
    select_decode_head(loading, head)
    bare = lacks_class_token(loading, head)
    add_positions(loading)
    state, target = loading.state, loading.target
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
        notes=loading.notes,
    )
    _check_names(report, pretrained, model.decoder_keys() if isinstance(model, MaskedAutoencoder) else set())
    _check_shapes(loading)
    _check_finite(loading, loaded)
    if isinstance(model, VisionTransformer) and bare:
        drop_class_token(model)
    model.load_state_dict({name: state[name] for name in loaded}, strict=False)
    if adopt_eps:
        set_layer_norm_eps(model, pretrained.sizes.get("layer_norm_eps", LAYER_NORM_EPS))
    log.info("%s=%s: %s", pretrained.key, pretrained.path, report)
    return report


def _families(names: list[str]) -> str:
    """Names in a sentence, all of `blocks` as one."""
    return ", ".join(dict.fromkeys(f"{n.split('.')[0]}.*" if "." in n else n for n in names))


def _eps_note(pretrained: PretrainedWeights, adopted: bool) -> list[str]:
    eps = pretrained.sizes.get("layer_norm_eps", LAYER_NORM_EPS)
    if eps == LAYER_NORM_EPS:
        return []
    if adopted:
        return [f"Its LayerNorms have eps {eps:g}, which the model's get."]
    return [f"Its LayerNorms had eps {eps:g}; ours have {LAYER_NORM_EPS:g}, as the reference's."]


def _check_sizes(pretrained: PretrainedWeights, ours: Sizes, adaptation: Adaptation | None) -> None:
    """Raises UserError where the encoders differ in size, naming the keys that would make them equal."""
    theirs = pretrained.sizes
    if keys := differing(SIZES, theirs, ours):
        has, wants = (", ".join(as_text(keys, sizes, "{} {}")) for sizes in (theirs, ours))
        raise UserError(
            f"{pretrained} is a vision transformer with {has}, but the model has {wants}. "
            f"Set {' '.join(as_text(keys, theirs, 'model.{}={}'))}, or name another checkpoint."
            + ("" if adaptation is None else adaptation.hint(keys))
        )


def _check_names(report: LoadReport, pretrained: PretrainedWeights, decoder: set[str]) -> None:
    """Raises UserError where the encoder, or a decoder that was loaded, would be incomplete or other."""
    known = (*CLASSIFIER, *DECODER, "pos_embed", "cls_token")
    if strange := [name for name in report.unused if not name.startswith(known)]:
        raise UserError(f"{pretrained} is another kind of network: the model has no layer for {_some(strange)}.")
    optional = CLASSIFIER if pretrained.has_class_token else (*CLASSIFIER, "cls_token")
    missing = [name for name in report.fresh if not name.startswith(optional)]
    if not decoder & set(report.loaded):
        missing = [name for name in missing if name not in decoder]
    missing = [name for name in missing if not name.startswith("target.")]  # fitted when training starts
    if missing:
        raise UserError(
            f"{pretrained} is incomplete: it lacks {len(missing)} tensors that the model needs, {_some(missing)}."
        )


def _check_shapes(loading: Loading) -> None:
    wrong = [
        f"{name} is {_shape(loading.state[name])} and should be {_shape(tensor)}"
        for name, tensor in loading.target.items()
        if name in loading.state and loading.state[name].shape != tensor.shape
    ]
    if wrong:
        raise UserError(f"{loading.pretrained} does not fit the model: {'; '.join(wrong[:3])}.")


def _check_finite(loading: Loading, names: list[str]) -> None:
    """Raises UserError where a tensor holds NaN or infinity, which every result would then be made of."""
    for name in names:
        tensor = loading.state[name]
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        if not all(math.isfinite(float(extreme)) for extreme in tensor.aminmax()):
            raise UserError(
                f"{loading.pretrained} holds numbers in {name} that are NaN or infinite: its training has diverged. "
                "Name an earlier checkpoint of it, or train it anew with a lower optimizer.base_lr."
            )


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
