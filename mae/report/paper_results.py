"""Results of the paper (arXiv 2111.06377) that sweeps are drawn beside: ViT-L/16, ImageNet-1k, top-1 in percent.

Only numbers in its text and tables: other points of its figures were never published as numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 1024  # of ViT-L's encoder

# A published value, the run's config and the values swept here -> where that point is drawn among them
Position = Callable[[float, Mapping[str, Any], Sequence[float]], float]


@dataclass(frozen=True)
class Published:
    """Points of one curve, and their source in the paper."""

    points: Mapping[float | str, float]
    source: str
    position: Position | None = None  # None: at its own value
    owner: str = "the paper's"


def share_of_width(value: float, cfg: Mapping[str, Any], values: Sequence[float]) -> float:  # noqa: ARG001
    """A decoder's width at the same share of the encoder's."""
    return value / WIDTH * cfg["model"]["embed_dim"]


def share_of_longest(value: float, cfg: Mapping[str, Any], values: Sequence[float]) -> float:  # noqa: ARG001
    """Epochs at the same share of the longest schedule, of which 1600 are the longest published ones."""
    return value / 1600 * max(values)


def _published(
    source: str,
    points: Mapping[float | str, tuple[float, float]],
    position: Position | None = None,
    owner: str = Published.owner,
) -> dict[str, Published]:
    """(fine-tuned, linear probe) of each value, as the curves of both stages."""
    return {
        stage: Published({key: pair[number] for key, pair in points.items()}, source, position, owner)
        for number, stage in enumerate(("finetune", "linprobe"))
    }


RATIO_SOURCE = "table 1f, ViT-L, 800 epochs; flat from 0.4 to 0.8, always above 82.5"
# swept key, or the name of a sweep over members -> stage -> published points
PUBLISHED: dict[str, dict[str, Published]] = {
    "task.mask_ratio": {
        "linprobe": Published({0.1: 54.6, 0.75: 73.5}, "figure 5 as its text quotes it, ViT-L, 800 epochs"),
        "finetune": Published({0.75: 84.9}, RATIO_SOURCE),
    },
    "model.decoder_depth": _published(
        "table 1a, ViT-L, 800 epochs",
        {1: (84.8, 65.5), 2: (84.9, 70.0), 4: (84.9, 71.9), 8: (84.9, 73.5), 12: (84.4, 73.3)},
    ),
    "model.decoder_embed_dim": _published(
        "table 1b, ViT-L, 800 epochs; widths at their share of the encoder's",
        {128: (84.9, 69.1), 256: (84.8, 71.3), 512: (84.9, 73.5), 768: (84.4, 73.1), 1024: (84.3, 73.1)},
        share_of_width,
    ),
    "model.mask_tokens": _published("table 1c, ViT-L, 800 epochs", {"encoder": (84.2, 59.6), "decoder": (84.9, 73.5)}),
    "target": _published(
        "table 1d, ViT-L, 800 epochs",
        {"pixels_plain": (84.9, 73.5), "pixels_normalised": (85.4, 73.9), "pca": (84.6, 72.3), "tokens": (85.3, 71.6)},
    ),
    "task.augmentation": _published(
        "table 1e, ViT-L, 800 epochs",
        {"none": (84.0, 65.7), "fixed_crop": (84.7, 73.1), "pretrain": (84.9, 73.5), "color_jitter": (84.3, 71.9)},
    ),
    "masking": _published(
        "table 1f, ViT-L, 800 epochs",
        {"random": (84.9, 73.5), "block_0.5": (83.9, 72.3), "block": (82.8, 63.9), "grid": (84.0, 66.0)},
    ),
    # figure 7 has no numbers; these are of the models that mmpretrain publishes
    "task.epochs": _published(
        "ViT-L, 400, 800 and 1600 epochs at their share of the longest",
        {400: (85.2, 70.7), 800: (85.4, 73.7), 1600: (85.7, 75.5)},
        share_of_longest,
        "mmpretrain's",
    ),
    "task.finetune_blocks": {
        "finetune": Published(
            {"0": 73.5, "0.5": 79.1, "1": 81.0, "null": 84.9}, "figure 9 as its text quotes it, ViT-L, 24 blocks"
        )
    },
}

# Fine-tuning with several seeds: model -> mean and deviation
SEEDS = {"vit_base": (83.57, 0.08), "vit_large": (85.87, 0.07)}
