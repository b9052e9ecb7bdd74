"""A sweep's end: sweep.csv, its figure as PNG and SVG, report.html, and the best member's command line.

`python -m mae.sweep DIR` makes all of it again from the members' directories, however far they are.
"""

import csv
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from mae.config import paths
from mae.config.identity import leaves
from mae.config.overrides import by_key, values_of
from mae.config.saved import read_config
from mae.config.sweep_names import params, short, swept
from mae.errors import UserError
from mae.report import run, sweep_figure
from mae.report.html import data_url, page
from mae.report.record import Record, read_record
from mae.runs.files import write_text
from mae.tasks.registry import METRICS, TASKS

SEARCHED = "search.yaml"  # the keys of a search by Optuna
CURVES = 24  # members whose curves are in the page


@dataclass
class Member:
    """One run of a sweep."""

    path: Path
    cfg: DictConfig
    record: Record
    values: dict[str, Any] = field(default_factory=dict)  # swept key -> value
    results: dict[str, float] = field(default_factory=dict)  # e.g. `finetune top1`

    @property
    def name(self) -> str:
        return self.path.name


@dataclass
class Sweep:
    """A sweep's members, what was swept, and what is measured."""

    directory: Path
    name: str
    keys: list[str]
    members: list[Member]

    @property
    def metrics(self) -> list[str]:
        """All results that a member has, the main one first."""
        return list(dict.fromkeys(name for member in self.members for name in member.results))

    @property
    def metric(self) -> str | None:
        return self.metrics[0] if self.metrics else None

    @property
    def best(self) -> Member | None:
        """The finished member with the best main result."""
        metric = self.metric
        done = [m for m in self.members if metric in m.results and m.record.state == "finished"]
        if metric is None or not done:
            return None
        return (min if lower_is_better(metric) else max)(done, key=lambda m: m.results[metric])


def lower_is_better(metric: str) -> bool:
    """Whether a result such as `top1`, or `finetune top1` of a pipeline, is better where it is lower."""
    key = metric.split(" ")[-1]
    return METRICS[key].lower_is_better if key in METRICS else key.endswith("loss")


# ---------------------------------------------------------------- reading


def results_of(summary: dict[str, Any]) -> dict[str, float]:
    """The results of a run's summary by name; of a pipeline, each stage's."""
    stages = summary.get("stages")
    if not isinstance(stages, dict):
        stages = {str(summary.get("task")): summary}
    several, found, order = len(stages) > 1, {}, list(TASKS)
    for stage in sorted(stages, key=lambda s: order.index(s) if s in order else len(order)):
        one = dict(stages[stage])
        if isinstance(one.get("knn"), dict):
            one["knn"] = max(one["knn"].values())
        for key in METRICS:
            if isinstance(one.get(key), int | float) and math.isfinite(one[key]):
                found[f"{stage} {key}" if several else key] = float(one[key])
    return found


def members_of(directory: Path) -> list[Member]:
    """The runs that lie in a sweep's directory. Raises UserError where there is no directory."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not the directory of a sweep: it does not exist.")
    found = []
    for path in sorted(p.parent for p in directory.glob("*/config.yaml")):
        record = read_record(path)
        found.append(Member(path, read_config(path), record, results=results_of(record.summary)))
    return found


def read_sweep(directory: Path) -> Sweep:
    """A sweep from its directory: Hydra's multirun.yaml says what was swept, else what the members differ in.

    Raises UserError where no member has begun.
    """
    members = members_of(directory)
    if not members:
        raise UserError(f"{directory} holds no run: a sweep's members lie in folders of it, each with a config.yaml.")
    keys = told_keys(directory / "multirun.yaml")
    found = [leaves(m.cfg) for m in members]
    if not keys:
        neutral = {"output_dir", "init"}
        keys = [
            key
            for key in dict.fromkeys(k for one in found for k in one)
            if key not in neutral and len({str(one.get(key)) for one in found}) > 1
        ]
    for member, one in zip(members, found, strict=True):
        typed = by_key(member.record.overrides)
        for key in keys:
            if key in typed and (key not in one or key in paths.KEYS):  # a group; a path, as it was typed
                member.values[key] = written(typed[key])
            else:
                member.values[key] = shown(one[key]) if key in one else None
    members.sort(key=lambda m: [order(v) for v in m.values.values()])
    return Sweep(directory, directory.absolute().name, keys, members)


def told_keys(path: Path) -> list[str]:
    """What Hydra's record of a sweep says was swept; nothing where there is no record."""
    searched = path.with_name(SEARCHED)
    if searched.exists():
        return [str(key) for key in OmegaConf.load(searched)]
    if not path.exists():
        return []
    told = OmegaConf.load(path)
    assert isinstance(told, DictConfig)
    return list(dict.fromkeys(params(told.hydra) + swept(str(one) for one in told.hydra.overrides.task)))


def shown(value: Any) -> Any:
    """A value as tables and figures take it: numbers, words and true or false as they are, all else as text."""
    return json.dumps(value) if value is None or isinstance(value, list | dict) else value


def written(override: Override) -> Any:
    """The value that a command line gives a key, of a group the file that it chooses."""
    return shown(values_of(override)[0])


def order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, before words."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if number else (1, 0.0, str(value))


# ---------------------------------------------------------------- writing


def write_table(sweep: Sweep) -> None:
    """sweep.csv: a row a member."""
    with (sweep.directory / "sweep.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["member", "state", *sweep.keys, *sweep.metrics, "seconds", "command"])
        for m in sweep.members:
            row: list[Any] = [m.values[key] for key in sweep.keys] + [m.results.get(name) for name in sweep.metrics]
            writer.writerow([m.name, m.record.state, *row, m.record.summary.get("seconds"), m.record.command])


def write_page(sweep: Sweep, figure: Path | None) -> None:
    """report.html of a sweep."""
    names, best, metric = short(sweep.keys), sweep.best, sweep.metric
    columns = [*(names[key] for key in sweep.keys), *reversed(sweep.metrics)]
    rows = []
    for m in sweep.members:
        values = {names[key]: m.values[key] for key in sweep.keys} | dict(m.results)
        link = f"{m.name}/{run.NAME}" if (m.path / run.NAME).exists() else None
        values["seconds"] = m.record.summary.get("seconds")
        rows.append({"name": m.name, "state": m.record.state, "values": values, "report": link})
    done = sum(m.record.state == "finished" for m in sweep.members)
    data: dict[str, Any] = {
        "about": f"{done} of {len(sweep.members)} members finished",
        "columns": [*columns, "seconds"],
        "members": rows,
        "metric": metric,
        "lower_is_better": metric is not None and lower_is_better(metric),
        "figure": data_url(figure) if figure else None,
    }
    if best is not None and metric is not None:
        data |= {"best": best.name, "best_value": best.results[metric], "command": best.record.command}
    runs = [{"name": m.name, "series": run.curves(m.path, m.cfg)} for m in sweep.members[:CURVES]]
    write_text(sweep.directory / run.NAME, page(sweep.name, {"sweep": data, "runs": runs}))


def curves(sweep: Sweep) -> Iterable[sweep_figure.Curve]:
    """What the figure shows: each result against the first swept key, apart by the others, together over seeds."""
    keys = [key for key in sweep.keys if key != "seed"]
    names = short(sweep.keys)
    shown = [m for m in sweep.metrics if not m.startswith("pretrain ")] or sweep.metrics
    for metric in shown:
        groups: dict[str, dict[Any, list[float]]] = {}
        for m in sweep.members:
            if metric in m.results:
                others = ", ".join(f"{names[key]}={m.values[key]}" for key in keys[1:])
                x = m.values[keys[0]] if keys else m.values.get("seed")
                groups.setdefault(others, {}).setdefault(x, []).append(m.results[metric])
        stage = metric.split(" ")[0] if " " in metric else sweep.members[0].cfg.task.name
        if len(groups) > len(sweep_figure.COLOURS):  # a search: no two members have much in common
            yield from (scattered(sweep, metric, stage, key) for key in keys)
            continue
        for label, points in groups.items():
            yield sweep_figure.Curve(metric, stage, keys[0] if keys else "seed", label, points)


def scattered(sweep: Sweep, metric: str, stage: str, key: str) -> sweep_figure.Curve:
    """A result against one key, whatever the others are."""
    points: dict[Any, list[float]] = {}
    for m in sweep.members:
        if metric in m.results:
            points.setdefault(m.values[key], []).append(m.results[metric])
    return sweep_figure.Curve(metric, stage, key, "", points, scatter=True)


def make(directory: Path) -> Sweep:
    """Table, figure and page of a sweep. Raises UserError where no member has begun."""
    sweep = read_sweep(directory)
    write_table(sweep)
    figure = directory / "sweep.svg"
    drawn = sweep_figure.draw(list(curves(sweep)), sweep.members[0].cfg, directory / "sweep.png", figure)
    write_page(sweep, figure if drawn else None)
    return sweep


def finish(directory: Path) -> str:
    """Makes all of it, and says in a few lines how the sweep ended, or why it could not be told."""
    try:
        return told(make(directory))
    except (UserError, OSError) as error:
        return f"{error}\n"


def told(sweep: Sweep) -> str:
    """What is left, and the best member."""
    lines, best, metric = [], sweep.best, sweep.metric
    left = [m for m in sweep.members if m.record.state != "finished"]
    if left:
        lines.append(
            f"{len(left)} of {len(sweep.members)} members are not finished; the same command goes on with them:"
        )
        lines += [f"  {m.name}: {m.record.state}" for m in left]
    lines.append(f"sweep.csv sweep.png sweep.svg report.html are in {sweep.directory}")
    if best is not None and metric is not None:
        lines += ["Best member:", f"  {best.record.command}", f"{metric} {best.results[metric]:.4f}  {best.path}"]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """`python -m mae.sweep DIR...`; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0].startswith("-"):
        sys.stderr.write("python -m mae.sweep DIR makes sweep.csv, figure and report.html of a sweep's directory.\n")
        return 2
    for directory in given:
        try:
            sys.stdout.write(told(make(Path(directory))))
        except (UserError, OSError) as error:
            sys.stderr.write(f"{error}\n")
            return 1
    return 0
