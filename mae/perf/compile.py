"""How a model computes its numbers: compiled blocks, and what backward recomputes.

Compilation by block: one small graph serves all blocks of a width, so that a ViT-H compiles as fast as a ViT-B.
"""

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from mae.models.layers import Block, blocks_of, set_attention_kernel, set_checkpointing

log = logging.getLogger(__name__)

VARIANTS = 64  # graphs of one block: training and validation, encoder and decoder, with drop path and without
TRIALS = {None: 1, "reduce-overhead": 3}  # a CUDA graph warms up first, is recorded next, and then replayed


def accelerate(
    model: nn.Module,
    device: torch.device,
    trial: Callable[[], object],
    *,
    compile: Literal["auto", "off", "blocks", "graphs"],
    checkpointing: Literal["none", "light", "blocks"],
    attention_kernel: Literal["auto", "plain", "fused"],
) -> None:
    """Sets what the blocks of `model` recompute in backward, their attention kernel, and compiles them.

    `auto` compiles on CUDA alone: on a CPU it needs a C++ compiler and a wait, for a gain that only processors with
    AMX show (docs/speed.md). `graphs` also replays each block as a CUDA graph. `trial` runs a step; if it fails, a
    warning says so and the blocks stay uncompiled.
    """
    set_checkpointing(model, checkpointing)
    set_attention_kernel(model, attention_kernel)
    if compile == "off" or (compile == "auto" and device.type != "cuda"):
        return
    mode = "reduce-overhead" if compile == "graphs" else None
    compile_blocks(model, mode)
    try:
        for _ in range(TRIALS[mode]):
            trial()
    except Exception as error:  # whatever a compiler of another vendor raises
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        log.warning("task.compile=%s is switched off: compiling the blocks failed (%s)", compile, reason)
        plain_blocks(model)


def compile_blocks(model: nn.Module, mode: str | None) -> None:
    """Compiles every block in place; names in the state dict stay."""
    from torch._dynamo import config as settings  # seconds to import

    settings.recompile_limit = max(settings.recompile_limit, VARIANTS)
    settings.optimize_ddp = False  # which cuts graphs at DDP's buckets; a block is small enough
    blocks = blocks_of(model)
    for block in blocks:
        block.compile(mode=mode, dynamic=False)
    if mode is not None:
        mark_first(blocks[0])


def mark_first(block: Block) -> None:
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
