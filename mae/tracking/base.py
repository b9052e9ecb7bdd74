"""The tracker of a run: what the train loop and the tasks call, and how several trackers act as one."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)


class Tracker:
    """Receives what a run reports and does nothing with it; a subclass overrides what it records."""

    def start(self, step: int, steps: int) -> None:
        """The run starts, or resumes, at `step` of `steps`."""

    def log(self, metrics: Mapping[str, object]) -> None:
        """A line of numbers; `step`, `images_seen` and `epoch` are among them."""

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        """A picture file."""

    def table(self, name: str, columns: list[str], rows: Sequence[Sequence[object]], step: int) -> None:
        """A table, such as predictions."""

    def event(self, text: str, step: int | None) -> None:
        """A single event, such as resumed or skipped steps; without a step it is at that of the last line."""

    def finish(self, summary: Mapping[str, object], failed: bool) -> None:
        """The run ends."""


def step_of(metrics: Mapping[str, object]) -> int:
    """The step of a line of metrics."""
    step = metrics["step"]
    assert isinstance(step, int)
    return step


class Forwarding(Tracker):
    """A tracker whose subclass says what becomes of every call."""

    def forward(self, call: Callable[[Tracker], None]) -> None:
        raise NotImplementedError

    def start(self, step: int, steps: int) -> None:
        self.forward(lambda tracker: tracker.start(step, steps))

    def log(self, metrics: Mapping[str, object]) -> None:
        self.forward(lambda tracker: tracker.log(metrics))

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        self.forward(lambda tracker: tracker.picture(name, path, step, caption))

    def table(self, name: str, columns: list[str], rows: Sequence[Sequence[object]], step: int) -> None:
        self.forward(lambda tracker: tracker.table(name, columns, rows, step))

    def event(self, text: str, step: int | None) -> None:
        self.forward(lambda tracker: tracker.event(text, step))

    def finish(self, summary: Mapping[str, object], failed: bool) -> None:
        self.forward(lambda tracker: tracker.finish(summary, failed))


class Trackers(Forwarding):
    """Several trackers as one."""

    def __init__(self, members: list[Tracker]):
        self.members = members

    def forward(self, call: Callable[[Tracker], None]) -> None:
        for member in self.members:
            call(member)


class NonFatal(Forwarding):
    """A tracker whose errors are warnings; after the first error it is switched off."""

    def __init__(self, build: Callable[[], Tracker], title: str):
        self.title, self.inner = title, Tracker()
        self._try(lambda: setattr(self, "inner", build()))

    def forward(self, call: Callable[[Tracker], None]) -> None:
        self._try(lambda: call(self.inner))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            log.warning("%s is switched off for this run: %s", self.title, error)
            self.inner = Tracker()
