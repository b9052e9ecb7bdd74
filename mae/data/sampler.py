"""Which image goes where: a pure function of (seed, epoch, step, rank).

The global order of an epoch is a permutation by (seed, epoch). Step s takes the s-th `batch_size` of it,
rank r every `world`-th of those from r on, cut into micro-batches. So the images of a step are the same on
any number of ranks, and a run goes on in the middle of an epoch by starting at that step.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mae import rng
from mae.data.phases import Phase, phase_at
from mae.errors import UserError

Order = Callable[[int, int], np.ndarray | None]  # (seed, epoch) -> a permutation of all indices, or None: shuffled


Masking = Callable[..., np.ndarray]  # keys (B,) of samples -> masking noise (B, L), see `mae.models.masking`
STREAM_RATIO = 3  # of a step's random numbers; the streams of samples are in `dataset.py`


class Ticket(NamedTuple):
    """What a worker needs to make one micro-batch."""

    epoch: int
    indices: np.ndarray  # (b,) int64
    weight: float  # of this micro-batch's mean in the step's; see `Sampler`
    ratio: int | None = None  # which of `Batches.mask_ratios`, or of its phases


@dataclass(frozen=True)
class Batches:
    """The batches of a rank: how many images, chosen how."""

    size: int  # images of a step, over all ranks
    micro: int  # images of a micro-batch
    seed: int
    rank: int = 0
    world: int = 1
    drop_last: bool = False  # whether the short last step of an epoch is left out
    repeats: int = 1  # samples made of an image each time it is decoded
    masking: Masking | None = None
    mask_ratios: tuple[float, ...] = ()  # of which each step has one; none: the masking's own
    phases: tuple[Phase, ...] = ()  # in place of drawn ratios: the size and mask ratio of an epoch


class Sampler:
    """Which images the batches of an epoch of `count` images hold.

    A micro-batch's `weight` is its images x world / images in the step (over all ranks). So the mean over ranks of the
    sum of weight x mean loss is the mean over the step's images, however they divide. All ranks take the same number
    of micro-steps: a rank that has none of the images of a short step gets one with weight 0.

    With `repeats` an image is decoded once and stands `repeats` times in its batch, each time cropped and
    masked anew (He et al. 2205.09113, section 3). An epoch then goes through 1 / repeats of the images, so
    that it still is `count` samples. A pass over all images takes `repeats` epochs and drops its short step.
    Raises UserError where batch sizes and counts contradict each other.
    """

    def __init__(self, count: int, batches: Batches, order: Order | None = None):
        repeats, batch_size = batches.repeats, batches.size
        for key, value in (("task.batch_size", batch_size), ("task.micro_batch_size", batches.micro)):
            if value % repeats:
                raise UserError(f"{key}={value} is not a multiple of data.repeats={repeats}.")
        self.count, self.repeats = count, repeats
        self.seed, self.rank, self.world = batches.seed, batches.rank, batches.world
        self.batch, self.micro = batch_size // repeats, batches.micro // repeats  # in different images
        self.order, self.ratios, self.phases = order, len(batches.mask_ratios), batches.phases
        self._cached: tuple[int, np.ndarray] | None = None
        if repeats > 1 or batches.drop_last:
            self.steps_per_epoch = count // batch_size
            if not self.steps_per_epoch:
                raise UserError(f"task.batch_size={batch_size} is more than the {count} images of the data set.")
        else:
            self.steps_per_epoch = -(-count // batch_size)

    def step_indices(self, epoch: int, step: int) -> np.ndarray:
        """The images of a step over all ranks, in global order."""
        assert 0 <= step < self.steps_per_epoch
        turn, fraction = divmod(epoch, self.repeats)  # a pass over all images, and which fraction of it
        if self._cached is None or self._cached[0] != turn:
            order = self.order(self.seed, turn) if self.order else None
            shuffled = np.random.default_rng([self.seed, turn]).permutation(self.count) if order is None else order
            self._cached = turn, shuffled
        start = (fraction * self.steps_per_epoch + step) * self.batch
        return self._cached[1][start : start + self.batch]

    def micro_batches(self, epoch: int, step: int) -> list[Ticket]:
        """This rank's micro-batches of a step; as many on every rank."""
        images, ratio = self.step_indices(epoch, step), self.ratio(epoch, step)
        own = images[self.rank :: self.world]
        tickets = []
        for start in range(0, -(-len(images) // self.world), self.micro):
            micro = own[start : start + self.micro]
            weight = len(micro) * self.world / len(images)
            tickets.append(Ticket(epoch, micro if len(micro) else images[:1], weight, ratio))
        return tickets

    def ratio(self, epoch: int, step: int) -> int | None:
        """Which mask ratio a step has, on all ranks and in all its micro-batches; None where there is no choice.

        With phases it is that of the epoch, and its number the phase's.
        """
        if self.phases:
            return phase_at(self.phases, epoch)
        if not self.ratios:
            return None
        key = rng.keys(self.seed, epoch, np.array([step]), STREAM_RATIO)
        return int(key[0] % np.uint64(self.ratios))

    def micro_steps(self, step: int) -> int:
        """Micro-batches of a step: the same in all epochs, and on all ranks."""
        left = self.count - step * self.batch if self.repeats == 1 else self.batch
        largest = math.ceil(min(self.batch, left) / self.world)  # rank 0's share
        return math.ceil(largest / self.micro)

    def tickets(self, epoch: int, step: int) -> Iterator[Ticket]:
        """All micro-batches from a step on, epoch after epoch without end."""
        while True:
            for later in range(step, self.steps_per_epoch):
                yield from self.micro_batches(epoch, later)
            epoch, step = epoch + 1, 0


def laned(line: np.ndarray, lanes: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """An order of images cut into `lanes` equal lanes, each shuffled within windows of `width` images.

    Position p of the result belongs to lane p % lanes."""
    order = np.empty_like(line)
    for lane, images in enumerate(np.array_split(line, lanes)):
        for start in range(0, len(images), width):
            images[start : start + width] = rng.permutation(images[start : start + width])
        order[lane::lanes] = images
    return order
