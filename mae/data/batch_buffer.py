"""Tensors of a batch that are filled sample by sample, images by resizing straight into them."""

import math

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Stack:
    """Samples of one shape and type as one tensor (count, ...), made like the first sample that is put.

    The colours of a pixel lie side by side in memory where they do so in the images (C, H, W), as decoding and resizing
    leave them. Separating them would cost as much as reading the file. In a worker process the memory is shared.
    """

    def __init__(self, count: int):
        self.count = count
        self.tensor: Tensor | None = None  # (count, ...)

    def row(self, number: int) -> Tensor | None:
        """The memory of a sample, for whoever can write there; None as long as its shape is not known."""
        return None if self.tensor is None else self.tensor[number]

    def put(self, number: int, sample: Tensor) -> None:
        """Copies a sample to its row, unless it was written there."""
        if self.tensor is None:
            if sample.ndim == 3 and sample.stride(0) == 1:
                channels, height, width = sample.shape
                self.tensor = _empty((self.count, height, width, channels), sample.dtype).permute(0, 3, 1, 2)
            else:
                self.tensor = _empty((self.count, *sample.shape), sample.dtype)
        row = self.tensor[number]
        if sample.data_ptr() != row.data_ptr():
            row.numpy()[...] = sample.numpy()  # by numpy, for torch would start a team of threads in each thread


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    shared = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # as default_collate does
    return torch.empty(0, dtype=dtype).set_(shared, 0, shape)  # type: ignore[call-overload]
