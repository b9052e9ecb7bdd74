"""Boxes of images and resizing, on (C, H, W) of any type."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

LONGEST = 256  # of an image whose long side is more short sides than this, only the cropped region is resized
REACH = 3  # pixels, or resized pixels where these are larger, that a bicubic weight reaches, and a spare one
SHIFTS = 64  # places at which a region may begin, of which the best is chosen
Box = tuple[int, int, int, int]  # top, left, height, width
Boxed = Callable[[int, int], Box]  # the box to crop an image of such a height and width to


def pair(size: int | list[int]) -> tuple[int, int]:
    """A side or [height, width] as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def cut(image: Tensor, box: Box) -> Tensor:
    """What of (..., H, W) lies inside the box."""
    top, left, height, width = box
    return image[..., top : top + height, left : left + width]


def inside(image: Tensor, box: Boxed) -> Tensor:
    """What of (..., H, W) lies inside the box that is a function of its height and width."""
    return cut(image, box(image.shape[-2], image.shape[-1]))


def resize(
    image: Tensor,
    size: tuple[int, int],
    out: Tensor | None = None,
    scales: tuple[float, float] | tuple[None, None] = (None, None),
) -> Tensor:
    """(C, H, W) -> (C, *size), bicubic with antialias. On the host 8 bit stays 8 bit throughout, as in Pillow;
    other integers, and 8 bit on a GPU, go through float32 and are rounded and clipped. Colours of 8 bit that lie side
    by side are written to `out` where that is laid out alike. `scales` are output pixels for one of the image, where
    `size` does not say it: of an image that is resized and then cropped."""
    if image.shape[1:] == size and scales == (None, None):
        return image
    if 1 in image.shape[1:]:  # whose stride may be any, and the kernel reads outside of the image by it
        image = image.clone(memory_format=torch.contiguous_format)
    resized = torch.ops.aten._upsample_bicubic2d_aa
    if image.dtype == torch.uint8 and image.device.type == "cpu" or image.is_floating_point():
        if image.dtype == torch.uint8 and image.shape[0] in (3, 4):
            # With the colours of a pixel side by side: the same bits, faster. Where no `out` says so, the kernel judges
            # by the strides alone, of which `image[None]` has the wrong one for the batch.
            if out is None or out.dtype != torch.uint8 or out.stride(0) != 1 or out.shape != (len(image), *size):
                out = torch.empty((*size, len(image)), dtype=torch.uint8).permute(2, 0, 1)
            batch = image[None].contiguous(memory_format=torch.channels_last)
            resized.out(batch, size, False, *scales, out=out[None])
            return out
        return resized(image[None], size, False, *scales)[0]
    info = torch.iinfo(image.dtype)
    return resize(image.to(torch.float32), size, None, scales).round_().clamp_(info.min, info.max).to(image.dtype)


def nearest(values: Tensor, size: tuple[int, int], box: Box | None = None) -> Tensor:
    """A map (..., H, W) resized to `size` by nearest neighbour, of which only what lies inside `box` is made.

    Pixels have their centres where those of `resize` have them, as in Pillow and torch's `nearest-exact`."""
    top, left, height, width = box or (0, 0, *size)
    rows = (2 * np.arange(top, top + height) + 1) * values.shape[-2] // (2 * size[0])
    columns = (2 * np.arange(left, left + width) + 1) * values.shape[-1] // (2 * size[1])
    return torch.from_numpy(values.numpy()[..., rows[:, None], columns])


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


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The height and width, of the same aspect ratio, that just cover `size`."""
    if height * size[1] <= width * size[0]:  # the height is the tight side
        return size[0], max(size[1], int(width * size[0] / height))
    return max(size[0], int(height * size[1] / width)), size[1]


def covering_crop(image: Tensor, size: tuple[int, int], box: Box) -> Tensor:
    """(C, H, W) resized so that it just covers `size`, then cropped to `box`.

    Of a long image only the cropped region is resized. Its pixels differ by a value or two of 255 where no region
    begins on a resized pixel."""
    whole = covering(image.shape[1], image.shape[2], size)
    if whole[0] * whole[1] <= LONGEST * size[0] * size[1]:
        return cut(resize(image, whole), box)
    spans, sizes, scales = [], [], []
    for side, resized, start, length in zip(image.shape[1:], whole, box[:2], box[2:], strict=True):
        scale = resized / side
        reach = math.ceil(REACH * max(1.0, 1 / scale))
        first = max(0, math.floor(start / scale) - reach)
        # a resized pixel begins near the first pixel, so that those of the crop lie where they did
        first = min(
            range(max(0, first - SHIFTS), first + 1), key=lambda pixel: abs(pixel * scale - round(pixel * scale))
        )
        spans.append(slice(first, min(side, math.ceil((start + length) / scale) + reach)))
        sizes.append(start - round(first * scale) + length)
        scales.append(scale)
    resized = resize(image[:, spans[0], spans[1]], (sizes[0], sizes[1]), None, (scales[0], scales[1]))
    return resized[:, -box[2] :, -box[3] :]
