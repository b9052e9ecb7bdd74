"""The figure of a sweep: results against the swept value, mean and deviation over seeds, the paper's points beside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig

from mae.report.glyphs import drawable, make_drawable
from mae.report.members import Value
from mae.report.paper_results import PUBLISHED, SEEDS, Published
from mae.runs.files import replacing
from mae.tasks.registry import METRICS, TASKS

COLOURS = ("#2563a8", "#d9662b", "#2a8f5c", "#8f4bb3", "#b8323a", "#7a6a1e")
PAPER = "#8a8f98"


@dataclass
class Curve:
    """One result over the values of the swept key."""

    metric: str  # `top1`, or of a pipeline `finetune top1`
    stage: str
    key: str  # what is swept
    label: str  # values of further swept keys; empty where there are none
    points: Mapping[Value | None, list[float]]  # swept value -> a result a seed
    scatter: bool = False  # the members differ in more than this key


def draw_figure(curves: list[Curve], cfg: DictConfig, png: Path, svg: Path) -> bool:
    """Writes the figure as PNG and SVG. Returns false, and writes nothing, where there is no result yet."""
    panels = list(dict.fromkeys((c.metric, c.key) for c in curves))
    if not panels:
        return False
    figure = Figure(figsize=(5.6 * len(panels), 4.0), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes, [c for c in curves if (c.metric, c.key) == panel], cfg)
    for path in (png, svg):
        with replacing(path) as temporary:
            metadata = {"Date": None} if path is svg else None
            figure.savefig(temporary, dpi=130, format=path.suffix[1:], metadata=metadata)
    return True


def draw_panel(axes: Axes, curves: list[Curve], cfg: DictConfig) -> None:
    """Draws one result, ours on the left axis and the paper's on a grey one of its own."""
    first = curves[0]
    values = list(dict.fromkeys(x for c in curves for x in c.points))
    numbers = [float(x) for x in values if isinstance(x, int | float) and not isinstance(x, bool)]
    numeric = len(numbers) == len(values)
    wide = numeric and min(numbers) > 0 and max(numbers) / min(numbers) >= 8
    positions = dict(zip(values, numbers if numeric else map(float, range(len(values))), strict=True))
    for number, curve in enumerate(curves):
        draw_curve(axes, curve, positions, COLOURS[number % len(COLOURS)])
    if wide and first.key != "task.mask_ratio":
        axes.set_xscale("log")
        axes.minorticks_off()
    if not numeric or not first.scatter:
        labels, font = drawable([f"{x:g}" if numeric else str(x) for x in values])
        axes.set_xticks([*positions.values()], labels, **font)
    axes.set(xlabel=first.key, ylabel=METRICS[first.metric.split(" ")[-1]].title)
    stage = TASKS[first.stage].title if first.stage in TASKS else first.stage
    make_drawable(axes.set_title(f"{stage}: {cfg.model.name} on {cfg.data.name}", fontsize=11))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if first.key == "seed":
        draw_spread(axes, first, cfg)
    published = PUBLISHED.get(first.key, {}).get(first.stage)
    if published is not None and numeric:
        draw_published(axes, published)
    elif axes.get_legend_handles_labels()[1]:
        _legend(axes, *axes.get_legend_handles_labels())


def draw_curve(axes: Axes, curve: Curve, positions: Mapping[Value | None, float], colour: str) -> None:
    """Draws means over seeds with their deviation, and the single results where there are several."""
    ordered = sorted(curve.points, key=lambda x: positions[x])
    at = np.array([positions[x] for x in ordered])
    mean = np.array([np.mean(curve.points[x]) for x in ordered])
    deviation = np.array([np.std(curve.points[x], ddof=1) if len(curve.points[x]) > 1 else 0.0 for x in ordered])
    several = max(len(v) for v in curve.points.values())
    spread_label = f"mean of {several} seeds ± deviation" if several > 1 and not curve.scatter else ""
    label = ", ".join(t for t in (curve.label, spread_label) if t)
    style = "none" if curve.key == "seed" or curve.scatter else "-"
    axes.errorbar(
        at,
        mean,
        deviation if several > 1 else None,
        marker="o",
        linestyle=style,
        color=colour,
        capsize=4,
        label=label or "ours",
    )
    if several > 1:
        for x in ordered:
            axes.plot(
                [positions[x]] * len(curve.points[x]), curve.points[x], ".", color=colour, alpha=0.35, markersize=5
            )


def draw_spread(axes: Axes, curve: Curve, cfg: DictConfig) -> None:
    """Draws mean and deviation of one configuration over seeds, and the paper's for its model."""
    results = [v for values in curve.points.values() for v in values]
    mean, deviation = float(np.mean(results)), float(np.std(results, ddof=1)) if len(results) > 1 else 0.0
    label = f"mean {mean:.2f} ± {deviation:.2f} over {len(results)} seeds"
    axes.axhline(mean, color=COLOURS[0], linestyle="--", linewidth=1, label=label)
    axes.axhspan(mean - deviation, mean + deviation, color=COLOURS[0], alpha=0.12)
    known = SEEDS.get(cfg.model.name) if curve.stage == "finetune" and cfg.data.name == "imagenet" else None
    if known is not None:
        axes.axhline(known[0], color=PAPER, linestyle=":", label=f"the paper's: {known[0]} ± {known[1]}")
        axes.axhspan(known[0] - known[1], known[0] + known[1], color=PAPER, alpha=0.2)


def draw_published(axes: Axes, published: Published) -> None:
    """Draws the paper's points on an axis of their own: with another model and other data, only the shape compares."""
    right = axes.twinx()
    at = sorted(published.points)
    right.plot(
        at,
        [published.points[x] for x in at],
        marker="D",
        markerfacecolor="white",
        linestyle=":" if len(at) > 2 else "none",
        color=PAPER,
        label=f"the paper's ({published.source})",
    )
    right.set_ylabel("the paper's top-1 (%), ImageNet-1k", color=PAPER)
    right.tick_params(axis="y", colors=PAPER)
    right.spines[["top", "left"]].set_visible(False)
    right.spines["right"].set_color(PAPER)
    right.margins(y=0.2)
    left_handles, left_labels = axes.get_legend_handles_labels()
    handles, labels = right.get_legend_handles_labels()
    handles, labels = left_handles + handles, left_labels + labels
    _legend(axes, handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _legend(axes: Axes, handles: Sequence[Artist], labels: list[str], **options: Any) -> None:
    for text in axes.legend(handles, labels, fontsize=8, frameon=False, **options).get_texts():
        make_drawable(text)
