"""What a classifier's validation leaves behind: CSV files for people and reports, tables and a chart for trackers."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from mae.data.source import Source
from mae.metrics import Results
from mae.tasks import charts

ROWS = 200  # of the table of predictions that trackers get: those with the largest loss
CONFUSED = 1000  # cells of the confusion matrix that trackers get as a table


def write_per_class(run: Path, names: list[str], counts: np.ndarray) -> None:
    """per_class.csv: class, images, correct, accuracy in percent; classes without images are left out."""
    rows = (
        (name, count, hits, round(100.0 * hits / count, 4))
        for name, (count, hits) in zip(names, counts.tolist(), strict=True)
        if count
    )
    _write(run / "per_class.csv", ("class", "images", "correct", "accuracy"), rows)


def cells(names: list[str], confusion: np.ndarray) -> list[list[Any]]:
    """The cells of a confusion matrix (C, C) that are not 0, as (label, predicted, images)."""
    return [[names[t], names[p], int(confusion[t, p])] for t, p in np.argwhere(confusion > 0)]


def write_confusion(run: Path, names: list[str], confusion: np.ndarray) -> None:
    """confusion.csv: label, predicted, images; pairs that never occur are left out."""
    _write(run / "confusion.csv", ("label", "predicted", "images"), cells(names, confusion))


def write_all(run: Path, names: list[str], results: Results) -> None:
    """per_class.csv and confusion.csv."""
    write_per_class(run, names, results.per_class(len(names)))
    write_confusion(run, names, results.confusion(len(names)))


def tell(run: Path, names: list[str], source: Source, results: Results, step: int, tracker: Any, where: str) -> None:
    """The confusion matrix as a picture, and with the predictions as tables, for whoever listens."""
    confusion = results.confusion(len(names))
    path = run / "images" / "confusion.png"
    charts.confusion(confusion, names, path)
    tracker.picture("confusion", path, step, f"confusion on {where}")
    tracker.table("confusion_cells", ["label", "predicted", "images"], cells(names, confusion)[:CONFUSED], step)
    worst = np.argsort(-results.loss)[:ROWS]
    rows = [
        [
            source.name(int(results.index[k])),
            names[results.label[k]],
            names[results.predicted[k]],
            round(float(results.confidence[k]), 4),
            round(float(results.loss[k]), 4),
        ]
        for k in worst
    ]
    tracker.table("predictions", ["file", "label", "predicted", "confidence", "loss"], rows, step)


def _write(path: Path, header: tuple[str, ...], rows: Any) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
