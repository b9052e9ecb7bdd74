"""From sources to batches, and to any place in an epoch."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from mae.data.dataset import Batch, Reader, Record
from mae.data.sampler import Sampler, Ticket
from mae.data.source import Source
from mae.data.subsets import reduced
from mae.data.transforms import Transform
from mae.data.workers import Tickets, makers, received, shut


class Step:
    """The micro-batches of one optimizer step, each made when asked for; goes through once."""

    def __init__(self, number: int, count: int, batches: Iterator[Batch]):
        self.number, self.count, self.batches = number, count, batches

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return self.batches


class Loader:
    """Training batches, the same bits for any number of workers and wherever one starts.

    A batch: image (B, C, H, W) as the source has it, flip (B,) bool, label and index (B,) int64, weight () float32 (see
    `Sampler`), and with `num_patches` also noise (B, L) float32; all on the host. Where targets are no classes, label
    is (B, K) or (B, ..., H, W) of their type. Images and maps are still to be mirrored where flip is true, on the
    device (see `mae.data.prepare`).
    `bad_csv` is where bad images are listed. `source` is afterwards what is left by `fraction`, `per_class`.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        num_patches: int | None = None,
        drop_last: bool = False,
        pin_memory: bool = False,
        bad_csv: str | Path | None = None,
        *,
        num_workers: Annotated[int, "[0, inf)"] | None,
        workers: Literal["auto", "thread", "process"],
        prefetch: Annotated[int, "[1, inf)"],
        timeout_s: Annotated[float, "(0, inf)"],
        repeats: Annotated[int, "[1, inf)"],
        fraction: Annotated[float, "(0, 1]"],
        per_class: Annotated[int, "[1, inf)"] | None,
        max_bad_fraction: Annotated[float, "[0, 1]"],
    ):
        self.source = reduced(source, fraction, per_class, seed)
        self.timeout_s = timeout_s
        self.sampler = Sampler(
            len(self.source),
            batch_size,
            micro_batch_size,
            seed,
            rank,
            world,
            drop_last,
            repeats,
            self.source.order,
        )
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.record = Record(len(self.source), max_bad_fraction, bad_csv, world=world, repeats=repeats)
        self._start = (0, 0)
        self._running: Iterator | None = None  # going on from `_start`
        reader = Reader(self.source, transform, seed, num_patches, repeats)
        tickets = Tickets(self._tickets)
        self._loader = makers(reader, tickets, num_workers, workers, prefetch, timeout_s, pin_memory, micro_batch_size)
        weakref.finalize(self, shut, self._loader)  # at the latest when the program ends

    def _tickets(self) -> Iterator[Ticket]:
        return self.sampler.tickets(*self._start)

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[Step]:
        """The steps of an epoch from `start_step` on. Workers run ahead into the next epoch."""
        place = (epoch, start_step)
        if self._running is None or self._start != place:
            self._start = place
            self._running = iter(self._loader)
        running = self._running
        for number in range(start_step, self.steps_per_epoch):
            self._running = None  # left in the middle of a step, there is no going on
            count = self.sampler.micro_steps(number)
            batches = (received(running, self.record, self.timeout_s) for _ in range(count))
            yield Step(number, count, batches)
            for _ in batches:  # what the step's user left
                pass
            last = number + 1 == self.steps_per_epoch
            self._start = (epoch + 1, 0) if last else (epoch, number + 1)
            self._running = running

    def close(self) -> None:
        """Ends the workers."""
        self._running = None
        shut(self._loader)


class EvalLoader:
    """Each image once over all ranks, rank r having r, r + world, ...: no padding, so that sums are exact.

    Batches as in `Loader`, with weight 1. Chance, if the transform uses any, and noise are those of epoch 0.
    A rank may have no batch at all.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        num_patches: int | None = None,
        pin_memory: bool = False,
        bad_csv: str | Path | None = None,
        *,
        num_workers: int | None,
        workers: Literal["auto", "thread", "process"],
        prefetch: int,
        timeout_s: float,
        max_bad_fraction: float,
    ):
        self.source, self.batch_size, self.timeout_s = source, batch_size, timeout_s
        self.indices = np.arange(rank, len(source), world)
        self.record = Record(len(source), max_bad_fraction, bad_csv, "val", world)
        reader = Reader(source, transform, seed, num_patches)
        tickets = Tickets(self._tickets)
        self._loader = makers(reader, tickets, num_workers, workers, prefetch, timeout_s, pin_memory, batch_size)
        weakref.finalize(self, shut, self._loader)  # at the latest when the program ends

    def _tickets(self) -> Iterator[Ticket]:
        for start in range(0, len(self.indices), self.batch_size):
            yield Ticket(0, self.indices[start : start + self.batch_size], 1.0)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        iterator = iter(self._loader)
        for _ in range(len(self)):
            yield received(iterator, self.record, self.timeout_s)
        for _ in iterator:  # torch's loader counts a pass as over when it says so itself
            pass

    def close(self) -> None:
        """Ends the workers."""
        shut(self._loader)
