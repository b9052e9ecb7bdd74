"""Bytes of an image file to uint8 (C, H, W).

JPEG goes through the fast decoders of `mae.data.jpeg`, whose pixels are those of Pillow; all that they cannot
decode, or would decode without noticing that it is damaged, goes through Pillow.
"""

import io
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mae.data import jpeg
from mae.data.crops import Boxed, inside
from mae.data.formats import KINDS
from mae.data.source import BadImage
from mae.errors import UserError

EXIF_ORIENTATION = 0x0112
BITS, SAMPLE_FORMAT = 258, 339  # tags of TIFF 6.0
UNSIGNED = {1, 4}  # sample formats: whole numbers without a sign; not defined
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name
ELSEWHERE = "use data=scientific, or convert the file"
BYTES_A_PIXEL, SLACK = 8, 64 << 20  # no image file takes more than 16 bits of four channels, and what goes with them


@dataclass(frozen=True)
class Decoder:
    """Decodes to `in_chans` channels; refuses images of more than `max_pixels`. Raises BadImage."""

    in_chans: Annotated[int, "[1, inf)"]
    exif_orientation: bool  # whether photos are turned as their camera says
    max_pixels: Annotated[int, "[1, inf)"]

    def __post_init__(self) -> None:
        if self.in_chans not in MODES:
            raise UserError(f"data.in_chans={self.in_chans}: image files have 1, 3 or 4 channels.")

    @property
    def most_bytes(self) -> int:
        """The size of the largest file that is read."""
        return BYTES_A_PIXEL * self.max_pixels + SLACK

    def __call__(self, data: bytearray, box: Boxed | None = None) -> Tensor:
        """(C, H, W) uint8: the image, or what lies inside `box` of its height and width."""
        if not data:
            raise BadImage("the file is empty")
        header = jpeg.read_header(data)
        if header is None or not self._fast(header):
            image = self._pillow(data)
        else:
            self._check_size(header.width, header.height)
            turned = exif_orientation(data) if self.exif_orientation and header.exif else 1
            if box and turned == 1:
                image = jpeg.region(data, self.in_chans == 1, box(header.height, header.width))
                if image is not None:
                    return image
            try:
                image = oriented(jpeg.whole(data, self.in_chans == 1), turned)
            except RuntimeError as error:
                raise BadImage(f"not a valid JPEG ({str(error).splitlines()[0]})") from error
        return image if box is None else inside(image, box)

    def on_device(self, data: bytearray) -> tuple[int, int] | None:
        """Height and width of a file that a GPU decodes as it is: a baseline JPEG that is not turned. None for another.

        Raises BadImage where it is too large."""
        header = jpeg.read_header(data)
        if header is None or not (header.baseline and self._fast(header)):
            return None
        self._check_size(header.width, header.height)
        turned = self.exif_orientation and header.exif and exif_orientation(data) != 1
        return None if turned else (header.height, header.width)

    def _fast(self, header: jpeg.Header) -> bool:
        # Pillow makes grey from RGB, libjpeg from YCbCr: not the same bits
        return self.in_chans == 3 and header.components in (1, 3) or self.in_chans == 1 == header.components

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise BadImage(f"{width} x {height} is more than data.max_pixels={self.max_pixels}")

    def _pillow(self, data: bytearray) -> Tensor:
        if Image.MAX_IMAGE_PIXELS is not None:  # Pillow refuses twice as many, of its own accord
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, -(-self.max_pixels // 2))
        try:
            with Image.open(io.BytesIO(data), formats=KINDS) as image:
                return self.of_pillow(image)
        except BadImage:
            raise
        except UnidentifiedImageError as error:
            if data[:4] in TIFF:
                raise BadImage(f"not a TIFF that Pillow reads: {ELSEWHERE}") from error
            raise BadImage("not an image of a known kind") from error
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
            raise BadImage(f"{type(error).__name__}: {error}") from error

    def of_pillow(self, image: Image.Image) -> Tensor:
        """(C, H, W) uint8 of an image that Pillow has opened, the same as of its file."""
        self._check_size(*image.size)
        image.load()
        turned = orientation(image) if self.exif_orientation else 1
        pixels = np.array(eight_bits(image).convert(MODES[self.in_chans]))
        whole = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)
        return oriented(whole, turned)


def eight_bits(image: Image.Image) -> Image.Image:
    """An image whose values are scaled to 8 bits where their range is known. Raises BadImage where it is not."""
    signed = image.format == "TIFF" and not {*image.tag_v2.get(SAMPLE_FORMAT, (1,))} <= UNSIGNED  # type: ignore[attr-defined]
    if image.mode == "F" or signed or image.mode == "I" and image.format == "TIFF":
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
        raise BadImage(f"its values are {kind} numbers, which have no fixed range to scale to 8 bits: {ELSEWHERE}")
    if not image.mode.startswith("I"):
        return image
    bits = image.tag_v2.get(BITS, (16,))[0] if image.format == "TIFF" else 16  # type: ignore[attr-defined]
    # Pillow's own conversion clips instead of scaling
    deep = np.asarray(image).astype(np.int64) >> max(0, bits - 8)
    return Image.fromarray(np.clip(deep, 0, 255).astype(np.uint8))


def exif_orientation(data: bytearray) -> int:
    """`orientation` of a file."""
    try:
        with Image.open(io.BytesIO(data), formats=KINDS) as image:
            return orientation(image)
    except Exception:  # a file that Pillow does not read
        return 1


def orientation(image: Image.Image) -> int:
    """1 to 8 (Exif 2.32, table 4); 1 where none is given."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # a damaged Exif block does not make the pixels bad
        return 1


def oriented(image: Tensor, orientation: int) -> Tensor:
    """(C, H, W) as it is meant to be seen, by its Exif orientation."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return image.flip(flips) if flips else image
