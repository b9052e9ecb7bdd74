"""What a classifier's validation leaves behind: CSV files for people and reports, tables and a chart for trackers."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mae.data.source import Source
from mae.metrics import Results
from mae.runs.outputs import noted
from mae.tasks import charts
from mae.tracking.base import Tracker

ROWS = 200  # of the table of predictions that trackers get: those with the largest loss
CONFUSED = 1000  # cells of the confusion matrix that trackers get as a table


def cells(names: list[str], confusion: np.ndarray) -> list[tuple[str, str, int]]:
    """The cells of a confusion matrix (C, C) that are not 0, as (label, predicted, images)."""
    return [(names[t], names[p], int(confusion[t, p])) for t, p in np.argwhere(confusion > 0)]


def write_results(run: Path, names: list[str], results: Results) -> None:
    """per_class.csv: accuracy in percent of each class that has images; confusion.csv: pairs that occur."""
    counts = results.per_class(len(names)).tolist()
    rows = [
        (name, count, hits, round(100.0 * hits / count, 4))
        for name, (count, hits) in zip(names, counts, strict=True)
        if count
    ]
    write_csv(run / "per_class.csv", ("class", "images", "correct", "accuracy"), rows)
    write_csv(run / "confusion.csv", ("label", "predicted", "images"), cells(names, results.confusion(len(names))))


def track_results(run: Path, names: list[str], source: Source, results: Results, step: int, tracker: Tracker) -> None:
    """The confusion matrix as a picture, and with the predictions of largest loss as tables, for trackers."""
    confusion = results.confusion(len(names))
    path = run / "images" / "confusion.png"
    charts.confusion(confusion, names, path)
    tracker.picture("confusion", path, step, "confusion of the classes")
    rows = [list(cell) for cell in cells(names, confusion)[:CONFUSED]]
    tracker.table("confusion_cells", ["label", "predicted", "images"], rows, step)
    rows = [
        [
            source.name(int(results.index[k])),
            names[results.label[k]],
            names[results.predicted[k]],
            round(float(results.confidence[k]), 4),
            round(float(results.loss[k]), 4),
        ]
        for k in np.argsort(-results.loss)[:ROWS]
    ]
    tracker.table("predictions", ["file", "label", "predicted", "confidence", "loss"], rows, step)


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A CSV file: the header, then the rows."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_table(run: Path, target: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """A CSV or Parquet file, by its suffix, which the run notes as its own."""
    with noted(run, target) as temporary:
        if target.suffix == ".csv":
            write_csv(temporary, columns, zip(*columns.values(), strict=True))
        else:
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table(dict(columns)), temporary)
