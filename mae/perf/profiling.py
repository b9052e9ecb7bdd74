"""Profiles of training steps: a trace for a viewer, and a table of the costliest operations."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import profiler

log = logging.getLogger(__name__)

SKIPPED, WARM_UP, RECORDED = 3, 2, 5  # steps: the first ones also fill caches
ROWS = 20


class Profiler(Protocol):
    """What the train loop sees of torch's profiler."""

    def step(self) -> object:
        """A step has ended."""
        ...


class NoProfile:
    """Records nothing."""

    def step(self) -> None:
        """A step has ended."""


@contextmanager
def profiled(run: Path, main: bool, on_cuda: bool, steps: int, *, profile: bool) -> Iterator[Profiler]:
    """Records the 6th to the 10th of `steps` steps of the main process if `profile`; call `step()` after each step.

    Writes `profile/trace.json` (for https://ui.perfetto.dev or chrome://tracing) and `profile/operations.txt`.
    """
    if profile and main and steps < (needed := SKIPPED + WARM_UP + RECORDED):
        log.warning("task.profile=true records the 6th to the %dth step, and %d are left: no profile", needed, steps)
        profile = False
    if not (profile and main):
        yield NoProfile()
        return
    kinds = [profiler.ProfilerActivity.CPU] + [profiler.ProfilerActivity.CUDA] * on_cuda

    def write(recorded: profiler.profile) -> None:
        folder = run / "profile"
        folder.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(folder / "trace.json"))
        order = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        (folder / "operations.txt").write_text(f"{RECORDED} steps, the {ROWS} costliest operations first\n{table}\n")
        log.info("task.profile: %d steps are in %s and operations.txt beside it", RECORDED, folder / "trace.json")

    plan = profiler.schedule(wait=SKIPPED, warmup=WARM_UP, active=RECORDED, repeat=1)
    with profiler.profile(activities=kinds, schedule=plan, on_trace_ready=write, record_shapes=True) as recording:
        yield recording
