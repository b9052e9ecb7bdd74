"""Looks at every operation of a step, forward and backward, for the first value that is not finite."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from mae import checkpoint
from mae.device import Batch, Sender
from mae.distributed.fsdp import alone
from mae.tracking.norms import block_name
from mae.training import Training

UNFILLED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "resize_")  # memory as it was
CONSTANT = ("cls_token", "mask_token", "pos_embed", "decoder_pos_embed", "loss")  # whose size tells nothing
PARTS = ("task", "model", "live")  # names of a task's network, which a reader need not see


@dataclass
class Finding:
    """What one rank's share of a step shows."""

    phase: str | None = None  # images, forward, backward, norm; None: all values are finite
    module: str = ""  # in which it arose
    operation: str = ""
    weight: str = ""  # the weight that the operation used
    images: list[int] = field(default_factory=list)  # indices of those whose rows are not finite; empty: unknown
    all_images: bool = False  # of the micro-batch
    weights: list[str] = field(default_factory=list)  # which hold a value that is not finite themselves
    gradients: list[str] = field(default_factory=list)  # parameters whose gradient is not finite
    parameters: int = 0
    largest: dict[str, float] = field(default_factory=dict)  # block -> largest magnitude in its forward pass
    loss: float = math.nan

    @property
    def block(self) -> str | None:
        """The block in which the first such value arose."""
        if self.phase in ("forward", "backward"):
            return block_name(self.module or self.weight)
        return None


class Watch(TorchDispatchMode):
    """Within, notes in `finding` the first operation whose result is not finite. It waits for each operation."""

    def __init__(self, task: nn.Module, sample_index: Tensor, finding: Finding):
        super().__init__()
        self.tracker, self.sample_index, self.finding = ModuleTracker(), sample_index, finding
        self.owners = {
            p.untyped_storage().data_ptr(): short(name)
            for name, p in task.named_parameters()
            if not isinstance(p, DTensor)
        }
        self.casts: list[Tensor] = []  # of weights; alive, so that no other tensor gets their memory

    def __enter__(self) -> "Watch":
        self.tracker.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.tracker.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "aten" and name not in UNFILLED:
            results = result if isinstance(result, list | tuple) else [result]
            outputs = [out for out in results if _has_numbers(out)]
            weight = next(filter(None, map(self._owner, _tensors(args))), "")
            if name == "_to_copy" and weight and isinstance(result, Tensor):
                self.owners[result.untyped_storage().data_ptr()] = weight
                self.casts.append(result)
            # attention kernels pad what else they return
            for out in outputs[:1] if "attention" in name else outputs:
                self._look(name, weight, out)
        return result

    def _owner(self, tensor: Tensor) -> str:
        return "" if isinstance(tensor, DTensor) else self.owners.get(tensor.untyped_storage().data_ptr(), "")

    def _look(self, operation: str, weight: str, out: Tensor) -> None:
        finding, backward = self.finding, self.tracker.is_bw
        size = float(torch.linalg.vector_norm(out, math.inf, dtype=torch.promote_types(out.dtype, torch.float32)))
        module = self._module()
        if not backward:
            block = block_name(module or weight or "loss")
            largest = finding.largest.get(block, 0.0)
            if block not in CONSTANT:
                finding.largest[block] = size if math.isnan(size) or math.isnan(largest) else max(size, largest)
        if finding.phase is not None or math.isfinite(size):
            return
        finding.phase, finding.module = "backward" if backward else "forward", module
        finding.operation, finding.weight = operation, weight
        if out.ndim and len(out) == len(self.sample_index):
            rows = ~out.flatten(1).isfinite().all(1) if out.ndim > 1 else ~out.isfinite()
            finding.images, finding.all_images = self.sample_index[rows].tolist(), bool(rows.all())

    def _module(self) -> str:
        """The innermost module that is at work; empty for one that is the task itself."""
        names = [name for name in self.tracker.parents if name != "Global"]
        innermost = max(names, key=lambda name: name.count("."), default="")
        return short(innermost.partition(".")[2])


def _has_numbers(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0 and value.device.type != "meta"


def _tensors(values: object) -> Iterator[Tensor]:
    """The tensors of an operation's arguments."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def short(name: str) -> str:
    """A name in a task as a checkpoint has it: without the names of the networks around it."""
    names = name.split(".")
    while names and names[0] in PARTS:
        names.pop(0)
    return ".".join(names)


@contextmanager
def untouched(t: Training) -> Iterator[None]:
    """Restores gradients, buffers and random states afterwards. Within, blocks run uncompiled: compiled ones hide their
    operations."""
    buffers, state = {name: buffer.clone() for name, buffer in t.task.named_buffers()}, checkpoint.random_state()
    compiled = {module: module._compiled_call_impl for module in t.task.modules() if module._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
        for name, buffer in t.task.named_buffers():
            buffer.copy_(buffers[name])
        t.task.zero_grad(set_to_none=True)
        checkpoint.set_random_state(state)


def examine(t: Training, batches: Sequence[Batch]) -> Finding:
    """Forward and backward passes of this rank's micro-batches with the weights of this moment, which stay.

    Sharded weights are gathered first. Otherwise a rank would see the buffers of the exchange, and the gradients of
    others.
    """
    finding, send = Finding(), Sender(t.ranks.device)
    with untouched(t), alone(t.task):
        finding.weights = [short(name) for name, p in t.task.named_parameters() if not _finite(p)]
        for batch in map(send, batches):
            if not _finite(batch["image"]) and finding.phase is None:
                finding.phase = "images"
                finding.images = batch["index"][~batch["image"].flatten(1).isfinite().all(1)].tolist()
            with Watch(t.task, batch["index"], finding):
                with t.autocast():
                    loss = t.task(batch)["loss"] * batch["weight"]
                t.scaler.scale(loss).backward()
            finding.loss = float(loss.detach())
        parameters = [(name, p.grad) for name, p in t.task.trained.named_parameters() if p.grad is not None]
        finding.parameters = len(parameters)
        finding.gradients = [short(name) for name, gradient in parameters if not _finite(gradient)][::-1]
        norm = nn.utils.get_total_norm([gradient for _, gradient in parameters])
        if finding.phase is None and not _finite(norm):
            finding.phase = "norm"
    return finding


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; of a sharded tensor, those of this rank."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not own.is_floating_point() or bool(own.detach().isfinite().all())
