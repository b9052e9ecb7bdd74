"""What a segmenter's validation leaves behind: iou.csv, a chart of each class's IoU, the confusion matrix."""

from pathlib import Path

import numpy as np

from mae.metrics import PixelResults
from mae.tasks import charts
from mae.tasks.results import cells, write_csv
from mae.tracking.base import Tracker

IOU_COLUMNS = ("class", "pixels", "iou", "accuracy")


def class_rows(names: list[str], results: PixelResults) -> list[tuple[str, int, float, float]]:
    """(class, pixels, IoU, accuracy) of each class that occurs or is predicted; figures in percent.

    The accuracy of a class without pixels is 0."""
    columns = results.counts.sum(1).tolist(), results.iou(), np.nan_to_num(results.accuracy())
    return [
        (name, pixels, round(float(iou), 4), round(float(accuracy), 4))
        for name, pixels, iou, accuracy in zip(names, *columns, strict=True)
        if not np.isnan(iou)
    ]


def write_pixels(run: Path, names: list[str], results: PixelResults) -> None:
    """iou.csv: pixels, IoU and accuracy of each class; images/iou.png shows it."""
    rows = class_rows(names, results)
    write_csv(run / "iou.csv", IOU_COLUMNS, rows)
    charts.bars([row[0] for row in rows], [row[2] for row in rows], "IoU (%)", run / "images" / "iou.png")


def track_pixels(run: Path, names: list[str], results: PixelResults, step: int, tracker: Tracker) -> None:
    """The table of classes, the chart, and the confusion matrix, for trackers; it also stands in confusion.csv."""
    write_csv(run / "confusion_pixels.csv", ("label", "predicted", "pixels"), cells(names, results.counts))
    tracker.table("iou", list(IOU_COLUMNS), class_rows(names, results), step)
    tracker.picture("iou", run / "images" / "iou.png", step, "IoU of each class")
    path = run / "images" / "confusion_of_pixels.png"
    charts.confusion(results.counts, names, path)
    tracker.picture("confusion", path, step, "confusion of the pixels' classes")
