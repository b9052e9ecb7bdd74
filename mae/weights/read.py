"""Checkpoints of any origin, read into one form: the reference's names (timm's, for the encoder).

`read_pretrained(path)` recognises this project's runs, facebookresearch/mae, timm, Hugging Face ViT and ViTMAE,
TonyLianLong/CrossMAE, shiyuwuCASIA/MAE-repo and pengzhiliang/MAE-pytorch; `load.load_pretrained` puts what was read
into a model.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from mae.weights.files import Metadata, Opened, Settings, open_checkpoint, section
from mae.weights.layouts import SINUSOID, Layout, convert, sinusoid, with_class_row
from mae.weights.names import State
from mae.weights.networks import check_network
from mae.weights.preprocessing import Preprocessing, preprocessing_of
from mae.weights.sizes import Sizes, sizes_of_state, stated_sizes


class Head(NamedTuple):
    """The classifier in a checkpoint: what it reads and how many classes it knows."""

    classes: int
    pool: Literal["avg", "token"]  # mean of patch tokens after `fc_norm`, or the class token after `norm`
    batch_norm: bool  # the reference's linear probe: BatchNorm without affine before the matrix


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


@dataclass
class PretrainedWeights:
    """A checkpoint under the reference's names."""

    path: str
    kind: str  # a fragment of a sentence: "reference, pretrained (encoder only)"
    state: State
    notes: list[str]  # sentences on what was converted or left out
    meta: Metadata
    position: str = ""  # SINUSOID: the position tables are computed, not stored
    head_difference: str = ""  # why its classifier is none of ours, as a part of a sentence

    def __str__(self) -> str:
        return f"init={self.path} ({self.kind})"

    @property
    def has_decoder(self) -> bool:
        return {"mask_token", "decoder_pred.weight"} <= self.state.keys()

    @property
    def has_class_token(self) -> bool:
        return "cls_token" in self.state

    @property
    def head(self) -> Head | None:
        return _head(self.state)

    @property
    def decode_head(self) -> DecodeHeadKind | None:
        """The head of a segmenter, or None."""
        return next(
            (DecodeHeadKind(kind, len(self.state[name])) for kind, name in LAST_LAYERS.items() if name in self.state),
            None,
        )

    @property
    def sizes(self) -> Sizes:
        """Sizes under the names of `model.*`, as far as the tensors or the files beside them tell."""
        return {**sizes_of_state(self.state), **stated_sizes(self.meta)}

    @property
    def norm_pix_loss(self) -> bool | None:
        """Whether normalised patches are predicted, as the files beside the tensors say; None where nothing does."""
        values = self._settings("norm_pix_loss", "normlize_target")  # the latter is MAE-pytorch's
        return next((value for value in values if isinstance(value, bool)), None)

    @property
    def mask_ratio(self) -> float | None:
        """The share of patches that was masked in training, as the files beside the tensors say, or None; the middle of
        a range."""
        for value in self._settings("mask_ratio"):
            if isinstance(value, float):
                return value
            if isinstance(value, list) and len(value) == 2:
                return sum(value) / 2
        return None

    @property
    def target(self) -> Settings | None:
        """The settings of what is predicted, as the files beside the tensors say, or None: the reference's pixels."""
        return section(self.meta.config, "target") or section(self.meta.args, "target") or None

    @property
    def predicted_values(self) -> int:
        """Values that the decoder predicts for a patch; 1 where there is no decoder."""
        weight = self.state.get("decoder_pred.weight")
        return 1 if weight is None else weight.shape[0]

    @property
    def of_a_run(self) -> bool:
        """Whether a run's config.yaml goes with it."""
        return bool(section(self.meta.config, "data"))

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How the training's images were prepared, as the files beside the tensors say, or None."""
        return preprocessing_of(self.meta)

    def _settings(self, *keys: str) -> list[object]:
        """A setting of the training by any of its names, from a run's config, a config.json or saved arguments."""
        sources = (section(self.meta.config, "task"), self.meta.config, self.meta.args)
        return [source.get(key) for source in sources for key in keys]

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
        sizes = self.sizes
        if "img_size" not in sizes:
            return None
        height, width = sizes["img_size"] if isinstance(sizes["img_size"], list) else [sizes["img_size"]] * 2
        down, across = sizes["patch_size"]
        grid = height // down, width // across
        return grid if grid[0] * grid[1] == rows else None

    def position_table(self, name: Literal["pos_embed", "decoder_pos_embed"], guess: tuple[int, int]) -> Tensor | None:
        """Position embedding `name` with a class row: stored, or computed for the grid `guess`, or None."""
        if name in self.state:
            table = self.state[name].float()
            return table if self._has_class_row(table.shape[1], guess) else with_class_row(table)
        width = self.sizes.get("embed_dim" if name == "pos_embed" else "decoder_embed_dim")
        if self.position == SINUSOID and width:
            return with_class_row(sinusoid(guess[0] * guess[1], width))
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

    Raises UserError in one or two plain sentences: nothing there, truncated, damaged, holding code, or a
    network that is unknown here or computes another function.
    """
    opened = open_checkpoint(path)
    head_difference, assumptions = check_network(opened, path)
    layout = convert(opened.tensors, opened.meta.args, path)
    kind = f"{_family(opened, layout)}, {_contents(layout.state)}"
    head_difference = head_difference or _head_difference(layout.state, opened.meta.config)
    notes = opened.notes + layout.notes
    if layout.family in ("timm", "Hugging Face ViT") and "decoder_pred.weight" not in layout.state:
        notes += assumptions
    return PretrainedWeights(path, kind, layout.state, notes, opened.meta, layout.position, head_difference)


def _family(opened: Opened, layout: Layout) -> str:
    """The library that wrote it; ours, the reference and timm share their names, and differ in what holds tensors."""
    if layout.family != "timm":
        return layout.family
    if opened.origin in ("ours", "timm"):
        return opened.origin
    if "wfm.linear.weight" in layout.state:
        return "CrossMAE"
    if opened.wrapper == "model" or "decoder_pred.weight" in layout.state or "head.1.weight" in layout.state:
        return "reference"
    return "timm"


def _contents(state: State) -> str:
    if "decoder_pred.weight" in state:
        text = "pretrained (encoder and decoder)"
    elif any(name in state for name in LAST_LAYERS.values()):
        text = "segmenter"
    elif head := _head(state):
        read = "class token" if "cls_token" in state else "mean of all tokens"
        read = "mean of the patch tokens" if head.pool == "avg" else read
        text = f"{'linear probe' if head.batch_norm else 'classifier'} of {head.classes} classes ({read})"
    else:
        text = "pretrained (encoder only)"
    return text if "cls_token" in state else f"{text}, no class token"


def _head_difference(state: State, config: Settings) -> str:
    """Why the tensors' classifier is none of ours, as a part of a sentence, or ""."""
    pool = config.get("global_pool") or section(config, "model_args").get("global_pool")
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
    return Head(weight.shape[0], "avg" if "fc_norm.weight" in state else "token", "head.0.running_var" in state)
