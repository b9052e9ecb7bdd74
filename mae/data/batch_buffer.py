"""A batch that is filled image by image, by resizing straight into it."""

import math

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Stack:
    """Images (C, H, W) of one size and type as one tensor (count, C, H, W), made like the first one that is put.

    In memory the colours of a pixel lie side by side where they do so in the images, as decoding and resizing leave
    them: to part them would take as long as to read the file. In a worker process it is memory that others share.
    """

    def __init__(self, count: int):
        self.count = count
        self.images: Tensor | None = None  # (count, C, H, W)

    def room(self, number: int) -> Tensor | None:
        """Where an image belongs, (C, H, W), for whoever can write there; None as long as its size is not known."""
        return None if self.images is None else self.images[number]

    def put(self, number: int, image: Tensor) -> None:
        """Takes an image in, unless it is there already."""
        if self.images is None:
            channels, height, width = image.shape
            if image.stride(0) == 1:
                self.images = _empty((self.count, height, width, channels), image.dtype).permute(0, 3, 1, 2)
            else:
                self.images = _empty((self.count, channels, height, width), image.dtype)
        room = self.images[number]
        if image.data_ptr() != room.data_ptr():
            room.numpy()[...] = image.numpy()  # by numpy, for torch would start a team of threads in each thread


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    shared = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # as default_collate does
    return torch.empty(0, dtype=dtype).set_(shared, 0, shape)  # type: ignore[call-overload]
