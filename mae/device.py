"""Everything that depends on the device: which one, its number formats, its memory, transfers to it."""

import contextlib
import logging
import os
import resource
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.allocator import keep_freed_memory

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def pick(name: str, local_rank: int = 0) -> torch.device:
    """The device `name` asks for, or the best there is for `auto`. Raises ValueError where it is absent."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local_rank >= count:
            raise ValueError(
                f"device=cuda: process {local_rank} of this machine finds {count} GPUs. Use device=cpu, or fewer "
                "processes (launcher.processes, launcher.gpus_per_node)."
            )
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is asked
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device=mps: this machine has none. Use device=cpu.")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself (and does not merely emulate it)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def number_format(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass: `auto` is bf16 where the device has it and float32 elsewhere."""
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    if precision == "bf16" and not has_bf16(device):
        log.warning(
            "task.precision=bf16: this %s has no arithmetic of its own for it and can take a hundred times as long "
            "as with task.precision=fp32.",
            device.type,
        )
    return FORMATS[precision]


def autocast(dtype: torch.dtype, device: torch.device) -> Any:
    """Mixed precision for the two half formats, nothing for the others."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, dtype)
    return contextlib.nullcontext()


def send(batch: Batch, device: torch.device) -> Batch:
    """A batch on the device; to a GPU from pinned memory without waiting, which other devices do not keep in order."""
    return {name: tensor.to(device, non_blocking=device.type == "cuda") for name, tensor in batch.items()}


def skips_by_itself(optimizer: Any, device: torch.device) -> bool:
    """Whether an optimizer's step leaves everything as it is where its `found_inf` says so, as the fused ones do."""
    return device.type in ("cpu", "cuda") and getattr(optimizer, "_step_supports_amp_scaling", False)


def exact(device: torch.device) -> torch.device:
    """Where sums in float64 are kept: on the device, or on the host beside one that has none."""
    return torch.device("cpu") if device.type == "mps" else device


class Sender:
    """Copies batches to a device; to a GPU on a stream of its own, beside what is still computed there."""

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        if self.side is None:
            return send(batch, self.device)
        with torch.cuda.stream(self.side):
            here = send(batch, self.device)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self.side)  # which has nothing but this copy to do
        for tensor in here.values():
            tensor.record_stream(now)  # its memory is not handed out again before what reads it has run
        return here


def sent(batches: Iterable[tuple[Batch, bool]], device: torch.device) -> Iterator[tuple[Batch, bool]]:
    """(batch, last of its step) with the batch on the device."""
    sender = Sender(device)
    return ((sender(batch), last_of_step) for batch, last_of_step in batches)


def free_memory(device: torch.device) -> int:
    """Bytes that are free now: of the GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform.startswith("linux"):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
        return min([available, *left_by_cgroups(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def left_by_cgroups(membership: str, root: Path) -> Iterator[int]:
    """Bytes that each group of processes around this one, such as a job or a container, may still take (version 2)."""
    own = next((line[3:].strip("/") for line in membership.splitlines() if line.startswith("0::")), None)
    if own is None:
        return
    for group in (root / own, *(root / own).parents[: len(Path(own).parts)]):
        try:
            most, now = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:  # a group without a limit of its own, or the root
            continue
        if most != "max":  # what files have left in memory is given back when it is asked for
            yield max(0, int(most) - int(now) + int(stat.get("inactive_file", 0)))


def model_name(device: torch.device) -> str:
    """The device's name and whole gibibytes of memory: the same of two that hold the same."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name}, {found.total_memory >> 30} GiB"
    return f"{device.type}, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') >> 30} GiB"


def description(device: torch.device) -> tuple[str, str | None]:
    """The device in words, and the version of CUDA that torch was built for, None on other devices."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.version.cuda
    return f"{device.type}, {os.cpu_count()} cores", None


def release(device: torch.device) -> None:
    """Gives back what a failed attempt left reserved."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_peak_memory(device: torch.device) -> None:
    """Lets `peak_memory` begin anew, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on the GPU by tensors, on the CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
