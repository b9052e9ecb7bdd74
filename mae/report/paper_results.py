"""Results of the paper (arXiv 2111.06377) that sweeps are drawn beside: ViT-L/16, ImageNet-1k, top-1 in percent.

Only numbers in its text and tables: other points of its figures were never published as numbers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Points of one curve, and their source in the paper."""

    points: dict[float, float]
    source: str


# swept key -> stage -> published points
PUBLISHED: dict[str, dict[str, Published]] = {
    "task.mask_ratio": {
        "linprobe": Published({0.1: 54.6, 0.75: 73.5}, "figure 5 as its text quotes it, ViT-L, 800 epochs"),
        "finetune": Published({0.75: 84.9}, "table 1f, ViT-L, 800 epochs; flat from 0.4 to 0.8, always above 82.5"),
    },
    "model.decoder_depth": {
        "finetune": Published({1: 84.8, 2: 84.9, 4: 84.9, 8: 84.9, 12: 84.4}, "table 1a, ViT-L, 800 epochs"),
        "linprobe": Published({1: 65.5, 2: 70.0, 4: 71.9, 8: 73.5, 12: 73.3}, "table 1a, ViT-L, 800 epochs"),
    },
}

# Fine-tuning with several seeds: model -> mean and deviation
SEEDS = {"vit_base": (83.57, 0.08), "vit_large": (85.87, 0.07)}
