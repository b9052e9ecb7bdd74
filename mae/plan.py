"""What follows from a config: steps, accumulation, peak learning rate. Computed once, logged under `derived/`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from mae.errors import UserError
from mae.tasks.registry import TASKS


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

    def held(self, repeats: int = 1) -> set[int]:
        """Sizes of the batches that devices hold at a time in this run: short ones come with an epoch's last step.

        A device that has no image of a step gets one, which does not count (see `mae.data.sampler`).
        """
        different = self.images // repeats  # images of an epoch
        step, micro = self.batch_size // repeats, self.micro_batch_size // repeats
        last = min(different, self.steps_per_epoch * step) - (self.steps_per_epoch - 1) * step
        counts = {min(step, different)} | ({last} if self.steps >= self.steps_per_epoch else set())
        return {
            repeats * (min(micro, max(0, len(range(rank, count, self.devices)) - start)) or 1)
            for count in counts
            for rank in range(self.devices)
            for start in range(0, math.ceil(count / self.devices), micro)
        }

    def crosses(self, every_epochs: float, step: int) -> bool:
        """Whether a multiple of `every_epochs` lies in the step that led to `step`."""
        unit = every_epochs * self.steps_per_epoch
        return math.floor(step / unit + 1e-9) > math.floor((step - 1) / unit + 1e-9)

    def derived(self, peak_lr: float) -> dict[str, float]:
        """What the config does not say itself, for the record."""
        return asdict(self) | {"peak_lr": peak_lr}

    def in_words(self, peak_lr: float, number_format: str, device: str) -> str:
        """One line for the log."""
        epochs = self.steps / self.steps_per_epoch
        return (
            f"{self.steps} steps of {self.batch_size} images ({self.micro_batch_size} x {self.accumulation} "
            f"accumulated x {self.devices} {device} device{'s' * (self.devices > 1)}), "
            f"{epochs:g} epoch{'s' * (epochs != 1)} of {self.images} images, peak lr {peak_lr:.3g}, "
            f"{number_format}"
        )


def micro_batch(batch_size: int, devices: int, micro_batch_size: int | Literal["auto"] | None) -> int:
    """Images that one device holds at a time: its whole share of the batch where no number is said."""
    share = max(1, batch_size // devices)
    return min(micro_batch_size, share) if isinstance(micro_batch_size, int) else share


def check_batches(plan: Plan, task: Mapping[str, Any], repeats: int) -> None:
    """Raises UserError where a batch of this run, most often an epoch's last one, is of a size that the task cannot
    train on."""
    held, keep = plan.held(repeats), "task.drop_last=true or another task.batch_size"
    of = f"({plan.images} images in steps of {plan.batch_size} on {plan.devices} device{'s' * (plan.devices > 1)})"
    odd = sorted(size for size in held if size % 2)
    if odd and mixes(task):
        raise UserError(
            f"task.mixup and task.cutmix mix images in pairs, and a batch of {odd[0]} comes in each epoch {of}: choose "
            f"{keep}, or set task.mixup=0 task.cutmix=0."
        )
    if min(held) < TASKS[task["name"]].smallest_batch:
        raise UserError(
            f"task={task['name']} normalises over a batch, and one of a single image comes in each epoch {of}: choose "
            f"{keep}."
        )


def mixes(task: Mapping[str, Any]) -> bool:
    """Whether a task mixes images in pairs."""
    return bool((task.get("mixup") or task.get("cutmix")) and task["mixup_prob"])


def steps_in_epoch(images: int, batch_size: int, drop_last: bool) -> int:
    """Optimizer steps of one pass. Raises UserError where there would be none."""
    steps = images // batch_size if drop_last else math.ceil(images / batch_size)
    if not steps:
        raise UserError(
            f"task.batch_size={batch_size} is larger than the training set ({images} images) and task.drop_last "
            "is true: choose a smaller batch or task.drop_last=false."
        )
    return steps


def make_plan(
    images: int,
    steps_per_epoch: int,
    devices: int,
    *,
    epochs: Annotated[float, "(0, inf)"],
    max_steps: Annotated[int, "[1, inf)"] | None,
    batch_size: Annotated[int, "[1, inf)"],
    micro_batch_size: Annotated[int, "[1, inf)"] | Literal["auto"] | None,
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
