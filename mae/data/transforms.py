"""Augmentation: a host half on integer images, drawn from (seed, epoch, index) alone, and a device half.

A transform takes an image (C, H, W) and a `Draw` and gives an image (C, h, w) of the same type. One that looks
at a part of the image only says which (`box`) and takes that part, so that no more need be decoded; one that `fills`
writes to `out` where it can. It reads no generator, so what a sample looks like hangs neither on workers, nor ranks,
nor on where a run was resumed.
The flip is drawn with the sample but done on the device, after the transfer, with the normalisation.
"""

from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mae.data.crops import Box, covering_crop, crop_box, pair, resize
from mae.data.rng import seeded

DRAWS = 32  # uniform numbers a transform may use: 10 tries of (area, ratio), the position, jitter


class Draw(NamedTuple):
    """All the chance a transform may use for one sample."""

    numbers: list[float]  # DRAWS uniform numbers in [0, 1)
    key: int  # 64 bits, to seed what brings its own generator


# ---------------------------------------------------------------- host transforms


class RandomResizedCrop:
    """A random box of the image, resized: the paper's augmentation in pretraining and probing."""

    fills = True  # it takes `out`

    def __init__(self, size: tuple[int, int], scale: list[float], ratio: list[float], hflip: bool):
        self.size, self.hflip = size, hflip
        self.scale, self.ratio = (scale[0], scale[1]), (ratio[0], ratio[1])

    def box(self, height: int, width: int, draw: Draw) -> Box:
        return crop_box(height, width, self.scale, self.ratio, draw.numbers)

    def __call__(self, part: Tensor, draw: Draw | None = None, out: Tensor | None = None) -> Tensor:
        return resize(part, self.size, out)


def kept_fraction(size: tuple[int, int], fraction: float | None) -> float:
    """The part of a side that a centre crop keeps; None is the reference's rule: 224 / 256 up to 224 pixels, the whole
    image above."""
    if fraction is not None:
        return fraction
    return 224 / 256 if max(size) <= 224 else 1.0


class Crop:
    """Resize to cover size / fraction, then crop `size`: from the centre, or anywhere if `jitter`."""

    def __init__(self, size: tuple[int, int], fraction: float | None, jitter: bool, hflip: bool):
        fraction = kept_fraction(size, fraction)
        self.size, self.jitter, self.hflip = size, jitter, hflip
        self.covered = int(size[0] / fraction), int(size[1] / fraction)

    def __call__(self, image: Tensor, draw: Draw | None = None) -> Tensor:
        def corner(*rest: int) -> tuple[int, int]:
            if not self.jitter:
                return round(rest[0] / 2), round(rest[1] / 2)
            assert draw is not None
            return int(draw.numbers[20] * (rest[0] + 1)), int(draw.numbers[21] * (rest[1] + 1))

        return covering_crop(image, self.covered, self.size, corner)


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
    *,
    img_size: int | list[int],
    scale: list[Annotated[float, "(0, 1]"]],
    ratio: list[Annotated[float, "(0, inf)"]],
    min_crop: float,
    hflip: bool,
) -> RandomResizedCrop:
    """Random box of `scale` of the area and `ratio` of width to height, resized to `img_size`.

    `min_crop` is the least part of the area that still shows what the image is of, whatever `scale` says.
    """
    return RandomResizedCrop(pair(img_size), [max(s, min_crop) for s in scale], ratio, hflip)


def rand_augment(
    *,
    img_size: int | list[int],
    scale: list[Annotated[float, "(0, 1]"]],
    ratio: list[Annotated[float, "(0, inf)"]],
    min_crop: float,
    hflip: bool,
    policy: str,
    erase_prob: Annotated[float, "[0, 1]"],
    mean: list[float],
    std: list[float],
) -> RandAugment:
    """Random resized crop, timm's RandAugment `policy`, random erasing with probability `erase_prob`."""
    crop = random_resized_crop(img_size=img_size, scale=scale, ratio=ratio, min_crop=min_crop, hflip=hflip)
    return RandAugment(crop, policy, erase_prob, mean, std)


def color_jitter(
    *,
    img_size: int | list[int],
    scale: list[Annotated[float, "(0, 1]"]],
    ratio: list[Annotated[float, "(0, inf)"]],
    min_crop: float,
    hflip: bool,
    brightness: Annotated[float, "[0, inf)"],
    contrast: Annotated[float, "[0, inf)"],
    saturation: Annotated[float, "[0, inf)"],
    hue: Annotated[float, "[0, 0.5]"],
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


def top_of(image: Tensor) -> float:
    """What an image's values are divided by: the largest value of an integer type, 1 where they are floating."""
    return 1.0 if image.is_floating_point() else float(torch.iinfo(image.dtype).max)


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
        top = top_of(image)
        if image.dtype != torch.uint8:  # flipped as bytes where it can be: a quarter of the traffic
            image = image.to(torch.float32)
        if flip is not None:
            image = torch.where(flip.view(-1, 1, 1, 1), image.flip(-1), image)
        return (image / top).sub_(self.mean).div_(self.std)

    def undo(self, image: Tensor) -> Tensor:
        """Normalised (..., C, H, W) -> values in [0, 1] (integer images) or the images' own units."""
        return image * self.std + self.mean
