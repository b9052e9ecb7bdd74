"""Scenes of several handwritten digits, whose pixels are the classes: an embedded data set for segmentation."""

from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from mae.data.crops import resize
from mae.data.settings import Count, Split
from mae.data.source import Arrays, Source, replicate
from mae.data.sources.torchvision import digits

CLASSES = ["background", *(str(digit) for digit in range(10))]
INK = 32  # of 255: darker pixels of an enlarged digit are background
SMALLEST, LARGEST = 14, 18  # pixels of a digit's side
TRIES = 10  # at a place where no other digit is
SEEDS = {"train": 2111_06377, "val": 2111_06378}


class Scenes(Arrays):
    """Images with a map of classes each, in memory."""

    def __init__(self, images: Tensor, maps: Tensor, classes: list[str], label: str):
        super().__init__(images, None, classes, label)
        self.maps = maps  # (N, H, W) uint8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.maps[index]


def digit_scenes(
    split: Split,
    *,
    in_chans: Count,
    val_fraction: Annotated[float, "[0, 1]"],
    canvas: Annotated[int, "[24, inf)"],
    digits_per_scene: Count,
    scenes: Count,
    val_scenes: Count,
) -> Source:
    """scikit-learn's digits, `digits_per_scene` at random on a square of `canvas` pixels, always the same scenes.

    Their sizes, places and brightness are random; a later digit covers an earlier one. Training and validation scenes
    show different digits. Class 0 is the background, class d + 1 the digit d.
    """
    source = digits(split, in_chans=1, val_fraction=val_fraction)
    random = np.random.default_rng(SEEDS[split])
    count = scenes if split == "train" else val_scenes
    images = torch.zeros(count, 1, canvas, canvas, dtype=torch.uint8)
    maps = torch.zeros(count, canvas, canvas, dtype=torch.uint8)
    for image, labels in zip(images[:, 0], maps, strict=True):
        for chosen in random.integers(len(source), size=digits_per_scene).tolist():
            pixels, digit = source[chosen]
            assert isinstance(digit, int)
            _draw(image, labels, pixels, digit, random)
    return Scenes(replicate(images, in_chans, "digit_scenes"), maps, CLASSES, f"digit_scenes/{split}")


def _draw(image: Tensor, labels: Tensor, pixels: Tensor, digit: int, random: np.random.Generator) -> None:
    """Draws a digit (1, h, w) into an image (H, W) and its map (H, W), away from others where a few tries allow."""
    side = int(random.integers(SMALLEST, LARGEST + 1))
    drawn = resize(pixels, (side, side)).float()[0]
    ink, brightness = drawn >= INK, float(random.uniform(0.5, 1.0))
    corners = random.integers(0, len(labels) - side + 1, (TRIES, 2)).tolist()
    boxes = [np.s_[top : top + side, left : left + side] for top, left in corners]
    box = next((box for box in boxes if not labels[box].any()), boxes[0])
    image[box][ink] = (drawn[ink] * brightness).to(torch.uint8)
    labels[box][ink] = digit + 1
