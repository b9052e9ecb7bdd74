"""Whether a run is still learning: the slope of its masked loss over its last tenth, and what going on would bring."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

WINDOW = 0.1  # of the steps so far
FEWEST = 6  # points of the window that a slope wants: 3 standard errors are then one chance in 25
SURE = 3.0  # standard errors: fewer, and the slope may be noise
FLAT = 0.005  # of the loss: a change over the window that is surely smaller is none
DECAYED = 0.1  # of the peak: a learning rate below it changes little more
# The first of them that has enough points counts: validation has the same images and masks each time
TITLES = {"val/loss": "validation loss", "loss": "training loss"}


class Line(NamedTuple):
    """A least-squares line through the points of a window."""

    change: float  # over the window; negative: the loss falls
    error: float  # its standard error
    level: float  # the line's end


def fitted(steps: Sequence[float], values: Sequence[float]) -> Line:
    """The line through three points or more."""
    count = len(steps)
    middle, mean = sum(steps) / count, sum(values) / count
    spread = sum((x - middle) ** 2 for x in steps)
    slope = sum((x - middle) * (y - mean) for x, y in zip(steps, values, strict=True)) / spread
    rest = sum((y - mean - slope * (x - middle)) ** 2 for x, y in zip(steps, values, strict=True))
    width = steps[-1] - steps[0]
    return Line(slope * width, math.sqrt(rest / (count - 2) / spread) * width, mean + slope * (steps[-1] - middle))


def window_of(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric in the last tenth of the steps so far; without those that are not finite."""
    rows = [(row["step"], row[key]) for row in metrics if isinstance(row.get(key), int | float) and "step" in row]
    last = max((row["step"] for row in metrics if "step" in row), default=0)
    chosen = {step: value for step, value in rows if step >= (1 - WINDOW) * last}
    return [*chosen], [*chosen.values()]


def still_learning(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The answer in a sentence or more, from the lines of metrics.jsonl; empty where no loss was logged."""
    windows = {key: window_of(metrics, key) for key in TITLES}
    if not any(steps for steps, _ in windows.values()):
        return ""
    key = next((key for key, (steps, _) in windows.items() if len(steps) >= FEWEST), None)
    if key is None:
        lengths = {title: len(windows[name][0]) for name, title in TITLES.items()}
        counts = [f"{count} point{'s' * (count != 1)} of the {title}" for title, count in lengths.items()]
        return (
            f"Cannot tell: the last tenth of the run has {' and '.join(counts)}, and a slope wants {FEWEST} points. "
            "A lower task.eval_every_epochs or task.log_every_steps gives more."
        )
    line, title = fitted(*windows[key]), TITLES[key]
    share = f" ({100 * abs(line.change) / abs(line.level):.2g} %)" if line.level else ""
    moved = f"{abs(line.change):.2g}{share}"
    if abs(line.change) <= SURE * line.error:
        if abs(line.change) + SURE * line.error > FLAT * abs(line.level):
            return (
                f"Cannot tell: over the last tenth of the run the {title} changes by {line.change:+.2g}, and its noise "
                f"alone can do that ({SURE:g} standard errors are {SURE * line.error:.2g})."
            )
        return _flat(title, metrics)
    if line.change > 0:
        return f"No: over the last tenth of the run the {title} rises by {moved}."
    if abs(line.change) <= FLAT * abs(line.level):
        return _flat(title, metrics)
    return f"Yes: over the last tenth of the run the {title} falls by {moved}. {_gain(line, metrics)}"


def _flat(title: str, metrics: Sequence[Mapping[str, Any]]) -> str:
    share = rate_left(metrics)
    if share < DECAYED:
        return (
            f"Cannot tell: the {title} is flat over the last tenth of the run, but the learning rate has decayed to "
            f"{100 * share:.2g} % of its peak, which flattens any curve. A run of more task.epochs would show it."
        )
    return f"No: over the last tenth of the run the {title} changes by less than {100 * FLAT:g} %."


def _gain(line: Line, metrics: Sequence[Mapping[str, Any]]) -> str:
    """What going on would bring, and how far that can be trusted."""
    share = rate_left(metrics)
    if share < DECAYED:
        return (
            "What more training would bring this curve cannot tell: the learning rate has decayed to "
            f"{100 * share:.2g} % of its peak, and a loss falls while the rate decays. A run of more task.epochs would "
            "show it."
        )
    if line.level + line.change < 0:
        return (
            "A straight line drawn on falls below zero within another tenth as many steps, which no loss does: the "
            "curve must flatten."
        )
    return (
        f"Another tenth as many steps at this slope would bring it down by {abs(line.change):.2g} more, to "
        f"{line.level + line.change:.4g}. That is a straight line drawn on: curves flatten, so expect less."
    )


def rate_left(metrics: Sequence[Mapping[str, Any]]) -> float:
    """The mean learning rate of the last tenth over its peak; 1 where none was logged."""
    rates = [row["lr"] for row in metrics if isinstance(row.get("lr"), int | float)]
    _, recent = window_of(metrics, "lr")
    return sum(recent) / len(recent) / max(rates) if recent and max(rates) > 0 else 1.0
