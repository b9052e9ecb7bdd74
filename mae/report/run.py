"""report.html of a run: curves, pictures, classes, config, events, in one file that needs no network.

`python -m mae.report RUN` makes it again; `python -m mae.report RUN RUN ... [--out FILE]` lays runs side by side.
"""

import argparse
import csv
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from omegaconf import DictConfig

from mae.config.identity import leaves
from mae.config.saved import read_config
from mae.errors import UserError
from mae.program import usage_name
from mae.report.html import data_url, page
from mae.report.members import best_number
from mae.report.record import compared, read_record, starts
from mae.report.trend import still_learning
from mae.runs.files import read_json_lines, write_text
from mae.runs.layout import LAYERS_CSV
from mae.tasks.registry import METRICS, TASKS, VAL_LOSS

log = logging.getLogger(__name__)

PAGE = "report.html"
POINTS = 1500  # of a curve; more than its chart has pixels
FRAMES = 24  # of a slider
BAD_FILES = 20  # of a list
AXES = ("step", "images_seen", "epoch")
# Numbers of summary.json beside a task's own metric -> titles
TITLES = {"val_loss": "validation loss", "val_rankme": "RankMe", "val_online_top1": "online probe, top-1 %"}
TITLES |= {"top1": "top-1 %", "best_top1": "best top-1 %", "top5": "top-5 %"}
TITLES |= {"loss": "loss", "ece": "calibration error", "images_per_second": "images a second", "steps": "steps"}
TITLES |= {"epochs": "epochs", "seconds": "seconds"}
TITLES = {key: metric.title for key, metric in METRICS.items() if key not in TITLES} | TITLES


class Series(TypedDict):
    """The values of a metric, and where on each of AXES they stand."""

    x: dict[str, list[float]]
    y: list[float | None]


def write_report(run: Path) -> None:
    """Writes report.html of a run, finished or not. Never ends a run: an error is a warning."""
    try:
        write_text(run / PAGE, page(run.name, {"runs": [page_data(run)]}))
    except Exception as error:
        log.warning("%s could not be made: %s", run / PAGE, error)


def page_data(run: Path) -> dict[str, object]:
    """Everything that a page shows of a run. Raises UserError where the directory is not one of a run."""
    cfg = read_config(run)
    record = read_record(run)
    runs = [run, *stages_of(run, cfg).values()]
    return {
        "name": run.absolute().name,
        "about": f"{cfg.task.name} · {cfg.model.name} on {cfg.data.name}",
        "state": record.state,
        "tiles": main_figures(record.summary),
        "learning": still_learning(record.metrics) if TASKS[cfg.task.name].metric is VAL_LOSS else "",
        "command": record.command,
        "series": curves(run, cfg),
        "pictures": [slider for path in runs for slider in pictures(path)],
        "layers": layer_table(run),
        "classes": next((tables for path in reversed(runs) if (tables := class_tables(path))), None),
        "config": compared(cfg, record.overrides),
        "events": [[f"step {row.get('step')}", str(row.get("event"))] for row in record.events] + bad_files(run),
        "environment": environment_rows(run),
    }


def main_figures(summary: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(title, number) of a summary's results; of a pipeline, the main ones of its stages."""
    stages, knn = summary.get("stages"), summary.get("knn")
    if isinstance(stages, dict):
        figures = [
            (f"{stage} {TITLES[key]}", best_number(row.get(key))) for stage, row in stages.items() for key in METRICS
        ]
        figures.append(("seconds", summary.get("seconds")))
    else:
        figures = [(title, summary.get(key)) for key, title in TITLES.items()]
        if isinstance(knn, dict):
            figures = [(f"k-NN top-1 %, k = {k}", value) for k, value in knn.items()] + figures
    return [(title, value) for title, value in figures if isinstance(value, int | float)]


def stages_of(run: Path, cfg: DictConfig) -> dict[str, Path]:
    """The stages of a pipeline's run that have started, by name; none of any other run."""
    return {name: run / name for name in cfg.task.get("stages", []) if (run / name / "config.yaml").exists()}


def curves(run: Path, cfg: DictConfig) -> dict[str, Series]:
    """A run's metrics over its steps; of a pipeline, those of its stages too, each with the stage's name."""
    return series(read_json_lines(run / "metrics.jsonl")) | {
        f"{name}: {key}": values
        for name, path in stages_of(run, cfg).items()
        for key, values in series(read_json_lines(path / "metrics.jsonl")).items()
        if "/" not in key or key.startswith("val/")
    }


def series(metrics: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Each metric of the lines of metrics.jsonl, thinned to POINTS values."""
    columns: dict[str, Series] = {}
    for row in metrics:
        for key, value in row.items():
            if key in AXES or key.startswith("derived/") or isinstance(value, bool):
                continue
            if isinstance(value, int | float) or value is None:
                column = columns.setdefault(key, Series(x={axis: [] for axis in AXES}, y=[]))
                column["y"].append(value)
                for axis in AXES:
                    column["x"][axis].append(row.get(axis, 0))
    return {key: thinned(column) for key, column in columns.items()}


def thinned(column: Series) -> Series:
    """Evenly spaced values of a series, with the last one."""
    last = len(column["y"]) - 1
    stride = -(-len(column["y"]) // POINTS)
    chosen = [k for k in range(last + 1) if k % stride == 0 or k == last]
    return Series(
        x={axis: [values[k] for k in chosen] for axis, values in column["x"].items()},
        y=[column["y"][k] for k in chosen],
    )


def pictures(run: Path) -> list[dict[str, object]]:
    """The pictures in images/, those of one name together in the order of their steps."""
    epochs = {row["step"]: row.get("epoch") for row in read_json_lines(run / "metrics.jsonl") if "step" in row}
    groups: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted((run / "images").glob("*.png")):
        if match := re.fullmatch(r"(\w+?)_(\d{8})", path.stem):
            groups.setdefault(match[1], []).append((int(match[2]), path))
        elif not path.stem.endswith(".tmp") and path.stem != "confusion":  # which is a table of the page
            groups[path.stem.replace("_", " ")] = [(-1, path)]
    sliders: list[dict[str, object]] = []
    for name, frames in groups.items():
        count = min(FRAMES, len(frames))
        items = []
        for k in range(count):
            step, path = frames[round(k * (len(frames) - 1) / max(1, count - 1))]
            epoch = epochs.get(step)
            caption = "" if step < 0 else f"step {step}" + (f", epoch {epoch:g}" if epoch is not None else "")
            items.append({"src": data_url(path), "caption": caption})
        sliders.append({"name": name, "items": items})
    return sliders


def rows_of(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def layer_table(run: Path) -> list[list[str]]:
    """The header and rows of a probe of several layers; none of any other run."""
    rows = rows_of(run / LAYERS_CSV)
    return [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []


def class_tables(run: Path) -> dict[str, object] | None:
    """Accuracy of each class, and the cells of the confusion matrix that are not 0."""
    per_class = [
        {"name": row["class"], "images": int(row["images"]), "accuracy": float(row["accuracy"])}
        for row in rows_of(run / "per_class.csv")
    ]
    cells = [[row["label"], row["predicted"], int(row["images"])] for row in rows_of(run / "confusion.csv")]
    return {"rows": per_class, "confusion": cells} if per_class or cells else None


def bad_files(run: Path) -> list[list[str]]:
    """Files of the data that could not be read."""
    lines = [line for path in sorted(run.glob("bad_files*.csv")) for line in path.read_text().splitlines()[1:]]
    rest = [["", f"and {len(lines) - BAD_FILES} more bad files"]] if len(lines) > BAD_FILES else []
    return [["bad file", line] for line in lines[:BAD_FILES]] + rest


def environment_rows(run: Path) -> list[list[str]]:
    """The machine and versions of the last start, and when the run was started before."""
    *earlier, last = starts(run) or [{}]
    rows = [[key, str(value)] for key, value in last.items() if value is not None]
    return rows + [["started before", str(start.get("started"))] for start in earlier]


def differences(runs: list[Path]) -> Iterator[list[str]]:
    """Each key whose value is not the same in all runs, with the values."""
    configs = [leaves(read_config(run)) for run in runs]
    for key in sorted(set().union(*configs)):
        values = [json.dumps(config[key]) if key in config else "–" for config in configs]
        if len(set(values)) > 1:
            yield [key, *values]


def comparison(runs: list[Path]) -> str:
    """One page of several runs. Their names are their directories', longer where two end alike."""
    names = [run.absolute().name for run in runs]
    data = [page_data(run) for run in runs]
    for values, name, run in zip(data, names, runs, strict=True):
        if names.count(name) > 1:
            values["name"] = "/".join(run.absolute().parts[-2:])
    return page(f"{len(runs)} runs", {"runs": data, "differences": list(differences(runs))})


def main(arguments: list[str] | None = None) -> int:
    """Makes the page of one run, or of several; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=usage_name("report", "report"), description="report.html of one run, or of several."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs")
    parser.add_argument("--out", type=Path, help="the file to write; for several runs compare.html by default")
    args = parser.parse_args(arguments)
    runs, first = args.runs, args.runs[0]
    path = args.out or (first / PAGE if len(runs) == 1 else Path("compare.html"))
    try:
        single = len(runs) == 1
        write_text(path, page(first.absolute().name, {"runs": [page_data(first)]}) if single else comparison(runs))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{path}\n")
    return 0
