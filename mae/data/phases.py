"""Images that grow while a run trains: ranges of epochs with a size and a mask ratio each.

After DailyMAE (Wu et al., arXiv 2404.00509; its code, erow/FastSSL, util/dres.py). All is a function of the epoch, so
that a run goes on in any phase to the same bits.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mae.config.values import pair


class Phase(NamedTuple):
    """Consecutive epochs with images of one size."""

    epoch: int  # the first of them
    size: tuple[int, int]  # height and width in pixels
    grid: tuple[int, int]  # rows and columns of patches
    mask_ratio: float

    def __str__(self) -> str:
        return f"{self.size[0]} x {self.size[1]} pixels from epoch {self.epoch} (mask ratio {self.mask_ratio:g})"


Entry = Sequence[int | float | Sequence[int]]  # epoch, size, and perhaps a mask ratio


def phases_of(schedule: Sequence[Entry] | None, patch: tuple[int, int], mask_ratio: float) -> tuple[Phase, ...]:
    """The phases of `task.img_size_schedule`; none where it is null. An entry without a mask ratio has the task's."""
    phases = []
    for epoch, size, *ratio in schedule or ():
        height, width = pair(size)  # type: ignore[arg-type]  # the config's check leaves whole numbers here
        grid = height // patch[0], width // patch[1]
        phases.append(Phase(int(epoch), (height, width), grid, float(ratio[0]) if ratio else mask_ratio))  # type: ignore[arg-type]
    return tuple(phases)


def phase_at(phases: Sequence[Phase], epoch: int) -> int:
    """The number of the phase that an epoch belongs to."""
    return max(number for number, phase in enumerate(phases) if phase.epoch <= epoch)
