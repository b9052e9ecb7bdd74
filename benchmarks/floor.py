"""The lower bound of a step on this machine: its matrix products alone, replayed by the same kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward, aten.linear}
ATTENTION = "_scaled_dot_product"  # what the names of its fused kernels begin with


class Recorder(TorchDispatchMode):
    """The matrix products of what runs under it, as calls on empty arguments of the same shapes and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., object], tuple, dict]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket in PRODUCTS or func.overloadpacket.__name__.startswith(ATTENTION):
            outline = tree_map_only(Tensor, Outline, (args, kwargs or {}))
            self.calls.append((func, *outline))
        return func(*args, **(kwargs or {}))


class Outline:
    """All of a tensor but its numbers."""

    def __init__(self, x: Tensor):
        self.size, self.stride, self.dtype, self.device = x.size(), x.stride(), x.dtype, x.device

    @property
    def span(self) -> int:
        """From its first number in memory to its last."""
        return 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))


def products(step: Callable[[], object]) -> Callable[[], None]:
    """Only the matrix products of a step, attention's among them, forward and backward."""
    with Recorder() as recorder:
        step()
    outlines = [x for x in tree_leaves(recorder.calls) if isinstance(x, Outline)]
    pools = {}  # dtype -> numbers, of which all arguments are views
    for widest in {x.dtype: x for x in sorted(outlines, key=lambda x: x.span)}.values():
        pools[widest.dtype] = torch.randn(widest.span, device=widest.device).to(widest.dtype)
    calls = tree_map_only(Outline, lambda o: pools[o.dtype].as_strided(o.size, o.stride), recorder.calls)

    def run() -> None:
        with torch.no_grad():
            for func, args, kwargs in calls:
                func(*args, **kwargs)

    return run
