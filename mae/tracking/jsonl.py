"""metrics.jsonl and events.jsonl: a run's numbers and events in its directory, one JSON object a line."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

from mae.runs import attempt
from mae.runs.files import read_json_lines, write_text
from mae.tracking.base import Tracker, step_of

log = logging.getLogger(__name__)


class JsonLines(Tracker):
    """Appends to both files. On resume, the lines after the checkpoint are cut off."""

    def __init__(self, run: Path):
        self.run, self.step = run, 0
        self.validated: set[int] = set()  # steps whose validation an earlier start has logged

    def start(self, step: int, steps: int) -> None:
        self.step = step
        for name in ("metrics.jsonl", "events.jsonl"):
            path = self.run / name
            if path.exists():
                rows = [
                    row for row in read_json_lines(path) if isinstance(row.get("step"), int) and row["step"] <= step
                ]
                write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
                self.validated |= {row["step"] for row in rows if _validates(row)}

    def log(self, metrics: Mapping[str, object]) -> None:
        """A line, but for a validation that is repeated because the run was stopped between its end and its summary."""
        self.step = step_of(metrics)
        if not (_validates(metrics) and self.step in self.validated):
            self._append("metrics.jsonl", metrics)

    def event(self, text: str, step: int | None) -> None:
        row = {"step": self.step if step is None else step, "event": text, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            self._append("events.jsonl", row)
        except OSError:  # a full disk must not hide the error that is reported
            log.warning("events.jsonl cannot be written to")

    def _append(self, name: str, row: Mapping[str, object]) -> None:
        attempt.check(self.run)
        with (self.run / name).open("a") as file:
            file.write(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n")


def _validates(metrics: Mapping[str, object]) -> bool:
    return any(name.startswith("val/") for name in metrics)


def _finite(value: object) -> object:
    """null for a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
