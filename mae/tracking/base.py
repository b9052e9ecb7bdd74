"""What a run tells while it goes on: the interface that the train loop knows, and how several listen as one."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Tracker:
    """Takes what a run tells and does nothing with it; the others override what they care for."""

    def start(self, step: int, steps: int) -> None:
        """The run begins, or goes on, at `step` of `steps`."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """A line of numbers; `step`, `images_seen` and `epoch` are among them."""

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        """A picture file."""

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """A table, such as predictions."""

    def event(self, text: str, step: int | None) -> None:
        """Something that happened once: resumed, skipped, stopped; without a step at that of the last line."""

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        """The run ends."""


class Trackers(Tracker):
    """Several trackers as one."""

    def __init__(self, members: list[Tracker]):
        self.members = members

    def start(self, step: int, steps: int) -> None:
        for member in self.members:
            member.start(step, steps)

    def log(self, metrics: Mapping[str, Any]) -> None:
        for member in self.members:
            member.log(metrics)

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        for member in self.members:
            member.picture(name, path, step, caption)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        for member in self.members:
            member.table(name, columns, rows, step)

    def event(self, text: str, step: int | None) -> None:
        for member in self.members:
            member.event(text, step)

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        for member in self.members:
            member.finish(summary, failed)


class Careful(Tracker):
    """Another tracker whose errors are warnings: after the first it is left alone."""

    def __init__(self, make: Any, what: str):
        self.what, self.inner = what, Tracker()
        try:
            self.inner = make()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning("%s is switched off for this run: %s", self.what, error)
        self.inner = Tracker()

    def _try(self, name: str, *arguments: Any) -> None:
        try:
            getattr(self.inner, name)(*arguments)
        except Exception as error:
            self._give_up(error)

    def start(self, step: int, steps: int) -> None:
        self._try("start", step, steps)

    def log(self, metrics: Mapping[str, Any]) -> None:
        self._try("log", metrics)

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        self._try("picture", name, path, step, caption)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        self._try("table", name, columns, rows, step)

    def event(self, text: str, step: int | None) -> None:
        self._try("event", text, step)

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        self._try("finish", summary, failed)
