"""What depends on the device: its choice, number formats, memory, and transfers to it."""

import contextlib
import ctypes
import functools
import logging
import os
import re
import resource
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mae.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # as the host, Triton and cuBLAS say it
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def pick(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; for `auto` the first of CUDA, MPS, CPU that exists. Raises UserError without it."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        device = torch.device("cuda", gpu_index(local_rank))
        check_kernels(device)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for products in float32
        return device
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: this machine has none. Use device=cpu.")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def gpu_index(local_rank: int) -> int:
    """The GPU of a process: its local rank, or the only one that a cluster or a container shows it."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 1:
        return 0
    if local_rank >= count:
        raise UserError(
            f"device=cuda: process {local_rank} of this machine finds {count} GPUs. Use device=cpu, or fewer processes "
            "(launcher.processes, launcher.gpus_per_node)."
        )
    return local_rank


def gpu_identity(device: torch.device) -> str:
    """What tells a GPU, or a slice of it, from others of all machines."""
    variables = [os.environ.get(f"{vendor}_VISIBLE_DEVICES", "") for vendor in ("CUDA", "ROCR", "HIP")]
    slices = [value for value in variables if value.startswith("MIG")]  # may share the uuid of their GPU
    return " ".join([socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid), *slices])


def check_kernels(device: torch.device) -> None:
    """Raises UserError where torch has no kernels for a GPU of NVIDIA's."""
    capability, architectures = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if torch.version.hip is not None or not architectures or runs_on(capability, architectures):
        return
    known = ", ".join(sorted({f"{number // 10}.{number % 10}" for _, number in map(parsed, architectures)}, key=float))
    older = capability < (7, 5)
    raise UserError(
        f"device=cuda: torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} (compute "
        f"capability {capability[0]}.{capability[1]}), only for {known}. Install "
        + ("torch for CUDA 12.6 (cu126), which has those of 5.0 to 9.0" if older else "a newer torch")
        + ", or use device=cpu."
    )


def runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether kernels for `architectures` run: those of the same major version, and what the driver compiles."""
    for kind, number in map(parsed, architectures):
        major, minor = divmod(number, 10)
        if (kind == "sm" and major == capability[0] and minor <= capability[1]) or (
            kind == "compute" and (major, minor) <= capability
        ):
            return True
    return False


def parsed(architecture: str) -> tuple[str, int]:
    """`sm_90a` as ("sm", 90)."""
    kind, _, number = architecture.partition("_")
    return kind, int(number.rstrip("af"))


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself instead of emulating it."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def has_fp16_products(device: torch.device) -> bool:
    """Whether a GPU has tensor cores, which multiply matrices in float16 several times as fast as in float32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def number_format(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass; `auto` is bf16 where the device has it, fp16 on older GPUs, else float32."""
    if precision == "auto":
        if has_bf16(device):
            return torch.bfloat16
        return torch.float16 if has_fp16_products(device) else torch.float32
    if precision == "bf16" and not has_bf16(device):
        log.warning(
            "task.precision=bf16: this %s has no arithmetic of its own for it and can take a hundred times as long "
            "as with task.precision=fp32.",
            device.type,
        )
    return FORMATS[precision]


def weight_format(dtype: torch.dtype) -> torch.dtype | None:
    """What weights are converted to for arithmetic in a number format: float64 for float64, nothing for others."""
    return torch.float64 if dtype is torch.float64 else None


def as_float(tensor: Tensor) -> Tensor:
    """A tensor in float32, or in float64 where it is in that."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def autocast(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Mixed precision for the two half formats; no effect for the others."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, dtype)
    return contextlib.nullcontext()


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within, products and convolutions in float32 use no TF32, whose 10 bits would change near neighbours' order."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def inference_autocast(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """`autocast` for tasks that do not train: in float32 a GPU gives the figures of a CPU, without TF32."""
    return full_precision() if dtype is torch.float32 else autocast(dtype, device)


def send(batch: Batch, device: torch.device) -> Batch:
    """A batch on the device. The host does not wait for a copy to a GPU; other devices do not order such copies."""
    return {name: tensor.to(device, non_blocking=device.type == "cuda") for name, tensor in batch.items()}


def select_rows(tensor: Tensor, indices: Tensor) -> Tensor:
    """The rows that `indices` (n,) names. CUDA indexes no uint16, whose bits it copies as int16."""
    if tensor.dtype is torch.uint16:
        return tensor.view(torch.int16)[indices].view(torch.uint16)
    return tensor[indices]


def skips_by_itself(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether an optimizer's step changes nothing where its `found_inf` is not 0, as the fused ones do."""
    return device.type in ("cpu", "cuda") and getattr(optimizer, "_step_supports_amp_scaling", False)


def exact(device: torch.device) -> torch.device:
    """The device for sums in float64: the host where the device has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for copies to a GPU. One a device: torch keeps the memory of each stream apart, for good."""
    return torch.cuda.Stream(device)


class Sender:
    """Copies batches to a device; to a GPU on a stream of its own, so that copies and computation overlap."""

    def __init__(self, device: torch.device):
        self.device = device
        self.copy_stream = copy_stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        if self.copy_stream is None:
            return send(batch, self.device)
        with torch.cuda.stream(self.copy_stream):
            copies = send(batch, self.device)
        compute_stream = torch.cuda.current_stream(self.device)
        compute_stream.wait_stream(self.copy_stream)  # this copy is all that is queued there
        for tensor in copies.values():
            tensor.record_stream(compute_stream)  # keeps the memory until the computation has read it
        return copies


def sent(batches: Iterable[tuple[Batch, bool]], device: torch.device) -> Iterator[tuple[Batch, bool]]:
    """(batch, last of its step) with the batch on the device."""
    sender = Sender(device)
    return ((sender(batch), last_of_step) for batch, last_of_step in batches)


def free_memory(device: torch.device) -> int:
    """Free bytes of the GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform.startswith("linux"):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
        return min([available, *free_in_cgroups(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def headroom(device: torch.device) -> int:
    """Bytes of a GPU that stay free for NCCL, cuBLAS and fragments of memory."""
    return max(int(0.06 * torch.cuda.mem_get_info(device)[1]), 1_500_000_000) if device.type == "cuda" else 0


def free_in_cgroups(membership: str, root: Path) -> Iterator[int]:
    """Bytes that each control group (version 2) of this process, such as a job or a container, may still take."""
    own = next((line[3:].strip("/") for line in membership.splitlines() if line.startswith("0::")), None)
    if own is None:
        return
    for group in (root / own, *(root / own).parents[: len(Path(own).parts)]):
        try:
            limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:  # a group without a limit of its own, or the root
            continue
        if limit != "max":  # the kernel drops cached files when memory is needed
            yield max(0, int(limit) - int(used) + int(stat.get("inactive_file", 0)))


def model_name(device: torch.device) -> str:
    """The device's name and memory in whole GiB: equal for devices that hold the same batch."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory >> 30} GiB"
    return f"{device.type}, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') >> 30} GiB"


def description(device: torch.device) -> tuple[str, str | None]:
    """The device's name, and the CUDA version of torch (None on other devices)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.version.cuda
    return f"{device.type}, {os.cpu_count()} cores", None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice."""
    stated = any(text in str(error) for text in OUT_OF_MEMORY)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or stated


@contextlib.contextmanager
def explaining_memory(device: torch.device, advice: str) -> Iterator[None]:
    """Raises a lack of memory within as a UserError with `advice`, sentences that say what to set."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"Out of memory on {model_name(device)}. {advice} ({reason})") from error


def release(device: torch.device) -> None:
    """Returns cached memory to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


PROCESS_STATUS = Path("/proc/self/status")  # of Linux


def forget_peak_memory(device: torch.device) -> None:
    """Resets `peak_memory` where the device can, so that a run does not report what an earlier one in this process
    took."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif PROCESS_STATUS.exists():
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # of what is freed; see `keep_freed_memory`
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if PROCESS_STATUS.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", PROCESS_STATUS.read_text())):
        return int(match[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------- the host's allocator

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # names of mallopt(3), numbers of malloc.h
LARGEST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> bool:
    """Keep freed memory in the process, so that the next step reuses its pages; True if the C library accepts it.

    By default glibc returns every large tensor to the kernel when it is freed. A training step on the CPU then
    spends a tenth of its time and more on faulting the same pages in again. The process keeps its peak memory.
    """
    return _mallopt({MMAP_MAX: 0, TRIM_THRESHOLD: LARGEST})


def return_freed_memory() -> bool:
    """Restores glibc's behaviour: large blocks return to the kernel when they are freed."""
    return _mallopt({MMAP_MAX: 65536, MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20})


def _mallopt(options: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    accepted = mallopt is not None and all(mallopt(key, value) == 1 for key, value in options.items())
    if not accepted:
        log.info("This C library's allocator cannot be tuned; steps on the CPU are up to a tenth slower.")
    return accepted
