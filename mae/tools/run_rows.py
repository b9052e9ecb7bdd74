"""The runs below a directory as rows of a table: state, main result, age, keys. Imports no torch."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mae.config.compose import is_group
from mae.config.identity import identity
from mae.config.overrides import key_of
from mae.config.saved import read_config
from mae.errors import UserError
from mae.report.members import best_number
from mae.report.record import read_record
from mae.runs.layout import BAD_STEP, CHECKPOINTS, CONFIG, LOG, METRICS, SLURM
from mae.runs.locks import RUN, is_free
from mae.tasks.registry import METRICS as MAIN_METRICS

NO_RUNS_BELOW = {BAD_STEP, CHECKPOINTS, SLURM, "images", "failed", "logs", "export", "wandb"}
SILENT_S = 600  # an unfinished run that has written nothing for so long is stale
POINTS = 60  # of a small curve
FACTS = ("run", "state", "task", "model", "data", "result", "step", "age")


@dataclass(frozen=True)
class Row:
    """A run of the table."""

    run: str  # its directory, relative to the table's
    state: str  # finished, running, stale, interrupted, diverged, failed, pruned
    task: str
    model: str
    data: str
    metric: str | None  # the main metric's name, or `loss`
    value: float | None
    step: int
    age: float  # seconds since it last wrote
    results: dict[str, float]  # the numbers of summary.json
    keys: dict[str, object]  # the leaves of its config that decide the result
    losses: list[float]  # the training loss over the run, thinned
    typed: tuple[str, ...] = ()  # keys of its command line

    @property
    def result(self) -> str:
        return "" if self.value is None else f"{self.metric} {self.value:.4g}"

    def cell(self, column: str) -> object:
        """A column's value, or that of a key or a result."""
        if column in FACTS:
            return getattr(self, column)
        return self.results[column] if column in self.results else self.keys.get(column)


def find_runs(folder: Path) -> Iterator[Path]:
    """The directories of runs in and below a folder, members of sweeps and stages of pipelines too."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in NO_RUNS_BELOW and not name.startswith("."))
        if CONFIG in files:
            yield Path(path)


def read_row(run: Path, folder: Path) -> Row | None:
    """A run's row, or None where its config cannot be read: it is of another program, or just being written."""
    try:
        cfg = read_config(run)
    except UserError:
        return None
    record, age = read_record(run), age_of(run)
    numbers = {key: best_number(value) for key, value in record.summary.items()}
    numbers = {key: float(value) for key, value in numbers.items() if value is not None}
    training = [row["loss"] for row in record.metrics if isinstance(row.get("loss"), int | float)]
    metric, value = main_result(numbers, training)
    return Row(
        run=os.path.relpath(run, folder),
        state=state_of(run, record.state, age),
        task=cfg.task.name,
        model=cfg.model.name,
        data=cfg.data.name,
        metric=metric,
        value=value,
        step=max((int(row.get("step", 0)) for row in record.metrics), default=int(numbers.get("steps", 0))),
        age=age,
        results=numbers,
        keys=identity(cfg),
        typed=tuple(key_of(override) for override in record.overrides),
        losses=training[:: -(-len(training) // POINTS)] if training else [],
    )


def main_result(numbers: dict[str, float], losses: Sequence[float]) -> tuple[str | None, float | None]:
    """The main metric of a finished run, or the last training loss of another."""
    for key in MAIN_METRICS:
        if key in numbers:
            return key, numbers[key]
    return ("loss", losses[-1]) if losses else (None, None)


def age_of(run: Path) -> float:
    """Seconds since a run last wrote its metrics or its log."""
    times = [path.stat().st_mtime for path in (run / METRICS, run / LOG, run / CONFIG) if path.exists()]
    return max(0.0, time.time() - max(times))


def state_of(run: Path, state: str, age: float) -> str:
    """`running` where a process holds the run or it wrote lately, `stale` where it has neither ended nor written."""
    if state == "finished":
        return state
    lock = run / RUN
    if lock.exists() and not is_free(lock):
        return "running"
    if state == "unfinished":
        return "stale" if age > SILENT_S else "running"
    return state


def differing_keys(rows: Iterable[Row]) -> list[str]:
    """Keys whose values are not the same in all rows, but for those that columns show, and those that follow from the
    tasks: a key that no command line names differs only because another one does."""
    rows = list(rows)
    shown = {"task.name", "model.name", "data.name"}
    typed = {f"{key}.name" if is_group(key) else key for row in rows for key in row.typed}
    keys = dict.fromkeys(key for row in rows for key in row.keys if key not in shown)
    if typed:
        keys = {key: None for key in keys if any(f"{key}.".startswith(f"{name}.") for name in typed)}
    return [key for key in keys if len({json.dumps(row.keys.get(key)) for row in rows}) > 1]


def read_rows(folder: Path) -> list[Row]:
    """The rows of all runs below a folder. Raises UserError where it is not there."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory.")
    return [row for run in find_runs(folder) if (row := read_row(run, folder)) is not None]
