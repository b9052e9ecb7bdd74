"""Where a run's numbers and pictures go: console, metrics.jsonl, W&B, TensorBoard. The loop knows none by name."""

import contextlib
import importlib.util
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mae.config.build import call
from mae.runs import attempt
from mae.tracking.base import Careful, Tracker, Trackers
from mae.tracking.tensorboard import TensorBoard
from mae.tracking.wandb import wandb_tracker

log = logging.getLogger(__name__)
console = Console(stderr=True)


class JsonLines(Tracker):
    """metrics.jsonl and events.jsonl: one object a line. On resume, what lies behind the checkpoint is cut off."""

    def __init__(self, run: Path):
        self.run, self.step = run, 0

    def start(self, step: int, steps: int) -> None:
        self.step = step
        for name in ("metrics.jsonl", "events.jsonl"):
            path = self.run / name
            if path.exists():
                kept = [line for line in path.read_text(errors="replace").splitlines() if _until(line, step)]
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(f"{line}\n" for line in kept))
                temporary.replace(path)

    def log(self, metrics: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", metrics)
        self.step = metrics["step"]

    def event(self, text: str, step: int | None) -> None:
        row = {"step": self.step if step is None else step, "event": text, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            self._append("events.jsonl", row)
        except OSError:  # a full disk must not hide the error that is being told
            log.warning("events.jsonl cannot be written to")

    def _append(self, name: str, value: Mapping[str, Any]) -> None:
        attempt.check(self.run)
        with (self.run / name).open("a") as file:
            file.write(json.dumps({k: _finite(v) for k, v in value.items()}) + "\n")


def _finite(value: Any) -> Any:
    """null for what JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # cut short by a kill
            continue
    return rows


def _until(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
        return False


class Terminal(Tracker):
    """A progress bar on a terminal; plain lines elsewhere."""

    def __init__(self) -> None:
        self.bar: Progress | None = None

    def start(self, step: int, steps: int) -> None:
        if sys.stderr.isatty():
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task("", total=steps, completed=step)
            self.bar.start()
        self.steps = steps

    def log(self, metrics: Mapping[str, Any]) -> None:
        text = in_words(metrics)
        if self.bar is not None and "loss" in metrics:
            self.bar.update(self.task, completed=metrics["step"], description=text)
        elif text:
            log.info("step %d/%d  epoch %.1f  %s", metrics["step"], self.steps, metrics["epoch"], text)

    def event(self, text: str, step: int | None) -> None:
        if step is not None:  # without one it is an end, which is told in other words
            log.info("step %d: %s", step, text)

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def in_words(metrics: Mapping[str, Any]) -> str:
    """The figures of a line that a person reads."""
    shown = {"loss": ".4f", "lr": ".2e", "images_per_second": ".1f"}
    parts = [f"{k.replace('_per_second', '/s')} {metrics[k]:{shown[k]}}" for k in shown if k in metrics]
    return "  ".join(parts + [f"{k} {v:.4f}" for k, v in metrics.items() if k.startswith("val/")])


def trackers(run: Path, cfg: DictConfig) -> Tracker:
    """All that the config asks for, as one. Raises ValueError where TensorBoard is asked for and not installed."""
    members = [JsonLines(run), Terminal(), call(wandb_tracker, cfg.wandb, run, OmegaConf.to_container(cfg))]
    if cfg.tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "tensorboard=true needs the package tensorboard: pip install 'mae-experiments[tensorboard]', or leave "
                "it out."
            )
        members.append(Careful(lambda: TensorBoard(run), "TensorBoard"))
    return Trackers(members)


def log_file(run: Path, rank: int) -> Path:
    """Where a rank's messages go."""
    return run / "log.txt" if rank == 0 else run / "logs" / f"rank_{rank}.txt"


def write_failure(run: Path, rank: int, error: BaseException, lost_peer: bool = False) -> None:
    """Adds the error being handled to the run's log.txt, whichever rank it is of, and leaves it as `failure.json`
    where it is the first one; the console gets a sentence later. `lost_peer`: another rank was gone before, whose own
    error takes this one's place."""
    if not attempt.holds(run):
        return
    told = {"rank": rank, "error": f"{type(error).__name__}: {error}", "lost_peer": lost_peer, "time": time.time()}
    told |= {"attempt": os.environ.get(attempt.NAME), "traceback": traceback.format_exc()}
    try:
        with (run / "log.txt").open("a") as file:
            file.write(f"rank {rank} failed\n{told['traceback']}")
        path = run / "failure.json"
        if not lost_peer and path.exists() and '"lost_peer": true' in path.read_text():
            path.unlink()
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            json.dump(told, file)
    except OSError:  # a full disk must not hide the error itself
        log.warning("log.txt cannot be written to")


def set_up_logging(run: Path | None, rank: int) -> None:
    """Messages to the console (rank 0) and to the run's log.txt (rank 0) or logs/rank_N.txt (the others)."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)  # of libraries; some say at INFO each thing that they do
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
