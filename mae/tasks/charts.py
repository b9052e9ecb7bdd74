"""Charts of a classifier's results and of a data set."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from mae.report.glyphs import drawable
from mae.runs.files import replacing

NAMED = 30  # classes whose names fit along an axis


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def confusion(counts: np.ndarray, names: list[str], path: Path) -> None:
    """Confusion matrix (C, C) as a picture: each row as shares of the images of its class.

    Classes without images and predictions are left out.
    """
    used = np.flatnonzero(counts.sum(0) + counts.sum(1))
    counts, names = counts[np.ix_(used, used)], [names[k] for k in used]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(5.0, min(12.0, 2 + 0.45 * len(names)))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true class", title=f"Confusion of {len(names)} classes")
    if len(names) <= NAMED:
        labels, font = drawable(names)
        axes.set_xticks(range(len(names)), labels, rotation=90, **font)
        axes.set_yticks(range(len(names)), labels, **font)
        for row, column in np.argwhere(counts > 0):
            shade = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=shade, fontsize=7)
    figure.colorbar(image, label="share of the class", shrink=0.8)
    _save(figure, path)


def calibration(bins: np.ndarray, error: float, path: Path) -> None:
    """Reliability diagram of (bins, 3): images, mean confidence, accuracy."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    used = bins[:, 0] > 0
    left = np.arange(len(bins)) / len(bins)
    axes.bar(left[used], bins[used, 2], width=1 / len(bins), align="edge", color="#6baed6", edgecolor="white")
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title=f"Calibration error {error:.4f}")
    _save(figure, path)


def captioned(
    images: Sequence[Tensor],
    captions: list[tuple[str, str]],
    title: str,
    path: Path,
    columns: int = 8,
    aspect: float = 1.0,
) -> None:
    """Images (C, H, W) in [0, 1] side by side, with two lines below each. Other than three channels show as their
    mean. `aspect` is the width over the height of their cells."""
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    figure = Figure(figsize=(1.5 * aspect * columns, 1.95 * rows + 0.5), layout="constrained")
    names, font = drawable([textwrap.shorten(name, 22, placeholder="...") or "?" for name, _ in captions])
    for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.set_axis_off()
    for axes, image, name, (_, line) in zip(grid.flat, images, names, captions, strict=False):
        values = image.float().cpu() if len(image) == 3 else image.float().cpu().mean(0, keepdim=True)
        axes.imshow(values.clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
        axes.text(0.5, -0.04, f"{name}\n{line}", transform=axes.transAxes, ha="center", va="top", fontsize=8, **font)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def sizes(counts: Counter[tuple[int, int]], path: Path) -> None:
    """Histograms of heights and widths from (height, width) -> images."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    weights = np.array(list(counts.values()))
    for axes, side, name in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("height", "width"), strict=True):
        values = np.array([size[side] for size in counts])
        bins = min(50, max(1, int(values.max() - values.min()) + 1))
        axes.hist(values, bins=bins, weights=weights, color="#6baed6", edgecolor="white", linewidth=0.3)
        middle = np.median(np.repeat(values, weights))
        axes.set(xlabel=f"{name} in pixels", title=f"{name}: {values.min()} to {values.max()}, median {middle:g}")
    figure.axes[0].set_ylabel(f"of {weights.sum()} images")
    _save(figure, path)


def bars(names: list[str], values: list[float], title: str, path: Path) -> None:
    """One horizontal bar a class, in the order of the classes; values in percent."""
    labels, font = drawable(names)
    figure = Figure(figsize=(6, max(2.0, min(40.0, 1 + 0.22 * len(names)))), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(names)), values, color="#6baed6")
    axes.set_yticks(range(len(names)), labels, **font)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel=title)
    for row, value in enumerate(values):
        axes.text(min(value, 92), row, f" {value:.1f}", va="center", fontsize=7)
    _save(figure, path)
