"""`mae runs [DIR]`: a table of all runs below a directory, as text, JSON or a live page. Imports no torch."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mae.config.overrides import parsed, values_of
from mae.config.values import near
from mae.errors import UserError
from mae.program import usage_name
from mae.report.members import lower_is_better
from mae.tools.run_rows import FACTS, Row, differing_keys, read_rows


@dataclass(frozen=True)
class Selection:
    """Which runs below a folder the table has, and in which order."""

    folder: Path
    conditions: tuple[str, ...] = ()  # KEY=VALUE
    best: str | None = None  # a result, best first
    sort: str | None = None  # a column or key

    def rows(self) -> list[Row]:
        """The rows as the runs are now. Raises UserError for a key or result that no run has."""
        return order(select(read_rows(self.folder), self.conditions), self.best, self.sort)

    @property
    def text(self) -> list[str]:
        """The conditions and the order, in words."""
        best = [f"best {self.best} first"] if self.best else []
        return [
            *(f"only {condition}" for condition in self.conditions),
            *best,
            *([f"by {self.sort}"] if self.sort else []),
        ]


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
        finished = [row for row in rows if best in row.results]
        return sorted(finished, key=lambda row: row.results[best], reverse=not lower_is_better(best))
    if sort is None:
        return sorted(rows, key=lambda row: row.age)
    check_known(sort, rows)
    if sort == "result":  # its text begins with the result's name
        return sorted(rows, key=lambda row: (row.value is None, row.metric or "", row.value or 0.0))
    return sorted(rows, key=lambda row: (row.cell(sort) is None, _comparable(row.cell(sort))))


def check_known(key: str, rows: Sequence[Row]) -> None:
    """Raises UserError for a column or key that none of the rows has."""
    known = {*FACTS, *(name for row in rows for name in (*row.keys, *row.results))}
    if rows and key not in known:
        raise UserError(f"{key} is neither a column nor a key of these runs.{near(key, sorted(known))}")


def _comparable(value: object) -> tuple[int, float, str]:
    """Numbers before texts."""
    return (0, value, "") if isinstance(value, int | float) else (1, 0.0, str(value))


def text_table(rows: Sequence[Row], results: Sequence[str]) -> Table:
    """The table as text: the columns, then the keys in which the runs differ."""
    keys = differing_keys(rows) if len(rows) > 1 else []
    table = Table(box=None, pad_edge=False)
    for column in (*FACTS, *results, *keys):
        table.add_column(column, overflow="fold")
    for row in rows:
        values = [getattr(row, column) if column != "age" else age_text(row.age) for column in FACTS]
        values += [f"{row.results[name]:.4g}" if name in row.results else "" for name in results]
        values += [_from_here(row.keys.get(key, "")) for key in keys]
        table.add_row(*(str(value) for value in values))
    return table


def _from_here(value: object) -> object:
    """An absolute path below the working directory as one relative to it; any other value as it is."""
    path = Path(value) if isinstance(value, str) else None
    return path.relative_to(Path.cwd()) if path and path.is_absolute() and path.is_relative_to(Path.cwd()) else value


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
    selection = Selection(options.directory, tuple(options.where), options.best, options.sort)
    try:
        rows = selection.rows()
        if options.serve is not None:
            from mae.tools.serve_runs import serve

            return serve(selection, options.serve)
        if options.json:
            sys.stdout.write(json.dumps(as_json(rows), indent=1) + "\n")
        elif rows:
            width = None if sys.stdout.isatty() else 10_000
            others = [options.best] if options.best and any(row.metric != options.best for row in rows) else []
            Console(width=width, soft_wrap=width is not None).print(text_table(rows, others))
        else:
            sys.stdout.write(f"{options.directory} holds no runs that match.\n")
    except (UserError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0
