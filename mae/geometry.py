"""Boxes of images and resizing, on (C, H, W) of any type."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]  # top, left, height, width
Boxed = Callable[[int, int], Box]  # the part that is wanted of an image of such a height and width


def pair(size: int | list[int]) -> tuple[int, int]:
    """A side or [height, width] as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def cut(image: Tensor, box: Box) -> Tensor:
    """What of (C, H, W) lies inside the box."""
    top, left, height, width = box
    return image[:, top : top + height, left : left + width]


def inside(image: Tensor, box: Boxed) -> Tensor:
    """What of (C, H, W) is wanted."""
    return cut(image, box(image.shape[1], image.shape[2]))


def resize(image: Tensor, size: tuple[int, int], out: Tensor | None = None) -> Tensor:
    """(C, H, W) -> (C, *size), bicubic with antialias. 8 bit stays 8 bit throughout, as in Pillow;
    other integers go through float32 and are rounded and clipped. Colours of 8 bit that lie side by side are written
    to `out` where that is laid out alike."""
    if image.shape[1:] == size:
        return image
    if image.dtype == torch.uint8 or image.is_floating_point():
        if image.dtype == torch.uint8 and image.shape[0] in (3, 4):
            # With the colours of a pixel side by side: the same bits, faster. Where no `out` says so, the kernel judges
            # by the strides alone, of which `image[None]` has the wrong one for the batch.
            if out is None or out.dtype != torch.uint8 or out.stride(0) != 1 or out.shape != (len(image), *size):
                out = torch.empty((*size, len(image)), dtype=torch.uint8).permute(2, 0, 1)
            batch = image[None].contiguous(memory_format=torch.channels_last)
            torch.ops.aten._upsample_bicubic2d_aa.out(batch, size, False, None, None, out=out[None])
            return out
        return F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]
    info = torch.iinfo(image.dtype)
    return resize(image.to(torch.float32), size).round_().clamp_(info.min, info.max).to(image.dtype)


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], numbers: list[float]
) -> Box:
    """The box of a random resized crop: up to ten tries at an area and an aspect ratio,
    then the largest centred box within `ratio` (torchvision's RandomResizedCrop; uses 22 numbers)."""
    area, low, high = height * width, math.log(ratio[0]), math.log(ratio[1])
    for k in range(0, 20, 2):
        target = area * (scale[0] + (scale[1] - scale[0]) * numbers[k])
        aspect = math.exp(low + (high - low) * numbers[k + 1])
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(numbers[20] * (height - h + 1)), int(numbers[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def cover(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resized, its aspect ratio kept, so that it just covers `size`."""
    height, width = image.shape[1:]
    if height * size[1] <= width * size[0]:  # the height is the tight side
        return resize(image, (size[0], max(size[1], int(width * size[0] / height))))
    return resize(image, (max(size[0], int(height * size[1] / width)), size[1]))
