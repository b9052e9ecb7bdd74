"""What follows from a config: steps, accumulation, peak learning rate. Computed once, logged under `derived/`."""

import math
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Plan:
    """Numbers of one training run, the same on every rank."""

    images: int  # samples of an epoch: those of the training set, whatever data.repeats is
    devices: int
    batch_size: int  # images of one optimizer step over all devices
    micro_batch_size: int  # images that one device holds at a time
    accumulation: int
    steps_per_epoch: int
    steps: int  # at which this run ends
    epochs: float  # over which the schedule runs

    def images_seen(self, step: int) -> int:
        """Images of the first `step` steps."""
        whole, rest = divmod(step, self.steps_per_epoch)
        in_epoch = min(self.images, self.steps_per_epoch * self.batch_size)
        return whole * in_epoch + min(rest * self.batch_size, in_epoch)

    def crosses(self, every_epochs: float, step: int) -> bool:
        """Whether a multiple of `every_epochs` lies in the step that led to `step`."""
        unit = every_epochs * self.steps_per_epoch
        return math.floor(step / unit + 1e-9) > math.floor((step - 1) / unit + 1e-9)

    def derived(self, peak_lr: float) -> dict[str, float]:
        """What the config does not say itself, for the record."""
        return asdict(self) | {"peak_lr": peak_lr}

    def in_words(self, peak_lr: float, number_format: str, device: str) -> str:
        """One line for the log."""
        return (
            f"{self.steps} steps of {self.batch_size} images ({self.micro_batch_size} x {self.accumulation} "
            f"accumulated x {self.devices} {device} device{'s' * (self.devices > 1)}), "
            f"{self.steps / self.steps_per_epoch:g} epochs of {self.images} images, peak lr {peak_lr:.3g}, "
            f"{number_format}"
        )


def micro_batch(batch_size: int, devices: int, micro_batch_size: int | Literal["auto"] | None) -> int:
    """Images that one device holds at a time: its whole share of the batch where no number is said."""
    share = max(1, batch_size // devices)
    return min(micro_batch_size, share) if isinstance(micro_batch_size, int) else share


def steps_in_epoch(images: int, batch_size: int, drop_last: bool) -> int:
    """Optimizer steps of one pass. Raises ValueError where there would be none."""
    steps = images // batch_size if drop_last else math.ceil(images / batch_size)
    if not steps:
        raise ValueError(
            f"task.batch_size={batch_size} is larger than the training set ({images} images) and task.drop_last "
            "is true: choose a smaller batch or task.drop_last=false."
        )
    return steps


def make_plan(
    images: int,
    steps_per_epoch: int,
    devices: int,
    *,
    epochs: float,
    max_steps: int | None,
    batch_size: int,
    micro_batch_size: int | Literal["auto"] | None,
    drop_last: bool,
) -> Plan:
    """Steps and accumulation from the config's numbers.

    `batch_size` is the effective batch, whatever the number of devices; `max_steps` ends the run early and
    leaves the schedule alone. A micro-batch of `auto` counts as a device's whole share.
    """
    micro = micro_batch(batch_size, devices, micro_batch_size)
    steps = math.ceil(epochs * steps_per_epoch - 1e-9)
    return Plan(
        images=min(images, steps_per_epoch * batch_size) if drop_last else images,
        devices=devices,
        batch_size=batch_size,
        micro_batch_size=micro,
        accumulation=math.ceil(math.ceil(min(batch_size, images) / devices) / micro),
        steps_per_epoch=steps_per_epoch,
        steps=min(steps, max_steps) if max_steps else steps,
        epochs=epochs,
    )
