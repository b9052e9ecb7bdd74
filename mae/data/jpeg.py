"""JPEG to uint8 (C, H, W), to the bits of Pillow's own decoding.

torchvision's `decode_jpeg` does it at twice Pillow's speed. Where nvImageCodec is installed (an extra; it needs no
GPU), only the cropped region is decoded: the rest of the picture is only read through.
"""

import functools
import importlib.util
import os
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from mae.data.crops import Box

# Start-of-frame markers of Huffman-coded JPEG: baseline, extended, progressive (ITU T.81, table B.1).
BASELINE = 0xC0
FRAMES = {BASELINE, 0xC1, 0xC2}


class Header(NamedTuple):
    height: int
    width: int
    components: int
    exif: bool  # an Exif segment comes before the frame
    baseline: bool


def read_header(data: bytearray) -> Header | None:
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
            eight_bits = data[at + 4] == 8 and height and width
            return Header(height, width, data[at + 9], exif, marker == BASELINE) if eight_bits else None
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # lossless or arithmetic: Pillow's to judge
        else:
            exif |= marker == 0xE1 and data[at + 4 : at + 8] == b"Exif"
            at += 2 + length
    return None


def whole(data: bytearray, grey: bool) -> Tensor:
    """A JPEG's pixels. Raises RuntimeError."""
    mode = ImageReadMode.GRAY if grey else ImageReadMode.RGB
    image = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=mode)
    assert isinstance(image, Tensor)
    return image


def all_on(device: torch.device, files: list[Tensor], grey: bool) -> list[Tensor]:
    """The pixels of files (bytes,) on the host, decoded together on a device. Raises RuntimeError for one of them."""
    mode = ImageReadMode.GRAY if grey else ImageReadMode.RGB
    images = decode_jpeg(files, mode=mode, device=device)
    assert isinstance(images, list)
    return images


def region(data: bytearray, grey: bool, box: Box) -> Tensor | None:
    """The pixels inside `box`; None where they cannot be had alone, and `whole` is to judge.

    In a damaged file the region can be sound, or can differ from what the whole has there."""
    library = _library()
    if library is None:
        return None
    if not hasattr(DECODERS, "decoder"):
        backends = [library.Backend(library.CPU_ONLY)]
        DECODERS.decoder = library.Decoder(library.NVIMGCODEC_DEVICE_CPU_ONLY, 1, backends, ":fancy_upsampling=1")
    top, left, height, width = box
    area = library.Region(top, left, top + height, left + width)
    colours = library.ColorSpec.GRAY if grey else library.ColorSpec.SRGB
    try:
        view = library.CodeStream(data).get_sub_code_stream(region=area)
        image = DECODERS.decoder.decode(
            view, params=library.DecodeParams(apply_exif_orientation=False, color_spec=colours)
        )
        return None if image is None else torch.from_numpy(np.asarray(image)).permute(2, 0, 1)
    except (RuntimeError, ValueError, IndexError):  # what C++ throws comes as these; `whole` says what is wrong
        return None


DECODERS = threading.local()  # each thread's decoder


LOADING = threading.Lock()  # functools.cache lets two threads in at first


def _library() -> ModuleType | None:
    """nvImageCodec, or None; loaded once."""
    with LOADING:
        return _load()


@functools.cache
def _load() -> ModuleType | None:
    """nvImageCodec with its JPEG decoder for the CPU and no other; None where it is not installed.

    Otherwise it loads the decoders of all kinds, each of which writes to the terminal that it misses a GPU's library.
    """
    package = importlib.util.find_spec("nvidia")
    extensions = [
        path
        for folder in (package.submodule_search_locations or [] if package else [])
        for path in Path(folder).glob("nvimgcodec/extensions/*jpeg_turbo*")
    ]
    if not extensions:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / extensions[0].name).symlink_to(extensions[0])
        wanted = {"NVIMGCODEC_EXTENSIONS_PATH": folder, "PYNVIMGCODEC_VERBOSITY": "0"}
        before = {key: os.environ.get(key) for key in wanted}
        os.environ |= wanted
        from nvidia import nvimgcodec  # type: ignore[import-not-found]  # reads them here

        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    return nvimgcodec
