"""Weights, gradients and optimizer states spread over ranks (FSDP2), whole again for checkpoints and validation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from mae.models.layers import blocks_of


def shard(task: nn.Module, where: torch.device) -> nn.Module:
    """Spreads the weights over all ranks, a block at a time; the same module, its parameters now DTensors."""
    mesh = init_device_mesh(where.type, (dist.get_world_size(),))  # by itself torch takes a GPU where there is one
    for block in blocks_of(task):
        fully_shard(block, mesh=mesh)
    fully_shard(task, mesh=mesh)
    return task


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """All weights on every rank for a while: ranks may then run it a different number of times, or one alone."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not module, recurse=False)  # as `fully_shard` chooses it
        forget_order(module)


def forget_order(module: nn.Module) -> None:
    """Lets the next backward pass gather weights in the order of its own forward pass alone.

    torch notes the order of passes without gradients too, and backward would gather ahead what came last in them: of
    ranks that validate differently each something else, and all would wait for ever.
    """
    if isinstance(module, FSDPModule):
        order = getattr(module._get_fsdp_state()._comm_ctx, "post_forward_order", None)
        if order is not None:  # it has run
            order.clear()


def gathered(tree: Any) -> Any:
    """The same nested state with whole tensors instead of a rank's shards; every rank must call."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, Mapping):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value) for value in tree)
    return tree


def on_host(tree: Any, main: bool) -> Any:
    """As `gathered`, for a checkpoint: whole tensors on the host where `main`, None elsewhere; every rank must call.

    One tensor after another, so that no device holds more than one whole tensor beside its shards.
    """
    if isinstance(tree, DTensor):
        tensor = tree.full_tensor()
        return tensor.cpu() if main else None
    if isinstance(tree, Mapping):
        return {key: on_host(value, main) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(on_host(value, main) for value in tree)
    return tree


def spread(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole optimizer state as this rank holds it: each tensor laid out as the weight that it belongs to."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    made = {
        number: {name: laid_out(value, weights[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": made}


def laid_out(value: Any, weight: Tensor) -> Any:
    """A whole tensor of a weight's shape as this rank holds the weight; anything else as it is."""
    if isinstance(weight, DTensor) and isinstance(value, Tensor) and value.shape == weight.shape:
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
    return value


def load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Takes up whole weights, into shards where the module's are spread; every rank must call."""
    module.load_state_dict({name: laid_out(weights[name], own) for name, own in module.state_dict().items()})


def held(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def beside(value: Tensor, weights: list[nn.Parameter]) -> Tensor:
    """A number that every rank has, in the form in which it can meet `weights` in one operation."""
    if weights and isinstance(weights[0], DTensor):
        mesh = weights[0].device_mesh
        return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return value
