"""The figure of a sweep: results against the swept value, mean and deviation over seeds, published points beside."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig

from mae.report.glyphs import drawable, make_drawable
from mae.report.intervals import interval
from mae.report.members import Value
from mae.report.paper_results import PUBLISHED, SEEDS, Published
from mae.runs.files import replacing
from mae.tasks.registry import METRICS, TASKS

COLOURS = ("#2563a8", "#d9662b", "#2a8f5c", "#8f4bb3", "#b8323a", "#7a6a1e")
PAPER = "#8a8f98"
LONG_LABELS = 50  # characters of a panel's labels, above which they are turned
ROTATED = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"}
NAMES = {("task.finetune_blocks", "null"): "all"}  # (key, value) -> its label


@dataclass
class Curve:
    """One result over the values of the swept key."""

    metric: str  # `top1`, or of a pipeline `finetune top1`
    stage: str
    key: str  # what is swept
    label: str  # values of further swept keys; empty where there are none
    points: Mapping[Value | None, list[float]]  # swept value -> a result a seed
    scatter: bool = False  # the members differ in more than this key
    images: Mapping[Value | None, int] = field(default_factory=dict)  # swept value -> images that its accuracy is of


def draw_figure(curves: list[Curve], cfg: DictConfig, png: Path, svg: Path) -> bool:
    """Writes the figure as PNG and SVG. Returns false, and writes nothing, where there is no result yet."""
    if not curves:
        return False
    figure = figure_of(curves, cfg)
    for path in (png, svg):
        with replacing(path) as temporary:
            metadata = {"Date": None} if path is svg else None
            figure.savefig(temporary, dpi=130, format=path.suffix[1:], metadata=metadata)
    return True


def figure_of(curves: list[Curve], cfg: DictConfig) -> Figure:
    """A panel for each result. The panels of a key have one range, though published points may stand in one alone."""
    panels = list(dict.fromkeys((c.metric, c.key) for c in curves))
    figure = Figure(figsize=(5.6 * len(panels), 4.0), layout="constrained")
    axes_of_key: dict[str, list[Axes]] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes, [c for c in curves if (c.metric, c.key) == panel], cfg)
        axes_of_key.setdefault(panel[1], []).append(axes)
    for alike in axes_of_key.values():
        lows, highs = zip(*(axes.get_xlim() for axes in alike), strict=True)
        for axes in alike:
            axes.set_xlim(min(lows), max(highs))
    return figure


def draw_panel(axes: Axes, curves: list[Curve], cfg: DictConfig) -> None:
    """Draws one result, ours on the left axis and the paper's on a grey one of its own."""
    first = curves[0]
    values = list(dict.fromkeys(x for c in curves for x in c.points))
    numbers = [float(x) for x in values if isinstance(x, int | float) and not isinstance(x, bool)]
    spans = {x: span for x in values if numbers and (span := span_of(x)) is not None}
    numeric = len(numbers) + len(spans) == len(values)
    if not numeric:
        spans = {}
    wide = numeric and min(numbers) > 0 and max(numbers) / min(numbers) >= 8
    values = [x for x in values if x not in spans]
    positions = dict(zip(values, numbers if numeric else map(float, range(len(values))), strict=True))
    for number, curve in enumerate(curves):
        colour, single = COLOURS[number % len(COLOURS)], {x: v for x, v in curve.points.items() if x not in spans}
        if single:
            draw_curve(axes, replace(curve, points=single), positions, colour, line=bool(numbers))
        draw_spans(axes, curve, spans, colour)
    if wide and first.key != "task.mask_ratio":
        axes.set_xscale("log")
        axes.minorticks_off()
    stage = TASKS[first.stage].title if first.stage in TASKS else first.stage
    published = PUBLISHED.get(first.key, {}).get(first.stage)
    if first.key == "task.epochs" and cfg.task.name != "pipeline":  # the published epochs are of pre-training
        published = None
    at = {} if published is None else published_positions(published, positions, numeric, cfg)
    if not numeric or not first.scatter:
        texts = differing_parts([NAMES.get((first.key, written(x)), written(x)) for x in values])
        labels, font = drawable(texts)
        long = not numeric and sum(map(len, texts)) > LONG_LABELS
        theirs = [x for x in at if x not in positions.values()]
        labels += [f"{x:g}" for x in theirs]
        axes.set_xticks([*positions.values(), *theirs], labels, **font, **(ROTATED if long else {}))
    axes.set(xlabel=first.key, ylabel=METRICS[first.metric.split(" ")[-1]].title)
    make_drawable(axes.set_title(f"{stage}: {cfg.model.name} on {cfg.data.name}", fontsize=11))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if first.key == "seed":
        draw_spread(axes, first, cfg)
    if published is not None and at:
        draw_published(axes, published, at, line=bool(numbers) and len(at) > 2)
    elif axes.get_legend_handles_labels()[1]:
        legend_below(axes, *axes.get_legend_handles_labels())


def written(value: Value | None) -> str:
    """A swept value as an axis names it: 1, not 1.0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:g}" if number else str(value)


def span_of(value: Value | None) -> tuple[float, float] | None:
    """The ends of a swept range such as `[0.6, 0.9]`, which tables have as text; None of any other value."""
    try:
        ends = json.loads(value) if isinstance(value, str) and value.startswith("[") else []
    except ValueError:
        return None
    two = len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    return (float(ends[0]), float(ends[1])) if two else None


def draw_spans(axes: Axes, curve: Curve, spans: Mapping[Value | None, tuple[float, float]], colour: str) -> None:
    """Draws the mean result of a range as a bar from one end to the other, with the range beside it."""
    for value, ends in spans.items():
        if value in curve.points:
            mean = float(np.mean(curve.points[value]))
            axes.plot(ends, [mean, mean], marker="|", markersize=9, linewidth=2.5, color=colour, alpha=0.6)
            axes.annotate(str(value), (ends[1], mean), (4, 0), textcoords="offset points", va="center", fontsize=8)


def draw_curve(axes: Axes, curve: Curve, positions: Mapping[Value | None, float], colour: str, line: bool) -> None:
    """Draws means over seeds with their deviation, and the single results where there are several.

    The results of one seed carry the interval that their number of images gives.
    """
    ordered = sorted(curve.points, key=lambda x: positions[x])
    at = np.array([positions[x] for x in ordered])
    mean = [float(np.mean(curve.points[x])) for x in ordered]
    several = max(len(v) for v in curve.points.values())
    spread, spread_label = error_bars(curve, ordered, mean)
    label = ", ".join(t for t in (curve.label, spread_label) if t)
    style = "-" if line and curve.key != "seed" and not curve.scatter else "none"
    bars = axes.errorbar(at, mean, spread, marker="o", linestyle=style, color=colour, capsize=4, label=label or "ours")
    for bar in bars[2]:
        bar.set_alpha(1.0 if several > 1 else 0.45)
    if several > 1:
        for x in ordered:
            axes.plot(
                [positions[x]] * len(curve.points[x]), curve.points[x], ".", color=colour, alpha=0.35, markersize=5
            )


def error_bars(curve: Curve, ordered: Sequence[Value | None], mean: Sequence[float]) -> tuple[np.ndarray | None, str]:
    """Lengths (2, values) below and above each mean, or None; and what they are."""
    several = max(len(v) for v in curve.points.values())
    if several > 1:
        deviation = [np.std(curve.points[x], ddof=1) if len(curve.points[x]) > 1 else 0.0 for x in ordered]
        return np.array([deviation, deviation]), "" if curve.scatter else f"mean of {several} seeds ± deviation"
    if curve.key == "seed" or curve.scatter or not all(x in curve.images for x in ordered):
        return None, ""
    limits = np.array([interval(value, curve.images[x]) for value, x in zip(mean, ordered, strict=True)]).T
    counts = {curve.images[x] for x in ordered}
    label = f"95 % interval of {counts.pop():,} images" if len(counts) == 1 else "95 % interval"
    return np.abs(limits - mean), label if curve.label else f"ours, {label}"


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


def published_positions(
    published: Published, positions: Mapping[Value | None, float], numeric: bool, cfg: DictConfig
) -> dict[float, float]:
    """Where on the axis -> the published results; on an axis of words, of those that are swept."""
    if not numeric:
        words = {written(value): position for value, position in positions.items()}
        return {words[str(value)]: result for value, result in published.points.items() if str(value) in words}
    swept, position = list(positions.values()), published.position
    numbers = {value: result for value, result in published.points.items() if not isinstance(value, str)}
    return {position(x, cfg, swept) if position else x: result for x, result in numbers.items()}


def draw_published(axes: Axes, published: Published, points: Mapping[float, float], line: bool) -> None:
    """Draws published points on an axis of their own: with another model and other data, only the shape compares."""
    right = axes.twinx()
    at = sorted(points)
    right.plot(
        at,
        [points[x] for x in at],
        marker="D",
        markerfacecolor="white",
        linestyle=":" if line else "none",
        color=PAPER,
        label=f"{published.owner} ({published.source})",
    )
    right.set_ylabel(f"{published.owner} top-1 (%), ImageNet-1k", color=PAPER)
    right.tick_params(axis="y", colors=PAPER)
    right.spines[["top", "left"]].set_visible(False)
    right.spines["right"].set_color(PAPER)
    right.margins(y=0.2)
    left_handles, left_labels = axes.get_legend_handles_labels()
    handles, labels = right.get_legend_handles_labels()
    handles, labels = left_handles + handles, left_labels + labels
    legend_below(axes, handles, labels)


def legend_below(axes: Axes, handles: Sequence[Artist], labels: list[str]) -> None:
    """A legend under the axis, where its marker covers no point and does not look like a point."""
    turned = any(label.get_rotation() for label in axes.get_xticklabels())
    anchor = (0.5, -0.34 if turned else -0.16)
    legend = axes.legend(handles, labels, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=anchor)
    for text in legend.get_texts():
        make_drawable(text)


def differing_parts(texts: Sequence[str]) -> list[str]:
    """Paths without the folders at their start and end that all of them share; other texts as they are."""
    folders = [text.split("/") for text in texts]
    shortest = min(map(len, folders))
    if len(set(texts)) < 2 or shortest < 2:
        return list(texts)
    start = min(len(os.path.commonprefix(folders)), shortest - 1)
    end = min(len(os.path.commonprefix([names[::-1] for names in folders])), shortest - start - 1)
    return ["/".join(names[start : len(names) - end]) for names in folders]
