"""How a model computes its numbers: compiled blocks, and what backward recomputes.

Compilation by block: one small graph serves all blocks of a width, so that a ViT-H compiles as fast as a ViT-B.
"""

import logging
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn

from mae import device as devices
from mae import limits
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.models.layers import (
    ON_GPU_ONLY,
    BlockBase,
    Checkpointing,
    Kernel,
    attention_backend,
    blocks_of,
    set_attention_kernel,
    set_checkpointing,
)
from mae.perf.micro_batch import Search, Trial
from mae.runs import environment

log = logging.getLogger(__name__)

VARIANTS = 64  # graphs of one block: training and validation, encoder and decoder, with drop path and without
TRIALS = {None: 1, "reduce-overhead": 3}  # a CUDA graph warms up first, is recorded next, and then replayed


def accelerate(
    run: Path,
    ranks: Ranks,
    trial: Trial,
    model: nn.Module,
    *,
    compile: Literal["auto", "off", "blocks", "graphs"],
    checkpointing: Checkpointing,
    attention_kernel: Literal["auto"] | Kernel,
    micro_batch_size: Annotated[int, "[1, inf)"] | Literal["auto"] | None,
) -> int | None:
    """Sets how the blocks of `model` compute; returns the size of a micro-batch, None for a device's whole share.

    `compile=auto` compiles on CUDA alone: on a CPU it needs a C++ compiler and a wait, for a gain that only processors
    with AMX show (docs/speed.md). `graphs` also replays each block as a CUDA graph. The size is found before, so that
    each graph is compiled at the size of the run.
    """
    set_checkpointing(model, checkpointing)
    if attention_kernel in ON_GPU_ONLY and ranks.device.type != "cuda":
        raise UserError(f"task.attention_kernel={attention_kernel} needs a GPU: use auto with device=cpu.")
    set_attention_kernel(model, attention_kernel)
    with trial.autocast():
        backend = attention_backend(model, ranks.device, trial.num_tokens())
    log.info("attention is computed by: %s", backend)
    if ranks.main:
        environment.add(run, attention=backend)
    search = Search(run, ranks, trial) if micro_batch_size == "auto" else None
    size = search.run() if search else micro_batch_size
    if compile != "off" and (compile != "auto" or ranks.device.type == "cuda"):
        assert size != "auto"
        size = compile_at(size, search, ranks, trial, model, compile)
    if search:
        assert isinstance(size, int)
        search.store(size)
    assert size != "auto"
    return size


def compile_at(
    size: int | None, search: Search | None, ranks: Ranks, trial: Trial, model: nn.Module, compile: str
) -> int | None:
    """Compiles the blocks and runs steps of `size` images; returns the size.

    Where that does not fit after all, the next smaller size of the search is compiled. Where compilation fails on any
    rank, a warning says why, and the blocks stay uncompiled on all.
    """
    from torch._dynamo.utils import counters  # seconds to import

    began, graphs = time.perf_counter(), counters["stats"]["unique_graphs"]
    mode = "reduce-overhead" if compile == "graphs" else None
    torch.compiler.set_stance("default")
    compile_blocks(model, mode)
    images = size or trial.cfg.task.batch_size // ranks.world
    while failures := _failures(ranks, trial, images, TRIALS[mode]):
        if search is None or not all(failure.memory for failure in failures):
            reason = failures[0].reason
            log.warning("task.compile=%s is switched off: compiling the blocks failed (%s)", compile, reason)
            plain_blocks(model)
            return size
        size = images = search.next_smaller(images)
    seconds, count = time.perf_counter() - began, counters["stats"]["unique_graphs"] - graphs
    log.info("compiled %d graphs in %.1f s, for %d images at a time", count, seconds, images)
    return size


@dataclass(frozen=True)
class Failure:
    """Why a trial of compiled blocks failed on a rank."""

    reason: str
    memory: bool  # too little of it


def _failures(ranks: Ranks, trial: Trial, images: int, times: int) -> list[Failure]:
    """The failures of all ranks, on every rank, when each runs `times` steps; empty where all pass."""
    failure = None
    try:
        for ratio in trial.ratios():
            for _ in range(times):
                trial.step(images, ratio)
    except Exception as error:  # any type: compilers of other vendors raise their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        failure = Failure(reason, devices.out_of_memory(error))
    devices.release(ranks.device)
    return [failure for failure in ranks.gather(failure) if failure is not None]


def no_recompilation(model: nn.Module) -> AbstractContextManager[object]:
    """Within, what has no graph yet runs uncompiled: a short last batch, pictures, k-NN, further mask ratios."""
    if all(block._compiled_call_impl is None for block in blocks_of(model)):
        return nullcontext()  # the compiler takes seconds to import
    return torch.compiler.set_stance("eager_on_recompile")


def compile_blocks(model: nn.Module, mode: str | None) -> None:
    """Compiles every block in place; names in the state dict stay."""
    from torch._dynamo import config as settings  # seconds to import
    from torch._inductor import config as inductor

    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:  # inductor starts up to 32 workers in each rank
        inductor.compile_threads = max(1, min(inductor.compile_threads or 1, limits.cpus() // ranks_here))
    settings.recompile_limit = max(settings.recompile_limit, VARIANTS)
    settings.optimize_ddp = False  # which cuts graphs at DDP's buckets; a block is small enough
    blocks = blocks_of(model)
    for block in blocks:
        block.compile(mode=mode, dynamic=False)
    if mode is not None:
        mark_first(blocks[0])


def mark_first(block: BlockBase) -> None:
    """Tells CUDA graphs that a pass through the model starts at `block`, its first.

    Otherwise each block's call would start one, and in a pass without gradients overwrite its own input. A hook of the
    model does not do: features and pictures bypass its `forward`. A hook of the block would be compiled.
    """
    compiled = block._compiled_call_impl
    assert compiled is not None

    def marked(*args: object, **kwargs: object) -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args, **kwargs)

    block._compiled_call_impl = marked


def plain_blocks(model: nn.Module) -> None:
    """Undoes `compile_blocks`."""
    for block in blocks_of(model):
        block._compiled_call_impl = None  # set by nn.Module.compile, which torch cannot undo
