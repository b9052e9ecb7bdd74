"""What the checks of the acceptance suite share: `pytest -m gpu`; docs/gpu.md lists the checks.

`MAE_GPU_SUITE_DEVICE=cpu` executes the body of each check on the CPU, as far as it has a meaning there. The suite
itself is then known to work before it meets a GPU.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products; cuBLAS reads it at its start

import pytest  # noqa: E402
import torch  # noqa: E402
from conftest import TINY, TINY_PRETRAIN, run_here  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mae.runs import files  # noqa: E402

DEVICE = os.environ.get("MAE_GPU_SUITE_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
AUTO = "cuda" if ON_GPU else "auto"  # on a CPU, for what rules refuse with device=cpu
GPUS = torch.cuda.device_count() if ON_GPU else 0
RANKS = 1 << (min(GPUS, 8).bit_length() - 1) if GPUS > 1 else 2  # a power of two, which divides the batches here

SMALL = [*TINY, f"device={DEVICE}"]
PLAIN = "task.compile=off"  # a run on CUDA compiles, which takes longer than its steps here
SMALL_PRETRAIN = [*TINY_PRETRAIN, f"device={DEVICE}", PLAIN]
LARGE = ["model=vit_base", "data.img_size=224", "data.fraction=1", "task.batch_size=512", "task.precision=auto"]


def needs_gpus(count: int) -> pytest.MarkDecorator:
    """Skips a check where there are fewer GPUs, unless the suite runs on the CPU."""
    reason = f"needs {count} GPU{'s' * (count > 1)}, and {GPUS} are here; MAE_GPU_SUITE_DEVICE=cpu runs it on the CPU"
    return pytest.mark.skipif(ON_GPU and count > GPUS, reason=reason)


def gpu_alone(reason: str) -> pytest.MarkDecorator:
    """Skips a check on the CPU, where it has no meaning."""
    return pytest.mark.skipif(not ON_GPU, reason=f"on a CPU: {reason}")


SUITE = [pytest.mark.gpu, needs_gpus(1)]


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """Leaves torch's global settings, dynamo and the GPU's memory as a check met them."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many graphs dynamo has traced in this check.

    On a CPU what it traced runs without inductor, which would take a minute; tests/test_compile.py has that.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    if not ON_GPU:
        compiled, ours = torch.compile, {"backend": "eager", "mode": None}
        monkeypatch.setattr(torch, "compile", lambda *model, **how: compiled(*model, **how | ours))
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def lines(run: Path) -> list[dict[str, float]]:
    """The training and validation lines of metrics.jsonl."""
    rows = files.read_json_lines(run / "metrics.jsonl")
    return [row for row in rows if "loss" in row or "val/loss" in row]


def losses(run: Path) -> list[float]:
    """All training and validation losses, in order."""
    return [row["loss" if "loss" in row else "val/loss"] for row in lines(run)]


def trained(run: Path, *overrides: str) -> list[float]:
    """The losses of a whole run in this process."""
    assert run_here(run, *overrides) == 0
    return losses(run)


def distance(actual: Tensor, expected: Tensor) -> float:
    """The norm of a difference, as a share of the norm of what is expected."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return float((actual - expected).norm() / expected.norm())


def gradient(model: nn.Module) -> Tensor:
    """All gradients of a model as one vector on the host."""
    return torch.cat([p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None])


def leave_free(gigabytes: float) -> Tensor:
    """Takes the memory of the GPU but for so many gigabytes, until the result is freed."""
    free = torch.cuda.mem_get_info()[0]
    return torch.empty(max(0, free - int(gigabytes * 1e9)), dtype=torch.uint8, device="cuda")


def held_memory() -> int:
    """Bytes that torch has reserved on the GPU; on a CPU those of this process that are in memory."""
    if ON_GPU:
        return torch.cuda.memory_reserved()
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmRSS")))
