"""What a compiler turns into graphs: the blocks of a model one by one, or a whole forward pass with its loss.

Compilation by block: one small graph serves all blocks of a width, so that a ViT-H compiles as fast as a ViT-B. A whole
pass is one graph of everything, which fuses norms with the residual sums before them, and what lies outside blocks.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mae import limits
from mae.models.layers import blocks_of

VARIANTS = 64  # graphs of one block: training and validation, encoder and decoder, with drop path and without
DDP_BUCKET = 25 * 2**20  # bytes, DDP's default

Call = Callable[..., Any]  # any forward pass


def prepare_compiler() -> None:
    """Sets what all graphs of this process share."""
    from torch._dynamo import config as settings  # seconds to import
    from torch._inductor import config as inductor

    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:  # inductor starts up to 32 workers in each rank
        inductor.compile_threads = max(1, min(inductor.compile_threads or 1, limits.cpus() // ranks_here))
    settings.recompile_limit = max(settings.recompile_limit, VARIANTS)
    settings.optimize_ddp = False  # blocks are small enough, and a whole pass is cut by its own backend


def compile_blocks(model: nn.Module, mode: str | None) -> None:
    """Compiles every block in place; names in the state dict stay."""
    prepare_compiler()
    blocks = blocks_of(model)
    for block in blocks:
        block.compile(mode=mode, dynamic=False)
    if mode is not None:
        mark_first(blocks[0])


def compile_whole(task: nn.Module, model: nn.Module, methods: tuple[str, ...], mode: str | None, cut: bool) -> None:
    """Compiles each call of `model`, and `methods` of `task`, as one graph, in place; names in the state dict stay.

    With `cut` the graph is cut at the buckets in which data parallel exchanges gradients. Otherwise all gradients would
    come at once, at the end of the backward pass, and no exchange would run beside it.
    """
    prepare_compiler()
    how: dict[str, Any] = {"backend": cut_at_buckets(mode)} if cut else {"mode": mode}
    model.compile(fullgraph=True, dynamic=False, **how)
    for name in methods:
        setattr(task, name, torch.compile(getattr(task, name), fullgraph=True, dynamic=False, **how))
    if mode is not None:
        assert model._compiled_call_impl is not None
        model._compiled_call_impl = copied(model._compiled_call_impl)
        for name in methods:
            setattr(task, name, copied(getattr(task, name)))


def cut_at_buckets(mode: str | None) -> Call:
    """Inductor, behind torch's cutter of graphs for data parallel.

    Dynamo applies that cutter by itself inside DDP alone, and the trial step comes before DDP is there.
    """
    from torch._dynamo.backends.distributed import DDPOptimizer
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    inductor: Any = functools.partial(compile_fx, config_patches=list_mode_options(mode) if mode else None)
    return DDPOptimizer(DDP_BUCKET, inductor).compile_fn


def mark_first(block: nn.Module) -> None:
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


def copied(compiled: Call) -> Call:
    """A whole pass that starts a CUDA graph anew, with copies of its outputs: the next replay overwrites them."""

    def call(*args: object, **kwargs: object) -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return pytree.tree_map_only(Tensor, Tensor.clone, compiled(*args, **kwargs))

    return call


def is_compiled(model: nn.Module) -> bool:
    """Whether a model or any of its blocks is compiled."""
    return any(module._compiled_call_impl is not None for module in (model, *blocks_of(model)))


def uncompile(task: nn.Module, model: nn.Module, methods: tuple[str, ...]) -> None:
    """Undoes `compile_blocks` and `compile_whole`."""
    for module in (model, *blocks_of(model)):
        module._compiled_call_impl = None  # set by nn.Module.compile, which torch cannot undo
    for name in methods:
        vars(task).pop(name, None)
