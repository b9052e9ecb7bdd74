"""How far a run is: its counters, which checkpoints hold, and its clock."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


@dataclass
class Progress:
    """Counters of a run, saved with it. The tensors stay on the device between log points."""

    bad_steps: Tensor  # (): steps skipped so far
    bad_run: Tensor  # (): of these, the last ones in a row
    first_bad: Tensor  # (): steps before the first bad one; -1 where there was none, see `add`
    sums: dict[str, Tensor] = field(default_factory=dict)  # (): this rank's loss and scalars since the last log point
    step: int = 0
    logged_at: int = 0  # step of the last log point
    skips_told: int = 0
    bad_step_recorded: bool = False
    seconds: float = 0.0  # spent by all attempts together, up to this checkpoint

    @classmethod
    def new(cls, device: torch.device) -> "Progress":
        zero = torch.zeros((), device=device)
        return cls(zero, zero.clone(), zero - 1)

    def add(self, scalars: Mapping[str, Tensor], scaled: bool = False) -> None:
        """Adds those of a step, which count as 0 where it was skipped.

        Where the loss is `scaled`, gradients may overflow, and only a loss that is not finite makes a step a bad one.
        """
        bad = ~scalars["loss"].isfinite() if scaled else self.bad_run > 0
        self.first_bad = torch.where(bad & (self.first_bad < 0), self.step, self.first_bad)
        for name, value in scalars.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), device=self.bad_run.device)
            self.sums[name] += torch.where(self.bad_run > 0, 0.0, value)

    def state(self) -> dict[str, Any]:
        """What is the same on every rank."""
        return {name: value for name, value in vars(self).items() if name != "sums"}

    def load(self, trainer: Mapping[str, Any], rank: int, world: int) -> None:
        """Restores a checkpoint. Where the number of ranks has changed, each gets the mean of their sums."""
        state = trainer["progress"]
        by_rank: list[dict[str, float]] = trainer.get("sums") or [
            {"loss": value}
            for value in trainer.get("loss_sums") or [float(state["loss_sum"])]  # of earlier versions
        ]
        means = {name: sum(sums[name] for sums in by_rank) / len(by_rank) for name in by_rank[0]}
        device = self.bad_run.device
        for name in self.state():
            value = state.get(name, getattr(self, name))  # earlier versions knew no bad step
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)
        sums = by_rank[rank] if len(by_rank) == world else means
        self.sums = {name: torch.full((), value, device=device) for name, value in sums.items()}


class Clock:
    """Seconds since the last reading, and how many of them went into waiting for data."""

    def __init__(self, step: int):
        self.begun = self.since = time.perf_counter()
        self.waited, self.step = 0.0, step

    def restart(self, step: int) -> tuple[float, float]:
        """Seconds and seconds waited since the last restart."""
        now = time.perf_counter()
        read = now - self.since, self.waited
        self.since, self.waited, self.step = now, 0.0, step
        return read

    def lap(self) -> float:
        """Seconds since the last lap: the run's own time, over all its attempts."""
        now = time.perf_counter()
        lap, self.begun = now - self.begun, now
        return lap

    def timed(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The same batches, with the waiting for each counted."""
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch
