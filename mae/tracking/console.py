"""What a run prints: a progress bar or lines, and messages to the console and to log.txt."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mae.tracking.base import Tracker, step_of

log = logging.getLogger(__name__)
console = Console(stderr=True)

METRIC_FORMATS = {"loss": ".4f", "lr": ".2e", "images_per_second": ".1f"}


class Terminal(Tracker):
    """A progress bar on a terminal; plain lines elsewhere."""

    def __init__(self) -> None:
        self.bar: Progress | None = None

    def start(self, step: int, steps: int) -> None:
        if sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task("", total=steps, completed=step)
            self.bar.start()
        self.steps = steps

    def log(self, metrics: Mapping[str, object]) -> None:
        text = main_metrics(metrics)
        if self.bar is not None and "loss" in metrics:
            self.bar.update(self.task, completed=step_of(metrics), description=text)
        elif text:
            log.info("step %d/%d  epoch %.1f  %s", metrics["step"], self.steps, metrics["epoch"], text)

    def event(self, text: str, step: int | None) -> None:
        if step is not None:  # without one the run ends, and its error is printed
            log.info("step %d: %s", step, text)

    def finish(self, summary: Mapping[str, object], failed: bool) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def main_metrics(metrics: Mapping[str, object]) -> str:
    """The figures of a line that a person reads."""
    names = [name for name in METRIC_FORMATS if name in metrics]
    figures = [f"{name.replace('_per_second', '/s')} {metrics[name]:{METRIC_FORMATS[name]}}" for name in names]
    return "  ".join(figures + [f"{key} {value:.4f}" for key, value in metrics.items() if key.startswith("val/")])


def log_file(run: Path, rank: int) -> Path:
    """The file of a rank's messages."""
    return run / "log.txt" if rank == 0 else run / "logs" / f"rank_{rank}.txt"


def set_up_logging(run: Path | None, rank: int) -> None:
    """Messages to the console (rank 0) and to the run's log.txt (rank 0) or logs/rank_N.txt (the others)."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)  # of libraries; some log each thing that they do at INFO
    logging.getLogger("mae").setLevel(logging.INFO)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    if rank == 0:
        plain = logging.StreamHandler(sys.stderr)
        plain.setFormatter(logging.Formatter("%(message)s"))
        rich = RichHandler(console=console, show_path=False, show_level=False, show_time=False)
        root.addHandler(rich if sys.stderr.isatty() else plain)
    if run is not None:
        path = log_file(run, rank)
        path.parent.mkdir(exist_ok=True)
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(handler)
