"""From sources to batches: workers, resuming to the sample, torch's errors in plain words."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mae import augment
from mae.data.reader import Batch, Reader, Record
from mae.data.sampler import Sampler, Ticket
from mae.data.source import Source, reduced


class Tickets:
    """What a DataLoader takes its work from; it can be set to another place between passes."""

    def __init__(self, make: Callable[[], Iterator[Ticket]]):
        self.make = make

    def __iter__(self) -> Iterator[Ticket]:
        return self.make()


def processes(num_workers: int | None) -> int:
    """`data.num_workers`, or one for each CPU that this process may use."""
    if num_workers is not None:
        return num_workers
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def data_loader(
    reader: Reader,
    tickets: Tickets,
    num_workers: int | None,
    prefetch: int,
    timeout_s: float,
    pin_memory: bool,
) -> DataLoader:
    """torch's loader, used for its workers alone. Its own seeds come from a generator of its own, so that
    the main process' generators are left as they are."""
    count = processes(num_workers)
    return DataLoader(
        reader,
        sampler=tickets,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=count,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        timeout=timeout_s if count else 0,
        generator=torch.Generator(),
        persistent_workers=count > 0,
        prefetch_factor=prefetch if count else None,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def received(iterator: Iterator, record: Record, timeout_s: float) -> Batch:
    """The next batch, with torch's errors about workers in plain words."""
    try:
        batch = next(iterator)
    except RuntimeError as error:
        text = str(error)
        if "timed out" in text:
            raise ValueError(
                f"no batch came within data.timeout_s={timeout_s:g} s: the storage under data.root may hang."
            ) from error
        if "exited unexpectedly" in text:
            raise ValueError(
                "a data worker was killed, most likely for lack of memory: try a smaller data.num_workers."
            ) from error
        raise
    return record.receive(batch)


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

    A batch: image (B, C, H, W) as the source has it, flip (B,) bool, label (B,) and index (B,) int64, weight
    () float32 (see `Sampler`), and with `num_patches` also noise (B, L) float32; all on the host.
    `bad_csv` is where bad images are listed. `source` is afterwards what is left by `fraction`, `per_class`.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Tensor, augment.Draw], Tensor],
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
        num_workers: int | None,
        prefetch: int,
        timeout_s: float,
        repeats: int,
        fraction: float,
        per_class: int | None,
        max_bad_fraction: float,
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
            getattr(self.source, "order", None),
        )
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.record = Record(len(self.source), max_bad_fraction, bad_csv)
        self._start = (0, 0)
        self._running: Iterator | None = None  # going on from `_start`
        reader = Reader(self.source, transform, seed, num_patches, repeats)
        tickets = Tickets(self._tickets)
        self._loader = data_loader(reader, tickets, num_workers, prefetch, timeout_s, pin_memory)

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
        _shut(self._loader)


def _shut(loader: DataLoader) -> None:
    iterator = getattr(loader, "_iterator", None)  # torch has no public way to end persistent workers
    if iterator is not None:
        iterator._shutdown_workers()
        loader._iterator = None


class EvalLoader:
    """Each image once over all ranks, rank r having r, r + world, ...: no padding, so that sums are exact.

    Batches as in `Loader`, with weight 1. Chance, if the transform uses any, and noise are those of epoch 0.
    A rank may have no batch at all.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[..., Tensor],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        num_patches: int | None = None,
        pin_memory: bool = False,
        *,
        num_workers: int | None,
        prefetch: int,
        timeout_s: float,
        max_bad_fraction: float,
    ):
        self.source, self.batch_size, self.timeout_s = source, batch_size, timeout_s
        self.indices = np.arange(rank, len(source), world)
        self.record = Record(max(1, len(self.indices)), max_bad_fraction, None)
        reader = Reader(source, transform, seed, num_patches)
        tickets = Tickets(self._tickets)
        self._loader = data_loader(reader, tickets, num_workers, prefetch, timeout_s, pin_memory)

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
        _shut(self._loader)
