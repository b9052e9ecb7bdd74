"""The result of a finished run: `summary.json`. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mae.runs.files import read_json, write_json
from mae.runs.layout import SUMMARY

BEST_LAYER, LAYERS = "best_layer", "layers"  # among the results of a probe of several layers
VAL_IMAGES = "val_images"  # among the results: how many validation images an accuracy is of


@dataclass(frozen=True)
class Summary:
    """What every task returns; a run that has one is finished."""

    task: str
    seconds: float
    steps: int = 0  # of the optimizer
    epochs: float = 0
    images_seen: int = 0
    images_per_second: float | None = None
    checkpoint: str | None = None  # written by the run (relative to it), or read by it
    results: Mapping[str, object] = field(default_factory=dict)  # of this task: top1, knn, files ...

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Summary":
        """The summary that `to_json` gave, of any version of this code."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "results"]
        results = {key: value for key, value in values.items() if key not in names}
        return cls(
            **{"task": "", "seconds": 0.0} | {name: values[name] for name in names if name in values}, results=results
        )

    def to_json(self) -> dict[str, Any]:
        """One flat object: what all tasks have, then the task's own results."""
        return {
            "task": self.task,
            "steps": self.steps,
            "epochs": self.epochs,
            "images_seen": self.images_seen,
            "seconds": round(self.seconds, 2),
            "images_per_second": self.images_per_second,
            "checkpoint": self.checkpoint,
        } | dict(self.results)

    def write(self, run: Path) -> None:
        """Leaves `summary.json`, with which the run is finished. Raises UserError where the disk does not take it."""
        write_json(run / SUMMARY, self.to_json(), indent=1)

    @classmethod
    def read(cls, run: Path) -> "Summary | None":
        """The summary of a run; None where the run is not finished."""
        values = read_json(run / SUMMARY)
        return cls.from_json(values) if values else None


def is_finished(run: Path) -> bool:
    """Whether a run has left its summary."""
    return (run / SUMMARY).exists()


def rate(images: int, seconds: float) -> float | None:
    """Images per second, as a summary gives it."""
    return round(images / seconds, 1) if seconds else None
