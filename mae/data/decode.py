"""Bytes of an image file to uint8 (C, H, W).

JPEG goes through torchvision's `decode_jpeg`, whose pixels are those of Pillow at twice the speed, or where it is
installed through simplejpeg, whose pixels are the same and which is a tenth faster still; all that they cannot
decode, or would decode without noticing that it is damaged, goes through Pillow.
"""

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from mae.data.source import BadImage

try:
    import simplejpeg  # type: ignore[import-not-found]
except ImportError:  # an extra
    simplejpeg = None

# Start-of-frame markers of Huffman-coded JPEG: baseline, extended, progressive (ITU T.81, table B.1).
FRAMES = {0xC0, 0xC1, 0xC2}
EXIF_ORIENTATION = 0x0112


class JpegHeader(NamedTuple):
    height: int
    width: int
    components: int
    exif: bool  # an Exif segment comes before the frame


def jpeg_header(data: bytearray) -> JpegHeader | None:
    """Size and components of an 8-bit JPEG that is whole to its end marker, else None."""
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" not in data[-32:]:
        return None
    at, exif = 2, False
    while at + 10 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in FRAMES:
            height, width = (int.from_bytes(data[at + k : at + k + 2], "big") for k in (5, 7))
            return JpegHeader(height, width, data[at + 9], exif) if data[at + 4] == 8 and height and width else None
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # lossless or arithmetic: Pillow's to judge
        else:
            exif |= marker == 0xE1 and data[at + 4 : at + 8] == b"Exif"
            at += 2 + length
    return None


class Decoder:
    """Decodes to `in_chans` channels; refuses images of more than `max_pixels`. Raises BadImage."""

    def __init__(self, in_chans: int, exif_orientation: bool, max_pixels: int):
        self.in_chans, self.exif_orientation, self.max_pixels = in_chans, exif_orientation, max_pixels
        self.mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(in_chans)
        if self.mode is None:
            raise ValueError(f"data.in_chans={in_chans}: image files have 1, 3 or 4 channels.")

    def __call__(self, data: bytearray) -> Tensor:
        """(C, H, W) uint8."""
        if not data:
            raise BadImage("the file is empty")
        header = jpeg_header(data)
        if header is not None and self._fast(header):
            self._check_size(header.width, header.height)
            try:
                image = by_simplejpeg(data, self.in_chans == 1)
                if image is None:
                    image = by_torchvision(data, self.in_chans == 1)
            except RuntimeError as error:
                raise BadImage(f"not a valid JPEG ({str(error).splitlines()[0]})") from error
            return oriented(image, exif_orientation(data)) if self.exif_orientation and header.exif else image
        return self._pillow(data)

    def _fast(self, header: JpegHeader) -> bool:
        # Pillow makes grey from RGB, libjpeg from YCbCr: not the same bits
        return self.in_chans == 3 and header.components in (1, 3) or self.in_chans == 1 == header.components

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise BadImage(f"{width} x {height} is more than data.max_pixels={self.max_pixels}")

    def _pillow(self, data: bytearray) -> Tensor:
        try:
            with Image.open(io.BytesIO(data)) as image:
                self._check_size(*image.size)
                if self.exif_orientation:
                    image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bit: Pillow's own conversion clips instead of scaling
                    deep = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
                    image = Image.fromarray(deep)
                pixels = np.array(image.convert(self.mode))
        except BadImage:
            raise
        except UnidentifiedImageError as error:
            raise BadImage("not an image of a known kind") from error
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
            raise BadImage(f"{type(error).__name__}: {error}") from error
        return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)


def by_torchvision(data: bytearray, grey: bool) -> Tensor:
    """A JPEG's pixels. Raises RuntimeError."""
    mode = ImageReadMode.GRAY if grey else ImageReadMode.RGB
    image = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=mode)
    assert isinstance(image, Tensor)
    return image


def by_simplejpeg(data: bytearray, grey: bool) -> Tensor | None:
    """A JPEG's pixels; None where it is not installed, or the file has a flaw that torchvision is to judge."""
    if simplejpeg is None:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB", strict=True)
    except ValueError:
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def exif_orientation(data: bytearray) -> int:
    """1 to 8 (Exif 2.32, table 4); 1 where nothing is said."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # a damaged Exif block does not make the pixels bad
        return 1


def oriented(image: Tensor, orientation: int) -> Tensor:
    """(C, H, W) as it is meant to be seen, by its Exif orientation."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return image.flip(flips) if flips else image
