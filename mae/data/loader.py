"""From sources to batches, and to any place in an epoch."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mae.data.dataset import Batch, Failure, Loaded, Reader, Record
from mae.data.device_decode import DeviceDecoder
from mae.data.sampler import Batches, Sampler, Ticket
from mae.data.settings import LoaderSettings
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
    `Sampler`), and with `masking` also noise (B, L) float32; all on the host. With `mask_ratios` ratio is (k, 0): the
    batch has the k-th of them. With `batches.phases` it is of the k-th of those, made by that of `by_phase`. Where
    targets are no classes, label is (B, K) or (B, ..., H, W) of their type. Images and maps are still to be mirrored
    where flip is true, on the device (see `mae.data.prepare`).
    `bad_csv` is where bad images are listed. `source` is afterwards what is left by `fraction`, `per_class`.
    With `decode_on` image lies on that device, which decodes the files (see `mae.data.device_decode`).
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batches: Batches,
        settings: LoaderSettings,
        bad_csv: str | Path | None = None,
        pin_memory: bool = False,
        by_phase: Sequence[Transform] = (),
        decode_on: torch.device | None = None,
    ):
        batches = replace(batches, repeats=settings.repeats)
        self.source = reduced(source, settings.fraction, settings.per_class, batches.seed)
        self.timeout_s = settings.timeout_s
        self.sampler = Sampler(len(self.source), batches, self.source.order)
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.record = Record(
            len(self.source), settings.max_bad_fraction, bad_csv, world=batches.world, repeats=batches.repeats
        )
        self._start = (0, 0)
        self._running: Iterator[Loaded | Failure] | None = None  # going on from `_start`
        self._reader = Reader(self.source, transform, batches, by_phase, files=decode_on is not None)
        self._decoder = None if decode_on is None else DeviceDecoder(self._reader, decode_on)
        self._loader = makers(self._reader, Tickets(self._tickets), settings, batches.micro, pin_memory)
        weakref.finalize(self, shut, self._loader)  # at the latest when the program ends

    def _tickets(self) -> Iterator[Ticket]:
        return self.sampler.tickets(*self._start)

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[Step]:
        """The steps of an epoch from `start_step` on. Workers run ahead into the next epoch."""
        if self._running is None or self._start != (epoch, start_step):
            self._start = (epoch, start_step)
            self._running = iter(self._loader)
        running = self._running
        for number in range(start_step, self.steps_per_epoch):
            self._running = None  # left in the middle of a step, there is no going on
            count = self.sampler.micro_steps(number)
            batches = (received(running, self.record, self.timeout_s, self._decoder) for _ in range(count))
            yield Step(number, count, batches)
            for _ in batches:  # what the step's user left
                pass
            last = number + 1 == self.steps_per_epoch
            self._start = (epoch + 1, 0) if last else (epoch, number + 1)
            self._running = running

    def batches_of(self, epoch: int, step: int) -> list[Batch]:
        """The micro-batches of any step, made by this process itself; the workers go on as they were."""
        loaded = [self._reader.load(ticket) for ticket in self.sampler.micro_batches(epoch, step)]
        return [(self._decoder(batch) if self._decoder else batch).batch for batch in loaded]

    def close(self) -> None:
        """Ends the workers."""
        self._running = None
        if self._decoder is not None:
            self._decoder.summary()
        shut(self._loader)


class EvalLoader:
    """Each image once over all ranks, rank r having r, r + world, ...: no padding, so that sums are exact.

    `indices` are other images for this rank, in this order; `split` is what the list of bad images calls the source.
    Batches of `batches.micro` images, as in `Loader`, with weight 1. The random numbers are those of epoch 0. A rank
    may have no batch at all.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batches: Batches,
        settings: LoaderSettings,
        bad_csv: str | Path | None = None,
        pin_memory: bool = False,
        indices: np.ndarray | None = None,
        split: str = "val",
    ):
        self.source, self.batch_size, self.timeout_s = source, batches.micro, settings.timeout_s
        self.indices = np.arange(batches.rank, len(source), batches.world) if indices is None else indices
        self.record = Record(len(source), settings.max_bad_fraction, bad_csv, split, batches.world)
        reader = Reader(source, transform, replace(batches, repeats=1))
        self._loader = makers(reader, Tickets(self._tickets), settings, batches.micro, pin_memory)
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

    def usable(self) -> Iterator[Batch]:
        """The batches without the images that stand in for bad ones, which come in their own place too; none empty."""
        for number, batch in enumerate(self):
            start = number * self.batch_size
            own = batch["index"] == torch.from_numpy(self.indices[start : start + self.batch_size])
            if own.all():
                yield batch
            elif own.any():
                yield {name: values[own] if values.shape[:1] == own.shape else values for name, values in batch.items()}

    def close(self) -> None:
        """Ends the workers."""
        shut(self._loader)
