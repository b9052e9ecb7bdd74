"""How a model computes, not what: compiled blocks, and what backward computes again.

Compilation by block: one small graph serves all blocks of a width, so that a ViT-H compiles as fast as a ViT-B.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from mae.models.layers import blocks_of, set_attention_kernel, set_checkpointing

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
    """Sets what the blocks of `model` compute again in backward and how they attend, and compiles them where asked.

    `auto` compiles on CUDA alone: on a CPU it wants a C++ compiler and a wait, for a gain that only processors with
    AMX show (docs/speed.md). `graphs` also replays each block as a CUDA graph. `trial` takes a forward and backward
    pass and one without gradients; where that fails once compiled, the blocks go back to what they were, with a
    warning.
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
    from torch import _dynamo  # seconds to import

    settings: Any = _dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, VARIANTS)
    settings.optimize_ddp = False  # which cuts graphs at DDP's buckets; a block is small enough
    blocks = blocks_of(model)
    for block in blocks:
        block.compile(mode=mode, dynamic=False)
    if mode is not None:
        begin_with(blocks[0])


def begin_with(block: Any) -> None:
    """Tells CUDA graphs that a pass through the model begins where `block`, its first, is called.

    Without, each block's call would begin one, and where nothing is kept for backward overwrite its own input. Not a
    hook of the model: features and pictures are computed past its `forward`; nor of the block: it would be compiled.
    """
    compiled = block._compiled_call_impl

    def begun(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args, **kwargs)

    block._compiled_call_impl = begun


def plain_blocks(model: nn.Module) -> None:
    """Takes `compile_blocks` back."""
    for block in blocks_of(model):
        block._compiled_call_impl = None  # what nn.Module.compile sets; torch has no way back of its own
