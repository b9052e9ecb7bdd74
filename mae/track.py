"""Where a run's numbers and pictures go: console, metrics.jsonl, W&B. The loop knows none of them by name."""

import contextlib
import json
import logging
import math
import os
import secrets
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mae import fence
from mae.config import call

log = logging.getLogger(__name__)
console = Console(stderr=True)


class Tracker:
    """Takes what a run tells and does nothing with it; the others override what they care for."""

    def start(self, step: int, steps: int) -> None:
        """The run begins, or goes on, at `step` of `steps`."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """A line of numbers; `step`, `images_seen` and `epoch` are among them."""

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        """A picture file."""

    def event(self, text: str, step: int) -> None:
        """Something that happened once: resumed, skipped, stopped."""

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        """The run ends."""


class Trackers(Tracker):
    """Several trackers as one."""

    def __init__(self, members: list[Tracker]):
        self.members = members

    def start(self, step: int, steps: int) -> None:
        for member in self.members:
            member.start(step, steps)

    def log(self, metrics: Mapping[str, Any]) -> None:
        for member in self.members:
            member.log(metrics)

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        for member in self.members:
            member.picture(name, path, step, caption)

    def event(self, text: str, step: int) -> None:
        for member in self.members:
            member.event(text, step)

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        for member in self.members:
            member.finish(summary, failed)


class JsonLines(Tracker):
    """metrics.jsonl and events.jsonl: one object a line. On resume, what lies behind the checkpoint is cut off."""

    def __init__(self, run: Path):
        self.run = run

    def start(self, step: int, steps: int) -> None:
        for name in ("metrics.jsonl", "events.jsonl"):
            path = self.run / name
            if path.exists():
                kept = [line for line in path.read_text(errors="replace").splitlines() if _until(line, step)]
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(f"{line}\n" for line in kept))
                temporary.replace(path)

    def log(self, metrics: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", metrics)

    def event(self, text: str, step: int) -> None:
        self._append("events.jsonl", {"step": step, "event": text})

    def _append(self, name: str, value: Mapping[str, Any]) -> None:
        fence.check(self.run)
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

    def event(self, text: str, step: int) -> None:
        log.info("step %d: %s", step, text)

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def in_words(metrics: Mapping[str, Any]) -> str:
    """The figures of a line that a person reads."""
    shown = {"loss": ".4f", "lr": ".2e", "images_per_second": ".0f"}
    parts = [f"{k.replace('_per_second', '/s')} {metrics[k]:{shown[k]}}" for k in shown if k in metrics]
    return "  ".join(parts + [f"{k} {v:.4f}" for k, v in metrics.items() if k.startswith("val/")])


class WandB(Tracker):
    """Weights & Biases. Never fatal: the first error is a warning, and the run goes on without it."""

    def __init__(self, run: Path, config: Mapping[str, Any], settings: Mapping[str, Any]):
        import wandb

        identity = run / "wandb_id.txt"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        # under a sweep agent the id is the agent's
        name = {} if "WANDB_SWEEP_ID" in os.environ else {"id": identity.read_text().strip(), "resume": "allow"}
        self.wandb = wandb.init(dir=str(run), config=dict(config), name=run.name, **name, **settings)
        self.wandb.define_metric("images_seen")
        self.wandb.define_metric("*", step_metric="images_seen")
        self.wandb.define_metric("loss", step_metric="images_seen", summary="min")
        self.wandb.define_metric("val/*", step_metric="images_seen", summary="min,max,last")

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.wandb.log(dict(metrics), step=int(metrics["step"]))

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        import wandb

        self.wandb.log({name: wandb.Image(str(path), caption=caption)}, step=step)

    def event(self, text: str, step: int) -> None:
        if "diverged" in text:
            self.wandb.alert("diverged", text)

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        self.wandb.summary.update(dict(summary))
        self.wandb.finish(exit_code=int(failed))


class Careful(Tracker):
    """Another tracker whose errors are warnings: after the first it is left alone."""

    def __init__(self, make: Any, what: str):
        self.what, self.inner = what, Tracker()
        try:
            self.inner = make()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning("%s is switched off for this run: %s", self.what, error)
        self.inner = Tracker()

    def _try(self, name: str, *arguments: Any) -> None:
        try:
            getattr(self.inner, name)(*arguments)
        except Exception as error:
            self._give_up(error)

    def start(self, step: int, steps: int) -> None:
        self._try("start", step, steps)

    def log(self, metrics: Mapping[str, Any]) -> None:
        self._try("log", metrics)

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        self._try("picture", name, path, step, caption)

    def event(self, text: str, step: int) -> None:
        self._try("event", text, step)

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        self._try("finish", summary, failed)


def wandb_tracker(
    run: Path,
    config: Mapping[str, Any],
    *,
    mode: Literal["online", "offline", "off"],
    project: str,
    entity: str | None,
    group: str | None,
    job_type: str | None,
    notes: str | None,
    tags: list[str],
) -> Tracker:
    """The W&B tracker, or none for `mode: off`."""
    if mode == "off":
        return Tracker()
    settings = {"mode": mode, "project": project, "entity": entity, "group": group, "job_type": job_type}
    settings |= {"notes": notes, "tags": tags}
    return Careful(lambda: WandB(run, config, settings), "W&B")


def trackers(run: Path, cfg: DictConfig) -> Tracker:
    """All that the config asks for, as one."""
    plain = OmegaConf.to_container(cfg)
    return Trackers([JsonLines(run), Terminal(), call(wandb_tracker, cfg.wandb, run, plain)])


def log_file(run: Path, rank: int) -> Path:
    """Where a rank's messages go."""
    return run / "log.txt" if rank == 0 else run / "logs" / f"rank_{rank}.txt"


def write_failure(run: Path, rank: int, error: BaseException, lost_peer: bool = False) -> None:
    """Adds the error being handled to the run's log.txt, whichever rank it is of, and leaves it as `failure.json`
    where it is the first one; the console gets a sentence later. `lost_peer`: another rank was gone before."""
    if not fence.holds(run):
        return
    told = {"rank": rank, "error": f"{type(error).__name__}: {error}", "lost_peer": lost_peer, "time": time.time()}
    told |= {"attempt": os.environ.get(fence.NAME), "traceback": traceback.format_exc()}
    try:
        with (run / "log.txt").open("a") as file:
            file.write(f"rank {rank} failed\n{told['traceback']}")
        with contextlib.suppress(FileExistsError), (run / "failure.json").open("x") as file:
            json.dump(told, file)
    except OSError:  # a full disk must not hide the error itself
        log.warning("log.txt cannot be written to")


def set_up_logging(run: Path | None, rank: int) -> None:
    """Messages to the console (rank 0) and to the run's log.txt (rank 0) or logs/rank_N.txt (the others)."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
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
