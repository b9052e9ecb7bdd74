"""What one device can hold: a trial step on invented images, and the largest micro-batch that passes it."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from mae import device
from mae.config import rules
from mae.config.check import write_text
from mae.distributed.ranks import Ranks
from mae.perf.activations import kept_for_backward
from mae.plan import mixes

log = logging.getLogger(__name__)

KEPT = "micro_batch_size.json"  # in the run's directory: a run that goes on does not try again
SHARE_OF_FREE = 0.8  # of the free memory of a host, which others use too


def invented(cfg: DictConfig, images: int, num_patches: int | None, where: torch.device) -> dict[str, Tensor]:
    """A batch of `images` grey images as the loader would send it."""
    size = rules.pair(cfg.model.img_size)
    batch = {
        "image": torch.full((images, cfg.model.in_chans, *size), 128, dtype=torch.uint8),
        "label": torch.zeros(images, dtype=torch.int64),
        "index": torch.arange(images),
        "flip": torch.zeros(images, dtype=torch.bool),
    }
    if num_patches is not None:
        batch["noise"] = torch.rand(images, num_patches)
    return device.send(batch, where)


@contextmanager
def unchanged(task: nn.Module) -> Iterator[None]:
    """Puts statistics, gradients and the host's random numbers back to what they were before a trial; meanwhile no part
    waits for other ranks, which may fail where this one does not, and no branch is left out, so that the trial holds as
    much as a step ever does."""
    kept = {name: buffer.clone() for name, buffer in task.named_buffers()}
    drawn, torch_drawn = np.random.get_state(), torch.get_rng_state()
    together: list[Any] = [part for part in task.modules() if hasattr(part, "alone")]
    for part in together:
        part.alone = True
    for name, buffer in task.named_buffers():
        if name.endswith(".keep"):  # drop path's
            buffer.fill_(1.0)
    try:
        yield
    finally:
        for part in together:
            part.alone = False
        for name, buffer in task.named_buffers():
            buffer.copy_(kept[name])
        task.zero_grad(set_to_none=True)
        np.random.set_state(drawn)
        torch.set_rng_state(torch_drawn)


def step(task: Any, batch: dict[str, Tensor], autocast: Callable[[], Any]) -> None:
    """Forward and backward, then forward without gradients, as a validation computes."""
    with unchanged(task):
        with autocast():
            loss = task(batch)["loss"]
        loss.backward()
        with torch.no_grad(), autocast():
            task(batch)


def kept_bytes(task: Any, batch: dict[str, Tensor], autocast: Callable[[], Any]) -> int:
    """Bytes that autograd holds between forward and backward."""
    with unchanged(task), kept_for_backward(task.parameters()) as kept, autocast():
        task(batch)
    return sum(kept.values())


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory did not suffice."""
    said = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # the host's, Triton's and cuBLAS's words
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in said)


def recall(kept: Path, what: dict[str, Any]) -> int | None:
    """What was found for a device and settings like these, in an earlier start of the run."""
    found = json.loads(kept.read_text()) if kept.exists() else {}
    return int(found["micro_batch_size"]) if what in found.get("found_for", []) else None


def micro_batch_size(
    run: Path,
    cfg: DictConfig,
    ranks: Ranks,
    task: Any,
    autocast: Callable[[], Any],
    *,
    micro_batch_size: int | Literal["auto"] | None,
) -> int | None:
    """`task.micro_batch_size`, found by trying where it is `auto`: the largest part of a device's share that fits.

    Parts divide the share, so that the effective batch stays what it is. All ranks take the smallest finding.
    Raises ValueError where not even one image fits.
    """
    if micro_batch_size != "auto":
        return micro_batch_size
    share = cfg.task.batch_size // ranks.world
    kept = run / KEPT
    what = {
        "share": share,
        "checkpointing": cfg.task.checkpointing,
        "attention_kernel": cfg.task.attention_kernel,
        "precision": cfg.task.precision,
        "device": device.model_name(ranks.device),
    }
    known = ranks.gather(recall(kept, what))  # so that either all ranks try or none does
    if None not in known:
        return min(known)
    found = min(ranks.gather(largest(cfg, ranks.device, task, autocast, share)))
    if not found:
        raise ValueError(
            f"task.micro_batch_size=auto: not even the smallest part of a batch of model={cfg.model.name} fits in the "
            "memory of this device. Choose a smaller model, or task.checkpointing=blocks."
        )
    devices = ranks.gather(what)
    if ranks.main:
        write_text(kept, json.dumps({"micro_batch_size": found, "found_for": devices}) + "\n")
    log.info("task.micro_batch_size=auto: %d of the %d images of a device's share fit at a time", found, share)
    return found


def parts(share: int, smallest: int, even: bool) -> list[int]:
    """The numbers that divide `share`, largest first."""
    return [n for n in range(share, smallest - 1, -1) if share % n == 0 and not (even and n % 2)]


def largest(cfg: DictConfig, where: torch.device, task: Any, autocast: Callable[[], Any], share: int) -> int:
    """The largest part of `share` images for which a trial step fits, or 0.

    A host that runs out of memory kills instead of refusing, so that there parts are first judged by what
    autograd keeps for few images. Elsewhere a tensor takes up the room of what the run will hold beside a step.
    """
    mixing = mixes(cfg.task)
    smallest = 2 if cfg.task.name == "linprobe" and share > 1 else 1  # it normalises over the batch
    candidates = parts(share, smallest, mixing)
    # gradients, which accumulation and data parallel keep through the next forward pass, and two optimizer states
    states = sum(3 * p.numel() * p.element_size() for p in task.parameters() if p.requires_grad)
    if where.type == "cpu" and candidates:
        few = min(candidates[0], 2)
        needed = kept_bytes(task, invented(cfg, few, task.num_patches, where), autocast) / few
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks of this host, which share its memory
        free = SHARE_OF_FREE * device.free_memory(where) / here - states
        # and half as much again as autograd keeps for what backward computes
        candidates = [n for n in candidates if 1.5 * n * needed <= free]
    for images in candidates:
        if fits(cfg, images, where, task, autocast, 0 if where.type == "cpu" else states):
            return images
        device.release(where)
    return 0


def fits(cfg: DictConfig, images: int, where: torch.device, task: Any, autocast: Callable[[], Any], held: int) -> bool:
    """Whether a trial step of `images` images passes beside `held` bytes of other things."""
    try:
        room = torch.empty(held, dtype=torch.uint8, device=where)
        step(task, invented(cfg, images, task.num_patches, where), autocast)
        del room
    except Exception as error:
        if not out_of_memory(error):
            raise
        return False
    return True
