"""How a model computes its numbers: what is compiled, and what backward recomputes."""

import logging
import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn

from mae import device as devices
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.models.layers import (
    ON_GPU_ONLY,
    Checkpointing,
    Kernel,
    attention_backend,
    blocks_of,
    set_attention_kernel,
    set_checkpointing,
    set_residual_dtype,
)
from mae.models.recompute import TILES
from mae.perf.graphs import compile_blocks, compile_whole, is_compiled, uncompile
from mae.perf.micro_batch import Search, Trial
from mae.runs import environment

log = logging.getLogger(__name__)

Level = Literal["blocks", "model", "graphs"]
COMPILED = {"blocks": "the blocks", "model": "the whole model", "graphs": "the whole model for CUDA graphs"}
TRIALS = {None: 1, "reduce-overhead": 3}  # a CUDA graph warms up first, is recorded next, and then replayed
WORTH_THE_WAIT = 384  # width of a block: on a CPU narrower ones gain less than a minute of compilation costs


def accelerate(
    run: Path,
    ranks: Ranks,
    trial: Trial,
    model: nn.Module,
    *,
    compile: Literal["auto", "off", "blocks", "model", "graphs"],
    checkpointing: Checkpointing,
    attention_kernel: Literal["auto"] | Kernel,
    residual_dtype: Literal["float32", "bf16"],
    micro_batch_size: Annotated[int, "[1, inf)"] | Literal["auto"] | None,
) -> int | None:
    """Sets how `model` computes; returns the size of a micro-batch, None for a device's whole share.

    `graphs` also replays the model as a CUDA graph. The size is found before, so that each graph is compiled at the
    size of the run.
    """
    set_checkpointing(model, checkpointing)
    if attention_kernel in ON_GPU_ONLY and ranks.device.type != "cuda":
        raise UserError(f"task.attention_kernel={attention_kernel} needs a GPU: use auto with device=cpu.")
    set_attention_kernel(model, attention_kernel)
    with trial.autocast():
        backend = attention_backend(model, ranks.device, trial.num_tokens())
    log.info("attention is computed by: %s", backend)
    if residual_dtype == "bf16":
        if half_format(trial) is not torch.bfloat16:
            raise UserError(
                "task.residual_dtype=bf16 needs task.precision=bf16, and on this device task.precision="
                f"{trial.cfg.task.precision} is another: use task.residual_dtype=float32."
            )
        set_residual_dtype(model, torch.bfloat16)
    if ranks.main:
        environment.add(run, attention=backend)
    search = Search(run, ranks, trial) if micro_batch_size == "auto" else None
    size = search.run() if search else micro_batch_size
    level = automatic(ranks, trial, model) if compile == "auto" else None if compile == "off" else compile
    if level is not None:
        assert size != "auto"
        size = compile_at(size, search, ranks, trial, model, level)
    if search:
        assert isinstance(size, int)
        search.store(size)
    assert size != "auto"
    return size


def automatic(ranks: Ranks, trial: Trial, model: nn.Module) -> Level | None:
    """What `task.compile=auto` compiles: on CUDA the whole model, or blocks where weights are sharded by block.

    On a CPU it needs a C++ compiler and a wait, for a gain that only processors with AMX show, in half precision
    (docs/speed.md).
    """
    if ranks.device.type == "cuda":
        return "blocks" if ranks.sharded else "model"
    wide = blocks_of(model)[0].norm1.weight.numel() >= WORTH_THE_WAIT
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return "blocks" if ranks.device.type == "cpu" and TILES and half_format(trial) and wide and compiler else None


def half_format(trial: Trial) -> torch.dtype | None:
    """The half precision of a trial's autocast; None without it."""
    with trial.autocast():
        kind = trial.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def compile_at(
    size: int | None, search: Search | None, ranks: Ranks, trial: Trial, model: nn.Module, level: Level
) -> int | None:
    """Compiles `model` and runs steps of `size` images; returns the size.

    Where that does not fit after all, the next smaller size of the search is compiled. Where compilation fails on any
    rank, a warning says why, and on all ranks the model gives way to blocks, and those stay uncompiled.
    """
    from torch._dynamo.utils import counters  # seconds to import

    began, graphs = time.perf_counter(), counters["stats"]["unique_graphs"]
    torch.compiler.set_stance("default")
    images = size or trial.cfg.task.batch_size // ranks.world
    mode = "reduce-overhead" if level == "graphs" else None
    log.info("compiling %s: this takes up to minutes (task.compile=off does without)", COMPILED[level])
    compile_level(level, mode, ranks, trial, model)
    while failures := _failures(ranks, trial, images, TRIALS[mode]):
        if search is not None and all(failure.memory for failure in failures):
            size = images = search.next_smaller(images)
            continue
        uncompile(trial.task, model, trial.task.compiled)
        outcome = "is switched off" if level == "blocks" else "gives way to blocks"
        log.warning("task.compile=%s %s: compiling %s failed (%s)", level, outcome, COMPILED[level], failures[0].reason)
        if level == "blocks":
            return size
        level = "blocks"
        compile_level(level, mode, ranks, trial, model)
    seconds, count = time.perf_counter() - began, counters["stats"]["unique_graphs"] - graphs
    log.info("compiled %d graphs in %.1f s, for %d images at a time", count, seconds, images)
    return size


def compile_level(level: Level, mode: str | None, ranks: Ranks, trial: Trial, model: nn.Module) -> None:
    """Marks what is compiled at its first call."""
    if level == "blocks":
        compile_blocks(model, mode)
    else:
        compile_whole(trial.task, model, trial.task.compiled, mode, cut=ranks.world > 1 and not ranks.sharded)


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
    if not is_compiled(model):
        return nullcontext()  # the compiler takes seconds to import
    return torch.compiler.set_stance("eager_on_recompile")
