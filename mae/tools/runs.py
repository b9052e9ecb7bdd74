"""`mae runs [DIR]`: a table of all runs below a directory, as text, JSON or a live page. Imports no torch."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mae.config.identity import identity
from mae.config.overrides import parsed, values_of
from mae.config.saved import read_config
from mae.config.values import near
from mae.errors import UserError
from mae.program import usage_name
from mae.report.record import read_record
from mae.runs.layout import CHECKPOINTS, CONFIG, LOG, METRICS, SLURM
from mae.runs.locks import RUN, is_free
from mae.tasks.registry import METRICS as MAIN_METRICS

NO_RUNS_BELOW = {CHECKPOINTS, SLURM, "images", "failed", "logs", "export", "wandb"}
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
    numbers = {key: float(value) for key, value in record.summary.items() if isinstance(value, int | float)}
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
    """Keys whose values are not the same in all rows, but for those that columns show."""
    tables = [row.keys for row in rows]
    shown = {"task.name", "model.name", "data.name"}
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if key not in shown and len({json.dumps(table.get(key)) for table in tables}) > 1]


def select(rows: Iterable[Row], conditions: Iterable[str]) -> list[Row]:
    """The rows of which all conditions `KEY=VALUE` hold. Raises UserError for a key that no row has."""
    chosen = list(rows)
    for condition in conditions:
        key, equals, text = condition.partition("=")
        override = parsed(f"x={text}")
        if not equals or override is None:
            raise UserError(f"--where {condition} cannot be read: write KEY=VALUE, as task.mask_ratio=0.75.")
        check_known(key, chosen)
        value = values_of(override)[0]
        chosen = [row for row in chosen if row.cell(key) == value or str(row.cell(key)) == text]
    return chosen


def order(rows: Iterable[Row], best: str | None, sort: str | None) -> list[Row]:
    """The rows with the best result first, or by a column or key; by default the newest first."""
    rows = list(rows)
    if best is not None:
        if rows and all(best not in row.results for row in rows):
            raise UserError(
                f"no run has a result {best}.{near(best, sorted({k for row in rows for k in row.results}))}"
            )
        lower = best.endswith("loss") or (best in MAIN_METRICS and MAIN_METRICS[best].lower_is_better)
        finished = [row for row in rows if best in row.results]
        return sorted(finished, key=lambda row: row.results[best], reverse=not lower)
    if sort is None:
        return sorted(rows, key=lambda row: row.age)
    check_known(sort, rows)
    return sorted(rows, key=lambda row: (row.cell(sort) is None, _comparable(row.cell(sort))))


def check_known(key: str, rows: Sequence[Row]) -> None:
    """Raises UserError for a column or key that none of the rows has."""
    known = {*FACTS, *(name for row in rows for name in (*row.keys, *row.results))}
    if rows and key not in known:
        raise UserError(f"{key} is neither a column nor a key of these runs.{near(key, sorted(known))}")


def _comparable(value: object) -> tuple[int, float, str]:
    """Numbers before texts."""
    return (0, value, "") if isinstance(value, int | float) else (1, 0.0, str(value))


def read_rows(folder: Path) -> list[Row]:
    """The rows of all runs below a folder. Raises UserError where it is not there."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory.")
    return [row for run in find_runs(folder) if (row := read_row(run, folder)) is not None]


def text_table(rows: Sequence[Row], results: Sequence[str]) -> Table:
    """The table as text: the columns, then the keys in which the runs differ."""
    keys = differing_keys(rows) if len(rows) > 1 else []
    table = Table(box=None, pad_edge=False)
    for column in (*FACTS, *results, *keys):
        table.add_column(column, overflow="fold")
    for row in rows:
        values = [getattr(row, column) if column != "age" else age_text(row.age) for column in FACTS]
        values += [row.results.get(name, "") for name in results] + [row.keys.get(key, "") for key in keys]
        table.add_row(*(str(value) for value in values))
    return table


def age_text(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h` or `5 d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows as JSON has them."""
    return [asdict(row) for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """`mae runs`; returns the exit code."""
    parser = argparse.ArgumentParser(prog=usage_name("runs", "runs"), description="A table of all runs.")
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="only runs with this value")
    parser.add_argument("--best", metavar="RESULT", help="best first by a result such as val_loss or top1")
    parser.add_argument("--sort", metavar="KEY", help="by a column or a key of the config")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--serve", nargs="?", type=int, const=8265, metavar="PORT", help="a live page on this machine")
    options = parser.parse_args(arguments)
    try:
        rows = order(select(read_rows(options.directory), options.where), options.best, options.sort)
        if options.serve is not None:
            from mae.tools.serve_runs import serve

            return serve(options.directory, options.serve)
        if options.json:
            sys.stdout.write(json.dumps(as_json(rows), indent=1) + "\n")
        elif rows:
            width = None if sys.stdout.isatty() else 10_000
            Console(width=width, soft_wrap=width is not None).print(
                text_table(rows, [options.best] if options.best else [])
            )
        else:
            sys.stdout.write(f"{options.directory} holds no runs that match.\n")
    except (UserError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0
