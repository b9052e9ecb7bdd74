"""report.html of a run: curves, pictures, classes, config, events, in one file that needs no network.

`python -m mae.report RUN` makes it again; `python -m mae.report RUN RUN ... [--out FILE]` lays runs side by side.
"""

import argparse
import csv
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mae.config.identity import leaves
from mae.config.saved import read_config
from mae.errors import UserError
from mae.report import record as run_record
from mae.report.html import data_url, page
from mae.runs.files import read_json_lines, write_text
from mae.tasks.registry import METRICS

log = logging.getLogger(__name__)

NAME = "report.html"
POINTS = 1500  # of a curve; more than its chart has pixels
FRAMES = 24  # of a slider
SPECIAL = ("step", "images_seen", "epoch")


def write(run: Path) -> None:
    """report.html of a run, finished or not. Never ends a run: what goes wrong is a warning."""
    try:
        write_text(run / NAME, page(run.name, {"runs": [gather(run)]}))
    except Exception as error:
        log.warning("%s could not be made: %s", run / NAME, error)


def gather(run: Path) -> dict[str, Any]:
    """All that a page shows of a run. Raises UserError where the directory is not one of a run."""
    cfg = read_config(run)
    record = run_record.read_record(run)
    parts = [run, *stages_of(run, cfg).values()]
    about = f"{cfg.task.name} · {cfg.model.name} on {cfg.data.name}"
    return {
        "name": run.absolute().name,
        "about": about,
        "state": record.state,
        "tiles": tiles(record.summary),
        "command": record.command,
        "series": curves(run, cfg),
        "pictures": [one for part in parts for one in pictures(part)],
        "classes": next((found for part in reversed(parts) if (found := classes(part))), None),
        "config": run_record.compared(cfg, record.overrides),
        "events": [[f"step {row.get('step')}", str(row.get("event"))] for row in record.events] + bad_files(run),
        "environment": environment(run),
    }


def tiles(summary: dict[str, Any]) -> list[list[Any]]:
    """The main figures, as (name, value)."""
    names = {"val_loss": "validation loss", "top1": "top-1 %", "best_top1": "best top-1 %", "top5": "top-5 %"}
    names |= {"loss": "loss", "ece": "calibration error", "images_per_second": "images a second", "steps": "steps"}
    names |= {"epochs": "epochs", "seconds": "seconds"}
    names = {key: metric.title for key, metric in METRICS.items() if key not in names} | names
    found: list[list[Any]] = [[names[key], summary[key]] for key in names if isinstance(summary.get(key), int | float)]
    if isinstance(summary.get("stages"), dict):
        parts = [(stage, key) for stage in summary["stages"] for key in METRICS]
        results = [[f"{stage} {names[key]}", summary["stages"][stage].get(key)] for stage, key in parts]
        return [row for row in results if isinstance(row[1], int | float)] + [["seconds", summary.get("seconds")]]
    knn = summary.get("knn")
    return [[f"k-NN top-1 %, k = {k}", v] for k, v in knn.items()] + found if isinstance(knn, dict) else found


def stages_of(run: Path, cfg: DictConfig) -> dict[str, Path]:
    """The runs that a pipeline's run consists of, as far as they have begun; none of any other run."""
    return {name: run / name for name in cfg.task.get("stages", []) if (run / name / "config.yaml").exists()}


def curves(run: Path, cfg: DictConfig) -> dict[str, Any]:
    """A run's metrics over its steps; of a pipeline, those of its stages, each named by its own."""
    return series(read_json_lines(run / "metrics.jsonl")) | {
        f"{name}: {key}": column
        for name, path in stages_of(run, cfg).items()
        for key, column in series(read_json_lines(path / "metrics.jsonl")).items()
        if "/" not in key or key.startswith("val/")
    }


def series(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Each metric as columns: `x` of step, images seen and epoch, and `y`."""
    found: dict[str, dict[str, Any]] = {}
    for row in metrics:
        for key, value in row.items():
            if key in SPECIAL or key.startswith("derived/") or isinstance(value, bool):
                continue
            if isinstance(value, int | float) or value is None:
                column = found.setdefault(key, {"x": {name: [] for name in SPECIAL}, "y": []})
                column["y"].append(value)
                for name in SPECIAL:
                    column["x"][name].append(row.get(name, 0))
    for column in found.values():
        stride = -(-len(column["y"]) // POINTS)
        if stride > 1:
            last = len(column["y"]) - 1
            chosen = [k for k in range(last + 1) if k % stride == 0 or k == last]
            column["y"] = [column["y"][k] for k in chosen]
            column["x"] = {name: [values[k] for k in chosen] for name, values in column["x"].items()}
    return found


def pictures(run: Path) -> list[dict[str, Any]]:
    """The pictures in images/, those of one name together in the order of their steps."""
    epochs = {row["step"]: row.get("epoch") for row in read_json_lines(run / "metrics.jsonl") if "step" in row}
    groups: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted((run / "images").glob("*.png")):
        if match := re.fullmatch(r"(\w+?)_(\d{8})", path.stem):
            groups.setdefault(match[1], []).append((int(match[2]), path))
        elif not path.stem.endswith(".tmp") and path.stem != "confusion":  # which is a table of the page
            groups[path.stem.replace("_", " ")] = [(-1, path)]
    found = []
    for name, frames in groups.items():
        count = min(FRAMES, len(frames))
        chosen = [frames[round(k * (len(frames) - 1) / max(1, count - 1))] for k in range(count)]
        items = []
        for step, path in chosen:
            epoch = epochs.get(step)
            caption = "" if step < 0 else f"step {step}" + (f", epoch {epoch:g}" if epoch is not None else "")
            items.append({"src": data_url(path), "caption": caption})
        found.append({"name": name, "items": items})
    return found


def rows_of(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def classes(run: Path) -> dict[str, Any] | None:
    """Accuracy of each class, and the cells of the confusion matrix that are not 0."""
    per_class = [
        {"name": row["class"], "images": int(row["images"]), "accuracy": float(row["accuracy"])}
        for row in rows_of(run / "per_class.csv")
    ]
    cells = [[row["label"], row["predicted"], int(row["images"])] for row in rows_of(run / "confusion.csv")]
    return {"rows": per_class, "confusion": cells} if per_class or cells else None


def bad_files(run: Path) -> list[list[str]]:
    """What the data could not be read from."""
    lines = [line for path in sorted(run.glob("bad_files*.csv")) for line in path.read_text().splitlines()[1:]]
    more = [["", f"and {len(lines) - 20} more bad files"]] if len(lines) > 20 else []
    return [["bad file", line] for line in lines[:20]] + more


def environment(run: Path) -> list[list[str]]:
    """Where the last start ran, and when the earlier ones were."""
    starts = run_record.starts(run)
    if not starts:
        return []
    rows = [[key, str(value)] for key, value in starts[-1].items() if value is not None]
    return rows + [["started before", str(start.get("started"))] for start in starts[:-1]]


def differences(runs: list[Path]) -> Iterator[list[str]]:
    """Each key whose value is not the same in all runs, with the values."""
    found = [leaves(read_config(run)) for run in runs]
    for key in sorted(set().union(*found)):
        values = [json.dumps(one[key]) if key in one else "–" for one in found]
        if len(set(values)) > 1:
            yield [key, *values]


def together(runs: list[Path]) -> str:
    """One page of several runs. Their names are their directories', longer where two end alike."""
    gathered = [gather(run) for run in runs]
    names = [one["name"] for one in gathered]
    for one, run in zip(gathered, runs, strict=True):
        if names.count(one["name"]) > 1:
            one["name"] = "/".join(run.absolute().parts[-2:])
    return page(f"{len(runs)} runs", {"runs": gathered, "differences": list(differences(runs))})


def main(arguments: list[str] | None = None) -> int:
    """Makes the page of one run, or of several; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mae.report", description="report.html of one run, or of several.")
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs")
    parser.add_argument("--out", type=Path, help="the file to write; for several runs compare.html by default")
    given = parser.parse_args(arguments)
    out = given.out or (given.runs[0] / NAME if len(given.runs) == 1 else Path("compare.html"))
    try:
        if len(given.runs) == 1:
            text = page(given.runs[0].absolute().name, {"runs": [gather(given.runs[0])]})
        else:
            text = together(given.runs)
        write_text(out, text)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{out}\n")
    return 0
