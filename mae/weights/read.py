"""Checkpoints of any origin, read into one form: the reference's names (timm's, for the encoder).

`read_pretrained(path)` recognises this project's runs, facebookresearch/mae, timm, Hugging Face ViT and ViTMAE,
TonyLianLong/CrossMAE, shiyuwuCASIA/MAE-repo and pengzhiliang/MAE-pytorch; `load.load_pretrained` puts what was read
into a model.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mae.runs.checkpoints import PROBED_LAYER
from mae.weights.files import Opened, open_checkpoint
from mae.weights.heads import (
    LAST_LAYERS,
    DecodeHeadKind,
    Head,
    contents,
    head_difference_of,
    head_of,
)
from mae.weights.layouts import SINUSOID, Layout, convert, sinusoid, with_class_row
from mae.weights.metadata import Metadata, Settings, section
from mae.weights.names import State
from mae.weights.networks import check_network
from mae.weights.preprocessing import Preprocessing, preprocessing_of
from mae.weights.sizes import Sizes, sizes_of_state, stated_sizes


@dataclass
class PretrainedWeights:
    """A checkpoint under the reference's names."""

    path: str
    kind: str  # a fragment of a sentence: "reference, pretrained (encoder only)"
    state: State
    notes: list[str]  # sentences on what was converted or left out
    meta: Metadata
    position: str = ""  # SINUSOID: the position tables are computed, not stored
    position_patch: list[int] | None = None  # that its positions are of, where its first layer was adapted
    head_difference: str = ""  # why its classifier is none of ours, as a part of a sentence
    key: str = "init"  # of the config, under which a user named it

    def __str__(self) -> str:
        return f"{self.key}={self.path} ({self.kind})"

    @property
    def has_decoder(self) -> bool:
        return {"mask_token", "decoder_pred.weight"} <= self.state.keys()

    @property
    def has_class_token(self) -> bool:
        return "cls_token" in self.state

    @property
    def head(self) -> Head | None:
        head = head_of(self.state)
        return head if head is None else head._replace(layer=self._probed_layer())

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

    def _probed_layer(self) -> int | None:
        """The block that a probe of ours reads, as the files beside the tensors say."""
        task = section(self.meta.config, "task")
        layer = self.meta.args.get(PROBED_LAYER, task.get("layer") if task.get("name") == "linprobe" else None)
        return layer if isinstance(layer, int) else None

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
        down, across = self.position_patch or sizes["patch_size"]
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
    kind = f"{_family(opened, layout)}, {contents(layout.state)}"
    head_difference = head_difference or head_difference_of(layout.state, opened.meta.config)
    notes = opened.notes + layout.notes
    encoder = layout.family in ("timm", "Hugging Face ViT") and "decoder_pred.weight" not in layout.state
    if encoder or opened.origin == "ours":
        notes += assumptions
    meta, position = opened.meta, layout.position
    return PretrainedWeights(path, kind, layout.state, notes, meta, position, head_difference=head_difference)


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
