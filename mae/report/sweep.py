"""Writes the results of a sweep: sweep.csv, its figure as PNG and SVG, report.html, and the best member's command.

`python -m mae.sweep DIR` writes all of it again from the members' directories, finished or not.
"""

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

from mae.config.identity import leaves
from mae.config.sweep_names import short
from mae.errors import UserError
from mae.program import usage_name
from mae.report import sweep_figure, table1
from mae.report.flops import COLUMN, member_flops, relative_flops
from mae.report.html import data_url, page
from mae.report.intervals import verdict
from mae.report.members import Sweep, Value, changes_loss, lower_is_better, read_sweep
from mae.report.run import PAGE, curves
from mae.report.sweep_figure import Curve
from mae.report.table1 import paper_tables
from mae.runs.files import write_text

FILES = ("sweep.csv", "sweep.png", "sweep.svg", PAGE)
NOT_STARTED = "not started"
CURVES = 24  # members whose curves are in the page


def write_table(sweep: Sweep) -> None:
    """Writes sweep.csv: a row a member."""
    with (sweep.directory / "sweep.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        costs = flops_columns(sweep)
        writer.writerow(["member", "state", *sweep.keys, *sweep.metrics, *costs, "seconds", "command"])
        for m in sweep.members:
            values = [m.values[key] for key in sweep.keys]
            results = [m.results.get(name) for name in sweep.metrics]
            seconds = m.record.summary.get("seconds")
            writer.writerow(
                [
                    m.name,
                    m.record.state,
                    *values,
                    *results,
                    *(cost.get(m.name) for cost in costs.values()),
                    seconds,
                    m.record.command,
                ]
            )
        writer.writerows([name, NOT_STARTED] for name in sweep.not_started)


def flops_columns(sweep: Sweep) -> dict[str, dict[str, float]]:
    """Columns of a sweep whose members cost differently: operations of an image in pre-training, and over the
    cheapest's. Member -> number of each."""
    relative = relative_flops(sweep.members)
    if not relative:
        return {}
    counts = member_flops(sweep.members)
    return {
        f"{COLUMN} an image, forward": {name: round(count / 1e9, 6) for name, count in counts.items()},
        f"{COLUMN} over the least": {name: round(factor, 2) for name, factor in relative.items()},
    }


def flops_sentence(sweep: Sweep) -> str | None:
    """What the dearest member costs beside the cheapest; None where all cost the same."""
    relative = relative_flops(sweep.members)
    if not relative:
        return None
    cheapest, dearest = (choose(relative, key=lambda name: relative[name]) for choose in (min, max))
    return f"Operations an image in pre-training: {dearest} takes {relative[dearest]:.2g} times those of {cheapest}."


def write_page(sweep: Sweep, figure: Path | None) -> None:
    """Writes report.html of a sweep."""
    names, best, metric = short(sweep.keys), sweep.best, sweep.metric
    rows, costs = [], flops_columns(sweep)
    for m in sweep.members:
        values = {names[key]: m.values[key] for key in sweep.keys} | m.results
        values |= {column: numbers.get(m.name) for column, numbers in costs.items()}
        values["seconds"] = m.record.summary.get("seconds")
        link = f"{m.name}/{PAGE}" if (m.path / PAGE).exists() else None
        rows.append({"name": m.name, "state": m.record.state, "values": values, "report": link})
    finished = sum(m.record.state == "finished" for m in sweep.members)
    data: dict[str, object] = {
        "about": f"{finished} of {len(sweep.members) + len(sweep.not_started)} members finished",
        "columns": [*(names[key] for key in sweep.keys), *reversed(sweep.metrics), *costs, "seconds"],
        "members": rows,
        "metric": metric,
        "lower_is_better": metric is not None and lower_is_better(metric),
        "figure": data_url(figure) if figure else None,
    }
    if best is not None and metric is not None:
        data |= {"best": best.name, "best_value": best.results[metric], "command": best.record.command}
    data |= {"verdict": verdict(sweep), "paper": paper_tables(sweep), "note": loss_note(sweep)}
    runs = [{"name": m.name, "series": curves(m.path, m.cfg)} for m in sweep.members[:CURVES]]
    write_text(sweep.directory / PAGE, page(sweep.name, {"sweep": data, "runs": runs}))


def loss_note(sweep: Sweep) -> str | None:
    """A sentence where the validation losses of pre-training are of different tasks; else None."""
    has_loss = any(metric.endswith("val_loss") for metric in sweep.metrics)
    if not has_loss or not any(map(changes_loss, swept_keys(sweep))):
        return None
    return "A validation loss is of the member's own masks and target: it does not compare one member with another."


def swept_keys(sweep: Sweep) -> Iterable[str]:
    """The keys that are swept, and those in which the configs of named members differ."""
    configs = [leaves(member.cfg) for member in sweep.members]
    named = bool(configs) and any(key not in configs[0] for key in sweep.keys)
    differing = {key for cfg in configs for key in cfg if cfg[key] != configs[0].get(key)} if named else ()
    return [*sweep.keys, *differing]


def figure_curves(sweep: Sweep) -> Iterable[Curve]:
    """The figure's curves: each result against the first swept key, one a value of the others, with seeds together."""
    keys = [key for key in sweep.keys if key != "seed"]
    names = short(sweep.keys)
    for metric in [m for m in sweep.metrics if not m.startswith("pretrain ")] or sweep.metrics:
        groups: dict[str, dict[Value | None, list[float]]] = {}
        images: dict[str, dict[Value | None, int]] = {}
        for m in sweep.members:
            if metric in m.results:
                others = ", ".join(f"{names[key]}={m.values[key]}" for key in keys[1:])
                x = m.values[keys[0]] if keys else m.values.get("seed")
                groups.setdefault(others, {}).setdefault(x, []).append(m.results[metric])
                if metric in m.images:
                    images.setdefault(others, {})[x] = m.images[metric]
        stage = metric.split(" ")[0] if " " in metric else sweep.members[0].cfg.task.name
        if len(groups) > len(sweep_figure.COLOURS):  # a search: no two members have much in common
            yield from (scatter_curve(sweep, metric, stage, key) for key in keys)
            continue
        for label, points in groups.items():
            key = keys[0] if keys else "seed"
            yield Curve(metric, stage, key, label, points, images=images.get(label, {}))


def scatter_curve(sweep: Sweep, metric: str, stage: str, key: str) -> Curve:
    """A result against one key, whatever the others are."""
    points: dict[Value | None, list[float]] = {}
    for m in sweep.members:
        if metric in m.results:
            points.setdefault(m.values[key], []).append(m.results[metric])
    return Curve(metric, stage, key, "", points, scatter=True)


def write_sweep(directory: Path) -> Sweep:
    """Writes table, figure and page of a sweep. Raises UserError where no member has started."""
    sweep = read_sweep(directory)
    write_table(sweep)
    figure = directory / "sweep.svg"
    curves = [] if table1.SWEEP in sweep.keys else list(figure_curves(sweep))  # its tables have no axis in common
    drawn = sweep_figure.draw_figure(curves, sweep.members[0].cfg, directory / "sweep.png", figure)
    write_page(sweep, figure if drawn else None)
    return sweep


def finish_sweep(directory: Path) -> str:
    """Writes all of it; returns a few lines about the sweep's result, or an error."""
    try:
        return sweep_result(write_sweep(directory))
    except (UserError, OSError) as error:
        return f"{error}\n"


def other_bests(sweep: Sweep) -> list[str]:
    """The best member by each accuracy but the main result, where that is another member; a line each."""
    lines = []
    for metric in sweep.metrics[1:]:
        best = sweep.best_by(metric)
        if best is not None and best is not sweep.best and not lower_is_better(metric):
            lines.append(f"By {metric} {best.name} is best: {best.results[metric]:.2f}.")
    return lines


def sweep_result(sweep: Sweep) -> str:
    """The members that are not finished, and the best one."""
    lines, best, metric = [], sweep.best, sweep.metric
    unfinished = {m.name: m.record.state for m in sweep.members if m.record.state != "finished"}
    unfinished |= dict.fromkeys(sweep.not_started, NOT_STARTED)
    if unfinished:
        count = f"{len(unfinished)} of {len(sweep.members) + len(sweep.not_started)} members"
        verb = "is" if len(unfinished) == 1 else "are"
        lines.append(f"{count} {verb} not finished; the same command continues them:")
        lines += [f"  {name}: {state}" for name, state in unfinished.items()]
    written = [name for name in FILES if (sweep.directory / name).exists()]
    lines.append(f"{' '.join(written)} are in {sweep.directory}")
    if sentence := verdict(sweep):
        lines.append(sentence)
    if (sentence := loss_note(sweep)) and metric == "val_loss":
        lines.append(sentence)
    if sentence := flops_sentence(sweep):
        lines.append(sentence)
    if best is not None and metric is not None:
        lines += other_bests(sweep)
        lines += [
            "Best member (this command makes it again in a directory of its own):",
            f"  {best.record.command}",
            f"{metric} {best.results[metric]:.4f}  {best.path}",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """`python -m mae.sweep DIR...`; returns the exit code."""
    directories = sys.argv[1:] if arguments is None else arguments
    if not directories or directories[0].startswith("-"):
        sys.stderr.write(
            f"{usage_name('sweep', 'sweep')} DIR makes sweep.csv, figure and report.html of a sweep's directory.\n"
        )
        return 2
    for directory in directories:
        try:
            sys.stdout.write(sweep_result(write_sweep(Path(directory))))
        except (UserError, OSError) as error:
            sys.stderr.write(f"{error}\n")
            return 1
    return 0
