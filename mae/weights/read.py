"""Checkpoints of any origin, read into one form: the reference's names (timm's, for the encoder).

`read(path)` recognises this project's runs, facebookresearch/mae, timm, Hugging Face ViT and ViTMAE,
shiyuwuCASIA/MAE-repo and pengzhiliang/MAE-pytorch; `load.load_pretrained` puts what was read into a model.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from mae.weights.files import Opened, open_checkpoint
from mae.weights.layouts import SINUSOID, Layout, State, convert, sinusoid, with_class_row
from mae.weights.networks import check_network
from mae.weights.preprocessing import Preprocessing, stated

DECODER = ("mask_token", "decoder_")


class Head(NamedTuple):
    """The classifier in a checkpoint: what it reads and how many classes it knows."""

    classes: int
    pool: Literal["avg", "token"]  # mean of patch tokens after `fc_norm`, or the class token after `norm`
    batch_norm: bool  # the reference's linear probe: BatchNorm without affine before the matrix


@dataclass
class PretrainedWeights:
    """A checkpoint under the reference's names."""

    path: str
    kind: str  # a fragment of a sentence: "reference, pretrained (encoder only)"
    state: State
    notes: list[str]  # sentences on what was converted or left out
    meta: dict[str, Any] = field(default_factory=dict)  # config, args, epoch or step, as the file had them
    position: str = ""  # SINUSOID: the position tables are computed, not stored
    head_difference: str = ""  # why its classifier is none of ours, as a part of a sentence

    @property
    def has_decoder(self) -> bool:
        return {"mask_token", "decoder_embed.weight", "decoder_pred.weight"} <= self.state.keys()

    @property
    def has_class_token(self) -> bool:
        return "cls_token" in self.state

    @property
    def head(self) -> Head | None:
        return _head(self.state)

    @property
    def encoder(self) -> State:
        """Tensors of the encoder alone: neither decoder nor classifier."""
        return {k: v for k, v in self.state.items() if not k.startswith((*DECODER, "head.", "fc_norm."))}

    @property
    def arch(self) -> dict[str, Any]:
        """Sizes under the names of `model.*`, as far as the tensors or the files beside them tell."""
        return architecture(self.state) | {k: v for k, v in _told(self.meta).items() if v is not None}

    @property
    def norm_pix_loss(self) -> bool | None:
        """Whether normalised patches are predicted, as the files beside the tensors say; None where nothing does."""
        return self._told(bool, "norm_pix_loss", "normlize_target")  # the latter is MAE-pytorch's

    @property
    def mask_ratio(self) -> float | None:
        """The part of the patches that was masked in training, as the files beside the tensors say, or None."""
        return self._told(float, "mask_ratio")

    @property
    def of_a_run(self) -> bool:
        """Whether a run's config.yaml goes with it."""
        return isinstance((self.meta.get("config") or {}).get("data"), dict)

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How the training's images were prepared, as the files beside the tensors say, or None."""
        return stated(*(self.meta.get(key) or {} for key in ("config", "args", "processor")))

    def _told(self, kind: type, *keys: str) -> Any:
        """A setting of the training by the first of its names that a run's config, a config.json or saved arguments
        hold, or None."""
        config, args = self.meta.get("config") or {}, self.meta.get("args") or {}
        task = config.get("task")
        places = (task if isinstance(task, dict) else {}, config, args)
        told = (place.get(key) for place in places for key in keys)
        return next((value for value in told if isinstance(value, kind)), None)

    def grid(self, rows: int, guess: tuple[int, int]) -> tuple[int, int] | None:
        """(height, width) in patches of a position table of so many patches; None where nothing says it.

        What the file says of its image size comes first, then `guess`, the model's own grid, then a square.
        """
        stated = self.stated_grid(rows)
        if stated is not None:
            return stated
        if guess[0] * guess[1] == rows:
            return guess
        side = math.isqrt(rows)
        return (side, side) if side**2 == rows else None

    def stated_grid(self, rows: int) -> tuple[int, int] | None:
        """The grid of so many patches that follows from the image size which the file states, or None."""
        stated = self._told_grid()
        return stated if stated is not None and stated[0] * stated[1] == rows else None

    def _told_grid(self) -> tuple[int, int] | None:
        """The grid of patches that the files say the weights were trained on, or None."""
        size, patch = self.arch.get("img_size"), self.arch["patch_size"]
        if size is None:
            return None
        h, w = (size, size) if isinstance(size, int) else size
        return h // patch[0], w // patch[1]

    def position_table(self, name: str, guess: tuple[int, int]) -> Tensor | None:
        """Position embedding `name` with a class row: stored, or computed for the grid `guess`, or None."""
        width = {"pos_embed": "embed_dim", "decoder_pos_embed": "decoder_embed_dim"}[name]
        if name in self.state:
            table = self.state[name].float()
            return table if self._has_class_row(table.shape[1], guess) else with_class_row(table)
        if self.position == SINUSOID and self.arch.get(width):
            return with_class_row(sinusoid(guess[0] * guess[1], self.arch[width]))
        return None

    def _has_class_row(self, rows: int, guess: tuple[int, int]) -> bool:
        """Whether a stored table of so many rows has one for the class token, which timm's `no_embed_class` leaves out.

        Rows may be all patches of one grid, or one more than those of another: 25 are 5 x 5, or 4 x 6 and a class row.
        """
        if not self.has_class_token or "mask_token" in self.state:
            return self.has_class_token
        for patches in (rows - 1, rows):
            if self.stated_grid(patches) is not None:
                return patches < rows
        if rows > 1 and (guess[0] * guess[1] == rows - 1 or math.isqrt(rows - 1) ** 2 == rows - 1):
            return True
        return guess[0] * guess[1] != rows and math.isqrt(rows) ** 2 != rows


def read_pretrained(path: str) -> PretrainedWeights:
    """Reads a checkpoint without running code: see `open_checkpoint` for what `path` may be.

    Raises ValueError in one or two plain sentences: nothing there, truncated, damaged, holding code, or a
    network that is unknown here or computes another function.
    """
    opened = open_checkpoint(path)
    head_difference, assumptions = check_network(opened, path)
    layout = convert(opened.tensors, opened.args, path)
    kind = f"{_family(opened, layout)}, {_contents(layout.state)}"
    meta = {"config": opened.config, "args": opened.args, "processor": opened.processor, **opened.counters}
    head_difference = head_difference or _head_difference(layout.state, opened.config)
    notes = opened.notes + layout.notes
    if layout.family in ("timm", "Hugging Face ViT") and "decoder_embed.weight" not in layout.state:
        notes += assumptions
    return PretrainedWeights(path, kind, layout.state, notes, meta, layout.position, head_difference)


def architecture(state: State) -> dict[str, Any]:
    """Sizes that a state dict under the reference's names tells: widths, depths, patch and channels."""
    patch = state["patch_embed.proj.weight"]
    sizes: dict[str, Any] = {
        "patch_size": list(patch.shape[2:]),
        "in_chans": patch.shape[1],
        "embed_dim": patch.shape[0],
        "depth": _depth(state, "blocks"),
    }
    if "blocks.0.mlp.fc1.weight" in state:
        sizes["mlp_ratio"] = state["blocks.0.mlp.fc1.weight"].shape[0] / sizes["embed_dim"]
    if "decoder_embed.weight" in state:
        sizes["decoder_embed_dim"] = state["decoder_embed.weight"].shape[0]
        sizes["decoder_depth"] = _depth(state, "decoder_blocks")
    return sizes


def _depth(state: State, blocks: str) -> int:
    return 1 + max((int(m[1]) for name in state if (m := re.match(rf"{blocks}\.(\d+)\.", name))), default=-1)


def _told(meta: dict[str, Any]) -> dict[str, Any]:
    """Image size and heads, which no tensor tells: from config.yaml, config.json or the saved arguments."""
    config, args = meta.get("config", {}), meta.get("args", {})
    model = config.get("model") if isinstance(config.get("model"), dict) else {}
    extra = config.get("model_args") or {}
    cfg = config.get("pretrained_cfg") or {}
    sizes = (
        model.get("img_size"),
        config.get("image_size"),
        extra.get("img_size"),
        cfg.get("input_size"),
        args.get("img_size"),  # timm's training script's, our exports'
        args.get("input_size"),  # the reference's, MAE-pytorch's
        args.get("input_resolution"),  # the seed's
    )
    heads = (model.get("num_heads"), config.get("num_attention_heads"), extra.get("num_heads"), args.get("num_heads"))
    wide = (
        model.get("decoder_num_heads"), config.get("decoder_num_attention_heads"), args.get("decoder_num_heads")
    )  # fmt: skip
    return {
        "img_size": next((size for size in map(_image_size, sizes) if size), None),
        "num_heads": next(filter(None, heads), None),
        "decoder_num_heads": next(filter(None, wide), None),
        "layer_norm_eps": config.get("layer_norm_eps"),
    }


def _image_size(value: Any) -> int | list[int] | None:
    """A side, or (height, width), which may stand after the channels; None for anything else."""
    if isinstance(value, int):
        return value
    if isinstance(value, list | tuple) and len(value) in (2, 3) and all(isinstance(side, int) for side in value):
        return list(value[-2:])
    return None


def _family(opened: Opened, layout: Layout) -> str:
    """Who wrote it. Names tell most; ours, the reference's and timm's are told by what holds them."""
    if layout.family != "timm":
        return layout.family
    if opened.origin in ("ours", "timm"):
        return opened.origin
    if opened.wrapper == "model" or "decoder_embed.weight" in layout.state or "head.1.weight" in layout.state:
        return "reference"
    return "timm"


def _contents(state: State) -> str:
    if "decoder_pred.weight" in state:
        text = "pretrained (encoder and decoder)"
    elif head := _head(state):
        where = "class token" if "cls_token" in state else "mean of all tokens"
        where = "mean of the patch tokens" if head.pool == "avg" else where
        text = f"{'linear probe' if head.batch_norm else 'classifier'} of {head.classes} classes ({where})"
    else:
        text = "pretrained (encoder only)"
    return text if "cls_token" in state else f"{text}, no class token"


def _head_difference(state: State, config: dict[str, Any]) -> str:
    """Why the tensors' classifier is none of ours, as a part of a sentence, or ""."""
    pool = config.get("global_pool") or (config.get("model_args") or {}).get("global_pool")
    norm, pooled_norm = "norm.weight" in state, "fc_norm.weight" in state
    if _head(state) is None:
        return ""
    if norm == pooled_norm:
        return f"its classifier has {'two norms' if norm else 'no norm'} before it"
    if norm and (pool == "avg" or "cls_token" not in state):
        return "its classifier reads the mean of tokens after their norm, and none here does (timm's fc_norm=False)"
    return ""


def _head(state: State) -> Head | None:
    weight = state.get("head.weight", state.get("head.1.weight"))
    if weight is None:
        return None
    pool: Literal["avg", "token"] = "avg" if "fc_norm.weight" in state else "token"
    return Head(weight.shape[0], pool, "head.0.running_var" in state)
