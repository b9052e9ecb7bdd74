"""What one device holds: trial steps on grey images, and the largest micro-batch that passes one."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from mae import device as devices
from mae.config import rules
from mae.distributed.fsdp import local_shard, reshard, whole
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.models.masking import count_visible
from mae.perf.activations import saved_for_backward
from mae.plan import mixes
from mae.runs.files import write_text
from mae.tasks.registry import TASKS

if TYPE_CHECKING:
    from mae.tasks.base import TrainedTask

log = logging.getLogger(__name__)

MICRO_BATCH_FILE = "micro_batch_size.json"  # in the run's directory: a run that goes on does not try again
SHARE_OF_FREE = 0.8  # of the free memory of a host, which other programs use too


@dataclass(frozen=True)
class Trial:
    """Runs a task on grey images, and leaves no trace of it."""

    cfg: DictConfig
    task: "TrainedTask[Any]"
    masking: Callable[..., np.ndarray] | None  # keys of samples -> noise, see `mae.models.masking`
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    example_target: Callable[[int], torch.Tensor]  # targets of so many images

    def num_tokens(self) -> int:
        """Tokens of an image: its patches and the class token."""
        image, patch = rules.pair(self.cfg.model.img_size), rules.pair(self.cfg.model.patch_size)
        return 1 + (image[0] // patch[0]) * (image[1] // patch[1])

    def ratios(self) -> range:
        """The mask ratios of which each step has one, the lowest first, which shows most patches."""
        return range(max(1, len(getattr(self.task, "mask_ratios", ()))))

    @property
    def costliest(self) -> int:
        """The number of the ratio or phase whose steps need most memory."""
        phases, model = self.task.phases, self.cfg.model

        def activations(number: int) -> int:
            """About as many values as the blocks leave: of visible patches in the encoder, of all in the decoder."""
            patches = math.prod(phases[number].grid)
            visible = count_visible(patches, phases[number].mask_ratio)
            encoded = patches if model.mask_tokens == "encoder" else visible
            decoder = 0 if model.decoder == "linear" else patches * model.decoder_depth * model.decoder_embed_dim
            return encoded * model.depth * model.embed_dim + decoder

        return max(self.ratios(), key=activations) if phases else 0

    def batch(self, images: int, ratio: int = 0) -> devices.Batch:
        """A batch as the loader would send it, of a ratio or phase."""
        phase = self.task.phases[ratio] if self.task.phases else None
        size = phase.size if phase else rules.pair(self.cfg.model.img_size)
        batch = {
            "image": torch.full((images, self.cfg.model.in_chans, *size), 128, dtype=torch.uint8),
            "label": self.example_target(images),
            "index": torch.arange(images),
            "flip": torch.zeros(images, dtype=torch.bool),
        }
        if self.masking is not None:
            settings = {"grid": phase.grid, "mask_ratio": phase.mask_ratio} if phase else {}
            batch["noise"] = torch.from_numpy(self.masking(np.arange(images, dtype=np.uint64), **settings))
        if phase or len(self.ratios()) > 1:
            batch["ratio"] = torch.empty(ratio, 0)
        return devices.send(batch, self.device)

    def step(self, images: int, ratio: int | None = None) -> None:
        """Forward and backward, then forward without gradients, as a validation computes. By default the costliest."""
        with unchanged(self.task):
            batch = self.batch(images, self.costliest if ratio is None else ratio)
            with self.autocast():
                loss = self.task(batch)["loss"]
            loss.backward()
            self.task.eval()
            with whole(self.task), torch.no_grad():
                self.task.validate(batch, self.autocast)

    def saved_bytes(self, images: int) -> int:
        """Bytes that autograd saves between forward and backward."""
        with unchanged(self.task), saved_for_backward(self.task.parameters()) as saved, self.autocast():
            self.task(self.batch(images, self.costliest))
        return sum(saved.values())

    def fits(self, images: int, reserved: int) -> bool:
        """Whether a step passes while `reserved` bytes of the device are taken."""
        try:
            reservation = torch.empty(reserved, dtype=torch.uint8, device=self.device)
            self.step(images)
            del reservation
        except Exception as error:
            if not devices.out_of_memory(error):
                raise
            return False
        finally:
            devices.release(self.device)  # also after success: NCCL and other libraries allocate beside torch
        return True

    def peak(self, images: int) -> int:
        """Bytes that a step of a GPU needs beside what is allocated already."""
        allocated = torch.cuda.memory_allocated(self.device)
        devices.forget_peak_memory(self.device)
        self.step(images)
        peak = devices.peak_memory(self.device) - allocated
        devices.release(self.device)
        return peak


@contextmanager
def unchanged(task: nn.Module) -> Iterator[None]:
    """Restores statistics, gradients and the host's random states afterwards.

    During the trial cross-rank operations are off, since a trial may fail on one rank alone. DropPath keeps every
    branch, so that memory peaks as in training.
    """
    buffers = {name: buffer.clone() for name, buffer in task.named_buffers()}
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
    reducing = [module for module in task.modules() if hasattr(module, "alone")]
    for module in reducing:
        setattr(module, "alone", True)  # noqa: B010  # of the batch norm of a probe
    for name, buffer in task.named_buffers():
        if name.endswith(".keep"):  # of DropPath
            buffer.fill_(1.0)
    try:
        yield
    finally:
        for module in reducing:
            setattr(module, "alone", False)  # noqa: B010
        task.train()
        for name, buffer in task.named_buffers():
            buffer.copy_(buffers[name])
        reshard(task)  # before its gradients, which belong to shards
        task.zero_grad(set_to_none=True)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def memory_advice(cfg: DictConfig, world: int) -> str:
    """What a user can set where the memory of a device does not suffice for a task."""
    task = cfg.task
    if "micro_batch_size" in task:
        advice = "Set task.micro_batch_size=auto, or task.checkpointing=blocks."
        if task.micro_batch_size is None:
            images = task.batch_size // world
            advice = f"A device takes its whole share of a batch at a time, {images} images. {advice}"
        return advice
    for key in ("batch_size", "num_images"):  # the images of a picture are one batch
        if task.get(key, 1) > 1:
            return f"Set task.{key} to less than {task[key]}."
    return "Choose a smaller model, or device=cpu."


def stored_size(path: Path, settings: Mapping[str, object]) -> int | None:
    """The size that an earlier start of the run found for this device and these settings."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    return int(stored["micro_batch_size"]) if settings in stored.get("found_for", []) else None


class Search:
    """The sizes of a micro-batch that fit, for `task.micro_batch_size=auto`; the same on every rank.

    The effective batch stays what it is, since sizes divide a device's share of it.
    """

    def __init__(self, run: Path, ranks: Ranks, trial: Trial):
        self.path, self.ranks, self.trial = run / MICRO_BATCH_FILE, ranks, trial
        task = trial.cfg.task
        self.share = task.batch_size // ranks.world
        self.settings = {
            "share": self.share,
            "checkpointing": task.checkpointing,
            "attention_kernel": task.attention_kernel,
            "precision": task.precision,
            "device": devices.model_name(trial.device),
        }

    def run(self) -> int:
        """The largest size that fits, or that an earlier start found. Raises UserError where no size fits."""
        ranks, stored = self.ranks, self.ranks.gather(stored_size(self.path, self.settings))
        known = [size for size in stored if size is not None]
        if len(known) == ranks.world:  # either all ranks search or none does
            return min(known)
        if not ranks.sharded:
            return self.checked(min(ranks.gather(largest(self.trial, self.share))))
        candidates, reserved = estimated(self.trial, sizes(self.trial, self.share))
        size = self.checked(min(ranks.gather(candidates[0] if candidates else 0)))
        while not all(ranks.gather(self.trial.fits(size, reserved))):  # all try the same: a step exchanges weights
            size = self.next_smaller(size)
        return size

    def next_smaller(self, size: int) -> int:
        """The next size to try. Raises UserError where there is none."""
        return self.checked(next((smaller for smaller in sizes(self.trial, self.share) if smaller < size), 0))

    def checked(self, size: int) -> int:
        """The size, unless it is 0. Raises UserError then."""
        if not size:
            model = self.trial.cfg.model.name
            raise UserError(
                f"task.micro_batch_size=auto: not even the smallest part of a batch of model={model} fits in the "
                "memory of this device. Choose a smaller model, or task.checkpointing=blocks."
            )
        return size

    def store(self, size: int) -> None:
        """Writes the size into the run's directory, with the settings of each rank."""
        settings = self.ranks.gather(self.settings)
        if self.ranks.main:
            write_text(self.path, json.dumps({"micro_batch_size": size, "found_for": settings}) + "\n")
        log.info("task.micro_batch_size=auto: %d of the %d images of a device's share fit at a time", size, self.share)


def divisors(share: int, smallest: int, even: bool) -> list[int]:
    """The numbers that divide `share`, largest first."""
    return [n for n in range(share, smallest - 1, -1) if share % n == 0 and not (even and n % 2)]


def sizes(trial: Trial, share: int) -> list[int]:
    """The sizes of a micro-batch that divide a device's share, largest first."""
    task = trial.cfg.task
    return divisors(share, min(share, TASKS[task.name].smallest_batch), mixes(task))


def largest(trial: Trial, share: int) -> int:
    """The largest size for which a trial step fits, or 0."""
    candidates, reserved = estimated(trial, sizes(trial, share))
    return next((images for images in candidates if trial.fits(images, reserved)), 0)


def estimated(trial: Trial, candidates: list[int]) -> tuple[list[int], int]:
    """The sizes that should fit, largest first, and the bytes to reserve for what the run will hold beside a step.

    On a GPU memory is affine in the size, so that two small sizes predict it. A host that runs out of memory kills the
    process, so that there the bytes that autograd saves decide.
    """
    # gradients, which accumulation and data parallel keep through the next forward pass, and two optimizer states
    weights = [local_shard(p) for p in trial.task.parameters() if p.requires_grad]
    states = sum(3 * weight.numel() * weight.element_size() for weight in weights)
    reserved = states + devices.headroom(trial.device)
    if trial.device.type == "cuda":
        return predicted(trial, candidates, reserved), reserved
    if trial.device.type != "cpu" or not candidates:
        return candidates, reserved
    few = min(candidates[0], 2)
    per_image = trial.saved_bytes(few) / few
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # which share the host's memory
    free = SHARE_OF_FREE * devices.free_memory(trial.device) / ranks_here - states
    # backward allocates half as much again as autograd saves
    return [n for n in candidates if 1.5 * n * per_image <= free], 0


def predicted(trial: Trial, candidates: list[int], reserved: int) -> list[int]:
    """The sizes of which the peaks of two small ones predict that they fit, largest first."""
    small = [n for n in reversed(candidates) if n <= 8]
    if len(small) < 2 or not all(trial.fits(n, reserved) for n in (small[0], small[-1])):
        return [n for n in candidates if n <= max(small, default=candidates[0])]
    first, last = (trial.peak(n) for n in (small[0], small[-1]))
    per_image = max(1.0, (last - first) / (small[-1] - small[0]))
    free = devices.free_memory(trial.device) - reserved
    return [n for n in candidates if first + (n - small[0]) * per_image <= free]
