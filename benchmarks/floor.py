"""What a step cannot go below here: its own matrix products and nothing else, replayed by the same kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward, aten.linear}
ATTENTION = "_scaled_dot_product"  # what the names of its fused kernels begin with


class Recorder(TorchDispatchMode):
    """The matrix products of what runs under it, as calls on empty arguments of the same shapes and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket in PRODUCTS or func.overloadpacket.__name__.startswith(ATTENTION):
            outline = tree_map_only(Tensor, Outline, (args, kwargs or {}))
            self.calls.append((func, *outline))
        return func(*args, **(kwargs or {}))


class Outline:
    """All of a tensor but its numbers."""

    def __init__(self, x: Tensor):
        self.size, self.stride, self.dtype, self.device = x.size(), x.stride(), x.dtype, x.device

    def filled(self, pools: dict[torch.dtype, Tensor]) -> Tensor:
        """A view of its dtype's pool of numbers, which grows where it is too small."""
        wanted = 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if self.dtype not in pools or pools[self.dtype].numel() < wanted:
            pools[self.dtype] = torch.randn(wanted, device=self.device).to(self.dtype)
        return pools[self.dtype].as_strided(self.size, self.stride)


def products(step: Callable[[], object]) -> Callable[[], None]:
    """Only the matrix products of a step, attention's among them, forward and backward."""
    with Recorder() as recorder:
        step()
    pools: dict[torch.dtype, Tensor] = {}
    for _ in range(2):  # a pool that has grown is another tensor: the second time all views are of the last ones
        calls = [tree_map_only(Outline, lambda o: o.filled(pools), call) for call in recorder.calls]

    def run() -> None:
        with torch.no_grad():
            for func, args, kwargs in calls:
                func(*args, **kwargs)

    return run
