"""Augmentation on the host, of images as they are stored; what the device does is in `mae.data.prepare`.

Every random choice for a sample is a function of (seed, epoch, index).
"""

from functools import partial
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae.data.crops import Box, Boxed, covering, covering_crop, crop_box, cut, nearest, pair, resize
from mae.data.prepare import top_of
from mae.data.source import IGNORED
from mae.errors import UserError
from mae.rng import seeded

if TYPE_CHECKING:
    from PIL import Image

DRAWS = 32  # uniform numbers a transform may use: 10 tries of (area, ratio), the position, jitter


class Draw(NamedTuple):
    """The random numbers that a transform may use for one sample."""

    numbers: list[float]  # DRAWS uniform numbers in [0, 1)
    key: int  # 64 bits, to seed what brings its own generator


class Transform:
    """An image (C, H, W) to a crop (C, h, w) of one size and of the image's type: a function of image and `Draw` alone.

    So a sample does not depend on workers, on ranks, or on where a run was resumed. A transform defines `__call__`;
    the rest has defaults.
    """

    hflip = False  # whether half of the samples, at random, are mirrored on the device
    draws_itself = False  # whether it uses the generators of the process, which threads share; see `seeded`
    on_device = False  # whether `__call__` also takes images that lie on a GPU, for data.decode_device=cuda

    def box(self, draw: Draw) -> Boxed | None:
        """The box of the image that `__call__` gets instead of the whole, so that no more need be decoded; None: all of
        the image. Called once for each sample, before the image is read."""
        del draw
        return None

    def __call__(self, image: Tensor, draw: Draw, out: Tensor | None = None) -> Tensor:
        """The crop. It may be written to `out`, the memory of its row in the batch, which is then to be returned."""
        raise NotImplementedError

    def target(self, target: Tensor, draw: Draw) -> Tensor:
        """A map (..., H, W) of the same image or box, resized and cropped as `__call__` does it to the image, but by
        nearest neighbour. Raises UserError where pixels are moved otherwise."""
        del target, draw
        raise UserError(
            "this augmentation moves pixels in a way that the maps of these images cannot follow: choose "
            "augmentation=linprobe, which crops and flips alone."
        )


class RandomResizedCrop(Transform):
    """A random box, of `scale` of the image's area and `ratio` of width to height, resized to `img_size`.

    The paper's augmentation in pretraining and probing. `min_crop` is the least part of the area that still shows what
    the image is of, whatever `scale` says.
    """

    on_device = True

    def __init__(
        self,
        *,
        img_size: int | list[int],
        scale: list[Annotated[float, "(0, 1]"]],
        ratio: list[Annotated[float, "(0, inf)"]],
        min_crop: float,
        hflip: bool,
    ):
        self.size, self.hflip = pair(img_size), hflip
        self.scale, self.ratio = (max(scale[0], min_crop), max(scale[1], min_crop)), (ratio[0], ratio[1])

    def box(self, draw: Draw) -> Boxed:
        return partial(crop_box, scale=self.scale, ratio=self.ratio, numbers=draw.numbers)

    def __call__(self, image: Tensor, draw: Draw, out: Tensor | None = None) -> Tensor:
        return resize(image, self.size, out)

    def target(self, target: Tensor, draw: Draw) -> Tensor:
        return nearest(target, self.size)


def kept_fraction(size: tuple[int, int], fraction: float | None) -> float:
    """The fraction of a side that a centre crop keeps; None is the reference's rule: 224 / 256 up to 224 pixels, the
    whole image above."""
    if fraction is not None:
        return fraction
    return 224 / 256 if max(size) <= 224 else 1.0


class CenterCrop(Transform):
    """Resize to cover `img_size / crop_fraction`, centre crop: evaluation, and "none" of the paper's table 1e."""

    on_device = True

    def __init__(self, *, img_size: int | list[int], crop_fraction: float | None):
        self.size = pair(img_size)
        fraction = kept_fraction(self.size, crop_fraction)
        self.covered = int(self.size[0] / fraction), int(self.size[1] / fraction)

    def corner(self, below: int, beside: int, draw: Draw | None) -> tuple[int, int]:
        """Top and left of the crop, where the resized image is so many pixels larger."""
        del draw
        return round(below / 2), round(beside / 2)

    def _crop(self, image: Tensor, draw: Draw | None) -> tuple[tuple[int, int], Box]:
        """The size to which an image or map is resized, and the box that is then cropped."""
        whole = covering(image.shape[-2], image.shape[-1], self.covered)
        return whole, (*self.corner(whole[0] - self.size[0], whole[1] - self.size[1], draw), *self.size)

    def __call__(self, image: Tensor, draw: Draw | None = None, out: Tensor | None = None) -> Tensor:
        return covering_crop(image, self.covered, self._crop(image, draw)[1])

    def target(self, target: Tensor, draw: Draw | None = None) -> Tensor:
        return nearest(target, *self._crop(target, draw))


class FixedCrop(CenterCrop):
    """Resize, then a crop of fixed size anywhere (an ablation of the paper, table 1e)."""

    def __init__(self, *, img_size: int | list[int], crop_fraction: float | None, hflip: bool):
        super().__init__(img_size=img_size, crop_fraction=crop_fraction)
        self.hflip = hflip

    def corner(self, below: int, beside: int, draw: Draw | None) -> tuple[int, int]:
        assert draw is not None
        return int(draw.numbers[20] * (below + 1)), int(draw.numbers[21] * (beside + 1))


class RandomScaleCrop(Transform):
    """A random scale, then a crop of `img_size` anywhere: the usual augmentation of segmentation.

    Scale 1 just covers `img_size`, as mmsegmentation's `ratio_range` of a short side of `img_size` has it. What lies
    beyond a smaller image has the colour `mean`, and is ignored in maps.
    """

    def __init__(
        self, *, img_size: int | list[int], scale: list[Annotated[float, "(0, inf)"]], hflip: bool, mean: list[float]
    ):
        self.size, self.hflip, self.scale, self.mean = pair(img_size), hflip, (scale[0], scale[1]), mean

    def _box(self, height: int, width: int, draw: Draw) -> tuple[Box, tuple[int, int]]:
        """The box of the image that is cropped, and its size in the crop."""
        covered = covering(height, width, self.size)[0] / height
        factor = covered * (self.scale[0] + (self.scale[1] - self.scale[0]) * draw.numbers[0])
        sides, corner, sizes = [], [], []
        for side, wanted, number in zip((height, width), self.size, draw.numbers[20:22], strict=True):
            length = max(1, min(side, round(wanted / factor)))
            sides.append(length)
            corner.append(int(number * (side - length + 1)))
            sizes.append(wanted if length < side else max(1, min(wanted, round(side * factor))))
        return (corner[0], corner[1], sides[0], sides[1]), (sizes[0], sizes[1])

    def __call__(self, image: Tensor, draw: Draw, out: Tensor | None = None) -> Tensor:
        box, size = self._box(image.shape[-2], image.shape[-1], draw)
        if size == self.size:
            return resize(cut(image, box), size, out)
        fill = torch.tensor(self.mean) * top_of(image)
        canvas = torch.empty(len(image), *self.size, dtype=image.dtype)
        canvas[...] = (fill if image.is_floating_point() else fill.round()).to(image.dtype).view(-1, 1, 1)
        canvas[:, : size[0], : size[1]] = resize(cut(image, box), size)
        return canvas

    def target(self, target: Tensor, draw: Draw) -> Tensor:
        box, size = self._box(target.shape[-2], target.shape[-1], draw)
        region = nearest(cut(target, box), size)
        return F.pad(region, (0, self.size[1] - size[1], 0, self.size[0] - size[0]), value=IGNORED)


class WholeImage(Transform):
    """The whole image, enlarged where it is smaller than a window of `img_size`; its map stays as it is.

    With `eval_size` the shorter side is that many pixels, and at least a window's."""

    def __init__(self, *, img_size: int | list[int], eval_size: int | None):
        self.size, self.eval_size = pair(img_size), eval_size

    def __call__(self, image: Tensor, draw: Draw | None = None, out: Tensor | None = None) -> Tensor:
        height, width = image.shape[-2:]
        side = self.eval_size or min(height, width)
        size = covering(height, width, (side, side))
        if size[0] < self.size[0] or size[1] < self.size[1]:
            size = covering(height, width, self.size)
        return resize(image, size)

    def target(self, target: Tensor, draw: Draw | None = None) -> Tensor:
        return target


class ColorJitter(RandomResizedCrop):
    """Random resized crop and colour jitter in a random order (an ablation of the paper, table 1e).

    Brightness, contrast and saturation change by factors around 1, the hue by turns around 0.
    """

    def __init__(
        self,
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
    ):
        super().__init__(img_size=img_size, scale=scale, ratio=ratio, min_crop=min_crop, hflip=hflip)
        self.strengths = [brightness, contrast, saturation, hue]

    def __call__(self, image: Tensor, draw: Draw, out: Tensor | None = None) -> Tensor:
        from torchvision.transforms.v2 import functional as TF  # slow to import, and only needed here

        _need_rgb(image, "color_jitter")
        image = resize(image, self.size)
        steps = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
        for k in np.argsort(draw.numbers[26:30]):
            shift = self.strengths[k] * (2 * draw.numbers[22 + k] - 1)
            image = steps[k](image, shift if k == 3 else max(0.0, 1 + shift))
        return image


class RandAugment(RandomResizedCrop):
    """Random resized crop, then timm's RandAugment `policy`, then timm's random erasing with probability `erase_prob`.

    Erased pixels are N(0, 1) after normalisation, as timm's `pixel` mode has them. They are clipped to what 8 bits
    hold (2 % of the numbers), since batches travel as uint8.
    """

    draws_itself, on_device = True, False  # Pillow's operations

    def __init__(
        self,
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
    ):
        from PIL import Image
        from timm.data.auto_augment import rand_augment_transform  # timm imports all its models
        from timm.data.random_erasing import RandomErasing

        super().__init__(img_size=img_size, scale=scale, ratio=ratio, min_crop=min_crop, hflip=hflip)
        self.erase_prob = erase_prob
        fill = tuple(min(255, round(255 * m)) for m in (mean * 3)[:3])
        bicubic = Image.Resampling.BICUBIC
        hints = {"translate_const": int(min(self.size) * 0.45), "img_mean": fill, "interpolation": bicubic}
        self.policy = rand_augment_transform(policy, hints)
        for op in self.policy.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
        self.erasing = RandomErasing(probability=1.0, mode="pixel", max_count=1, device="cpu")
        self.mean = torch.tensor((mean * 3)[:3]).view(3, 1, 1)
        self.std = torch.tensor((std * 3)[:3]).view(3, 1, 1)

    def __call__(self, image: Tensor, draw: Draw, out: Tensor | None = None) -> Tensor:
        from PIL import Image

        _need_rgb(image, "rand_augment")
        pixels = resize(image, self.size).permute(1, 2, 0).contiguous().numpy()
        with seeded(draw.key):
            augmented = torch.from_numpy(np.array(self.policy(Image.fromarray(pixels)))).permute(2, 0, 1)
            if draw.numbers[22] >= self.erase_prob:
                return augmented
            normal = self.erasing((augmented / 255 - self.mean) / self.std)
        return ((normal * self.std + self.mean) * 255).round_().clamp_(0, 255).to(torch.uint8)

    def target(self, target: Tensor, draw: Draw) -> Tensor:
        return Transform.target(self, target, draw)  # the policy shears and turns


def _posterize(image: "Image.Image", bits: int, **unused: object) -> "Image.Image":
    """timm's, but black for 0 bits, to which strengths of 10 and more come: current Pillow raises there."""
    from PIL import Image, ImageOps

    return ImageOps.posterize(image, min(8, bits)) if bits > 0 else Image.new(image.mode, image.size)


def _need_rgb(image: Tensor, name: str) -> None:
    if image.shape[0] != 3 or image.dtype != torch.uint8:
        raise UserError(
            f"augmentation.name={name} works on 8-bit images of 3 channels, and these have {image.shape[0]} "
            f"of {image.dtype}: choose augmentation=linprobe, which crops and flips alone."
        )


AUGMENTATIONS = {
    "random_resized_crop": RandomResizedCrop,
    "rand_augment": RandAugment,
    "color_jitter": ColorJitter,
    "random_scale_crop": RandomScaleCrop,
    "fixed_crop": FixedCrop,
    "center_crop": CenterCrop,
}
