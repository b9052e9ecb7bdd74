"""Memory that autograd holds between forward and backward."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def saved_for_backward(weights: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd saves within, except the storages of `weights`.

    Works on `meta` too, where nothing has an address.
    """
    own = {weight.untyped_storage()._cdata for weight in weights}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # so that no later storage gets the same number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
