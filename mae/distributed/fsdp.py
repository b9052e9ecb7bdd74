"""Weights, gradients and optimizer states sharded over ranks (FSDP2); whole for checkpoints and validation."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from mae.models.layers import blocks_of

State = TypeVar("State")
NO_COPY = ".*copying from a non-meta parameter"  # torch's warning where weights are loaded into `meta`
_on_meta: ContextVar[bool] = ContextVar("on_meta", default=False)


@contextmanager
def without_memory(active: bool) -> Iterator[None]:
    """Within, where `active`, new modules get parameters on the `meta` device, which `shard` fills from rank 0."""
    if not active:
        yield
        return
    hook = register_module_parameter_registration_hook(_to_meta)  # pyright: ignore[reportArgumentType]  # torch's types
    token = _on_meta.set(True)
    try:
        yield
    finally:
        hook.remove()
        _on_meta.reset(token)


@contextmanager
def with_memory() -> Iterator[None]:
    """Within `without_memory`: new modules get memory all the same, since `shard` does not reach them."""
    token = _on_meta.set(False)
    try:
        yield
    finally:
        _on_meta.reset(token)


@contextmanager
def loading_nowhere() -> Iterator[None]:
    """Within, weights are loaded into parameters on `meta` without torch's warning: names and shapes alone are
    checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NO_COPY, UserWarning)
        yield


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """What a module registers instead of a parameter; None for the parameter itself."""
    if parameter is None or not _on_meta.get():
        return None
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def gathers_half(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether blocks gather weights in half precision. A CPU's layer norm takes no other weights than its input's."""
    return dtype.itemsize == 2 and device.type != "cpu"


def shard(task: nn.Module, device: torch.device, dtype: torch.dtype, ranks: int) -> None:
    """Shards the weights block by block over `ranks` neighbouring ranks, in place: parameters become DTensors.

    Their values are those of rank 0, where the task has all its weights on the host; elsewhere they may be on `meta`.
    A device holds no more than its shards and one whole block at a time.

    Further ranks hold copies of the shards. With a half `dtype` blocks gather their weights in it and reduce gradients
    in float32. What lies outside blocks is small, and images and losses want float32 there.
    """
    copies = dist.get_world_size() // ranks
    shape, names = ((copies, ranks), ("copies", "shards")) if copies > 1 else ((ranks,), ("shards",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy()
    if gathers_half(dtype, device):
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    in_blocks: set[nn.Module] = set()
    for block in blocks_of(task):
        in_blocks.update(block.modules())
        fill(block.modules(), device)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fill([module for module in task.modules() if module not in in_blocks], device)
    fully_shard(task, mesh=mesh)
    for stack in task.modules():
        blocks = stack if isinstance(stack, nn.ModuleList | nn.Sequential) else ()
        for block, following in pairwise(blocks):
            if isinstance(block, FSDPModule) and isinstance(following, FSDPModule):
                block.set_modules_to_forward_prefetch([following])


def fill(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Moves the modules' own parameters and buffers to the device, with the values that they have on rank 0."""

    def filled(tensor: Tensor) -> Tensor:
        own = torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor.to(device)
        own = own.contiguous()
        dist.broadcast(own, 0)
        return own

    for module in modules:
        module._apply(filled, recurse=False)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Within, every rank holds all weights: ranks may call it a different number of times, or one alone."""
    shards = [child for child in module.modules() if isinstance(child, FSDPModule)]
    for child in shards:
        child.set_reshard_after_forward(False, recurse=False)
        child.unshard()
    try:
        yield
    finally:
        for child in shards:
            child.reshard()
            child.set_reshard_after_forward(child is not module, recurse=False)  # fully_shard's default
        forget_order(module)


@contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """Within, every rank holds all weights and its own gradients: passes forward and backward exchange nothing."""
    sharded = isinstance(module, FSDPModule)
    with whole(module):
        if sharded:
            module.set_requires_gradient_sync(False)
            module.set_reshard_after_backward(False)
        try:
            yield
        finally:
            module.zero_grad(set_to_none=True)  # of the whole weights, which the shards do not own
            if sharded:
                module.set_requires_gradient_sync(True)
                module.set_reshard_after_backward(True)


def reshard(module: nn.Module) -> None:
    """Returns to shards after a pass without gradients, which leaves the root's weights whole on every rank."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()
    forget_order(module)


def forget_order(module: nn.Module) -> None:
    """Makes the next backward pass prefetch weights in the order of its own forward pass alone.

    torch also records the order of passes without gradients, and prefetches by it. Ranks that validate differently
    would then prefetch different weights and wait for each other for ever.
    """
    if isinstance(module, FSDPModule):
        order = getattr(module._get_fsdp_state()._comm_ctx, "post_forward_order", None)
        if order is not None:  # it has run
            order.clear()


def unsharded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict that every rank holds whole, such as buffers."""
    return {name: tensor for name, tensor in state.items() if not isinstance(tensor, DTensor)}


def gathered(tree: State) -> State:
    """The same nested state with whole tensors instead of a rank's shards; every rank must call."""
    return _map_sharded(tree, DTensor.full_tensor)


def on_host(tree: State, main: bool) -> State:
    """As `gathered`, for a checkpoint: whole tensors on the host where `main`, None elsewhere; every rank must call.

    One tensor after another, so that no device holds more than one whole tensor beside its shards.
    """

    def to_host(sharded: DTensor) -> Tensor | None:
        tensor = sharded.full_tensor()
        return tensor.cpu() if main else None

    return _map_sharded(tree, to_host)


def _map_sharded(tree: Any, function: Callable[[DTensor], Tensor | None]) -> Any:
    """A nested state with `function` applied to each sharded tensor."""
    if isinstance(tree, DTensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: _map_sharded(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map_sharded(value, function) for value in tree)
    return tree


def local_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This rank's shards of a whole optimizer state: each tensor is laid out as its weight is."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        number: {name: laid_out(value, weights[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": states}


def laid_out(value: State, weight: Tensor) -> State | Tensor:
    """A whole tensor of a weight's shape as this rank's shard of it; any other value unchanged."""
    if isinstance(weight, DTensor) and isinstance(value, Tensor) and value.shape == weight.shape:
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
    return value


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads whole weights, into shards where the module is sharded; every rank must call."""
    module.load_state_dict({name: laid_out(weights[name], own) for name, own in module.state_dict().items()})


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, in the same memory; a whole tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def replicated_like(value: Tensor, weights: list[nn.Parameter]) -> Tensor:
    """A number that is equal on every rank, as a DTensor where the weights are: operations do not mix the two."""
    if weights and isinstance(weights[0], DTensor):
        mesh = weights[0].device_mesh
        return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return value
