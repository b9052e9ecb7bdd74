"""Augmentation: a host half on integer images, drawn from (seed, epoch, index) alone, and a device half.

A transform takes an image (C, H, W) and a `Draw` and gives an image (C, h, w) of the same type. One that looks
at a part of the image only says which (`box`) and takes that part, so that no more need be decoded. It reads no
generator, so what a sample looks like hangs neither on workers, nor ranks, nor on where a run was resumed.
The flip is drawn with the sample but done on the device, after the transfer, with the normalisation.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae.chance import seeded

DRAWS = 32  # uniform numbers a transform may use: 10 tries of (area, ratio), the position, jitter


Box = tuple[int, int, int, int]  # top, left, height, width
Boxed = Callable[[int, int], Box]  # the part that is wanted of an image of such a height and width


class Draw(NamedTuple):
    """All the chance a transform may use for one sample."""

    numbers: list[float]  # DRAWS uniform numbers in [0, 1)
    key: int  # 64 bits, to seed what brings its own generator


# ---------------------------------------------------------------- geometry


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


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W) -> (C, *size), bicubic with antialias. 8 bit stays 8 bit throughout, as in Pillow;
    other integers go through float32 and are rounded and clipped."""
    if image.shape[1:] == size:
        return image
    if image.dtype == torch.uint8 or image.is_floating_point():
        if image.dtype == torch.uint8 and image.shape[0] in (3, 4):
            # With the colours of a pixel side by side: the same bits, twice as fast. The kernel takes it as such by
            # the strides alone, of which `image[None]` would not have the right one for the batch.
            batch = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
        else:
            batch = image[None]
        return F.interpolate(batch, size=size, mode="bicubic", antialias=True)[0]
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


# ---------------------------------------------------------------- host transforms


class RandomResizedCrop:
    """A random box of the image, resized: the paper's augmentation in pretraining and probing."""

    def __init__(self, size: tuple[int, int], scale: list[float], ratio: list[float], hflip: bool):
        self.size, self.hflip = size, hflip
        self.scale, self.ratio = (scale[0], scale[1]), (ratio[0], ratio[1])

    def box(self, height: int, width: int, draw: Draw) -> Box:
        return crop_box(height, width, self.scale, self.ratio, draw.numbers)

    def __call__(self, part: Tensor, draw: Draw | None = None) -> Tensor:
        return resize(part, self.size)


class Crop:
    """Resize to cover size / fraction, then crop `size`: from the centre, or anywhere if `jitter`."""

    def __init__(self, size: tuple[int, int], fraction: float | None, jitter: bool, hflip: bool):
        if fraction is None:  # the reference's rule: 224 / 256 up to 224 pixels, the whole image above
            fraction = 224 / 256 if max(size) <= 224 else 1.0
        self.size, self.jitter, self.hflip = size, jitter, hflip
        self.covered = int(size[0] / fraction), int(size[1] / fraction)

    def __call__(self, image: Tensor, draw: Draw | None = None) -> Tensor:
        image = cover(image, self.covered)
        rest = image.shape[1] - self.size[0], image.shape[2] - self.size[1]
        if self.jitter:
            assert draw is not None
            top, left = int(draw.numbers[20] * (rest[0] + 1)), int(draw.numbers[21] * (rest[1] + 1))
        else:
            top, left = round(rest[0] / 2), round(rest[1] / 2)
        return image[:, top : top + self.size[0], left : left + self.size[1]]


class ColorJitter:
    """Brightness, contrast, saturation, hue by factors around 1 (hue: turns around 0), in a drawn order."""

    def __init__(self, crop: RandomResizedCrop, strengths: list[float]):
        self.crop, self.hflip, self.strengths, self.box = crop, crop.hflip, strengths, crop.box

    def __call__(self, part: Tensor, draw: Draw) -> Tensor:
        from torchvision.transforms.v2 import functional as TF  # slow to import, and only needed here

        _need_rgb(part, "color_jitter")
        image = self.crop(part)
        steps = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
        for k in np.argsort(draw.numbers[26:30]):
            shift = self.strengths[k] * (2 * draw.numbers[22 + k] - 1)
            image = steps[k](image, shift if k == 3 else max(0.0, 1 + shift))
        return image


class RandAugment:
    """Random resized crop, RandAugment and random erasing, the last two as timm has them.

    Erased pixels are N(0, 1) after normalisation, as timm's `pixel` mode has them, but clipped to what
    8 bits hold (2 % of the draws), since batches travel as uint8.
    """

    draws_itself = True  # from the process' generators, which are seeded for each image: not for threads

    def __init__(self, crop: RandomResizedCrop, policy: str, erase: float, mean: list[float], std: list[float]):
        from PIL import Image
        from timm.data.auto_augment import rand_augment_transform  # timm imports all its models
        from timm.data.random_erasing import RandomErasing

        self.crop, self.hflip, self.erase, self.box = crop, crop.hflip, erase, crop.box
        fill = tuple(min(255, round(255 * m)) for m in (mean * 3)[:3])
        bicubic = Image.Resampling.BICUBIC
        hints = {"translate_const": int(min(crop.size) * 0.45), "img_mean": fill, "interpolation": bicubic}
        self.policy = rand_augment_transform(policy, hints)
        for op in self.policy.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
        self.erasing = RandomErasing(probability=1.0, mode="pixel", max_count=1, device="cpu")
        self.mean = torch.tensor((mean * 3)[:3]).view(3, 1, 1)
        self.std = torch.tensor((std * 3)[:3]).view(3, 1, 1)

    def __call__(self, part: Tensor, draw: Draw) -> Tensor:
        from PIL import Image

        _need_rgb(part, "rand_augment")
        pixels = self.crop(part).permute(1, 2, 0).contiguous().numpy()
        with seeded(draw.key):
            image = torch.from_numpy(np.array(self.policy(Image.fromarray(pixels)))).permute(2, 0, 1)
            if draw.numbers[22] >= self.erase:
                return image
            normal = self.erasing((image / 255 - self.mean) / self.std)
        return ((normal * self.std + self.mean) * 255).round_().clamp_(0, 255).to(torch.uint8)


def _posterize(image: Any, bits: int, **unused: Any) -> Any:
    """timm's, but black for 0 bits, to which strengths of 10 and more come: current Pillow raises there."""
    from PIL import Image, ImageOps

    return ImageOps.posterize(image, min(8, bits)) if bits > 0 else Image.new(image.mode, image.size)


def _need_rgb(image: Tensor, name: str) -> None:
    if image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ValueError(
            f"augmentation.name={name} works on 8-bit images of 3 channels, and these have {image.shape[0]} "
            f"of {image.dtype}: choose augmentation=linprobe, which crops and flips alone."
        )


# ---------------------------------------------------------------- builders


def random_resized_crop(
    *, img_size: int | list[int], scale: list[float], ratio: list[float], min_crop: float, hflip: bool
) -> RandomResizedCrop:
    """Random box of `scale` of the area and `ratio` of width to height, resized to `img_size`.

    `min_crop` is the least part of the area that still shows what the image is of, whatever `scale` says.
    """
    return RandomResizedCrop(pair(img_size), [max(s, min_crop) for s in scale], ratio, hflip)


def rand_augment(
    *,
    img_size: int | list[int],
    scale: list[float],
    ratio: list[float],
    min_crop: float,
    hflip: bool,
    policy: str,
    erase_prob: float,
    mean: list[float],
    std: list[float],
) -> RandAugment:
    """Random resized crop, timm's RandAugment `policy`, random erasing with probability `erase_prob`."""
    crop = random_resized_crop(img_size=img_size, scale=scale, ratio=ratio, min_crop=min_crop, hflip=hflip)
    return RandAugment(crop, policy, erase_prob, mean, std)


def color_jitter(
    *,
    img_size: int | list[int],
    scale: list[float],
    ratio: list[float],
    min_crop: float,
    hflip: bool,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> ColorJitter:
    """Random resized crop and colour jitter (an ablation of the paper, table 1e)."""
    crop = random_resized_crop(img_size=img_size, scale=scale, ratio=ratio, min_crop=min_crop, hflip=hflip)
    return ColorJitter(crop, [brightness, contrast, saturation, hue])


def fixed_crop(*, img_size: int | list[int], crop_fraction: float | None, hflip: bool) -> Crop:
    """Resize, then a crop of fixed size anywhere (an ablation of the paper, table 1e)."""
    return Crop(pair(img_size), crop_fraction, jitter=True, hflip=hflip)


def center_crop(*, img_size: int | list[int], crop_fraction: float | None) -> Crop:
    """Resize to `img_size / crop_fraction`, centre crop: evaluation, and "none" of the paper's table 1e."""
    return Crop(pair(img_size), crop_fraction, jitter=False, hflip=False)


AUGMENTATIONS = {
    "random_resized_crop": random_resized_crop,
    "rand_augment": rand_augment,
    "color_jitter": color_jitter,
    "fixed_crop": fixed_crop,
    "center_crop": center_crop,
}


# ---------------------------------------------------------------- device half


class Prepare(nn.Module):
    """Flip and normalise on the device, without waiting for it.

    `mean` and `std`, one value or one a channel, are of images in [0, 1] where the host type is an integer
    (divided by the type's largest value), and in the images' own units where it is floating.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor, flip: Tensor | None = None) -> Tensor:
        """image (B, C, H, W) of any type, flip (B,) bool -> float32 (B, C, H, W)."""
        top = 1.0 if image.is_floating_point() else float(torch.iinfo(image.dtype).max)
        if image.dtype != torch.uint8:  # flipped as bytes where it can be: a quarter of the traffic
            image = image.to(torch.float32)
        if flip is not None:
            image = torch.where(flip.view(-1, 1, 1, 1), image.flip(-1), image)
        return (image / top).sub_(self.mean).div_(self.std)

    def undo(self, image: Tensor) -> Tensor:
        """Normalised (..., C, H, W) -> values in [0, 1] (integer images) or the images' own units."""
        return image * self.std + self.mean
