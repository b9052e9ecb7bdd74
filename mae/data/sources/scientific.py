"""Images of any number of channels and more than 8 bits: N-band TIFF and `.npy`."""

import io
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from mae.data.crops import Boxed, inside
from mae.data.settings import Split, TreeSettings
from mae.data.source import BadImage, Source
from mae.data.sources.folder import tree
from mae.errors import UserError

SUFFIXES = (".npy", ".tif", ".tiff")
DTYPES = {"uint8": np.uint8, "uint16": np.uint16, "bool": np.uint8}  # all else becomes float32


BANDS = ("scientific", "segmentation_bands")  # the groups of data whose images are decoded as bands


@dataclass(frozen=True)
class Bands:
    """Decodes to (C, H, W) uint8, uint16 or float32. Raises BadImage."""

    in_chans: Annotated[int, "[1, inf)"]
    layout: Literal["chw", "hwc"]
    max_pixels: Annotated[int, "[1, inf)"]

    def __call__(self, data: bytearray, box: Boxed | None = None) -> Tensor:
        if not data:
            raise BadImage("the file is empty")
        try:
            values = self._npy(data) if data[:6] == b"\x93NUMPY" else self._tiff(data)
        except (BadImage, ImportError):
            raise
        except Exception as error:  # damaged files raise nearly anything
            raise BadImage(f"{type(error).__name__}: {error}") from error
        image = self._checked(values)
        return image if box is None else inside(image, box)

    def _npy(self, data: bytearray) -> np.ndarray:
        return np.load(io.BytesIO(data), allow_pickle=False)

    def _tiff(self, data: bytearray) -> np.ndarray:
        import tifffile  # an extra

        with tifffile.TiffFile(io.BytesIO(data)) as file:
            self._check_size(file.series[0].shape)
            return file.asarray()

    def _check_size(self, shape: tuple[int, ...]) -> None:
        if np.prod(shape, dtype=np.int64) > self.max_pixels * self.in_chans:
            raise BadImage(f"its shape {shape} is more than data.max_pixels={self.max_pixels}")

    def _checked(self, values: np.ndarray) -> Tensor:
        if values.ndim == 2:
            values = values[None]
        elif values.ndim == 3 and self.layout == "hwc":
            values = values.transpose(2, 0, 1)
        if values.ndim != 3 or len(values) != self.in_chans:
            raise BadImage(
                f"its shape is {values.shape}, not (data.in_chans={self.in_chans}, height, width): see data.layout"
            )
        self._check_size(values.shape)
        kind = DTYPES.get(values.dtype.name, np.float32)
        if values.dtype.kind not in "biuf":
            raise BadImage(f"its values are {values.dtype}, not numbers")
        values = np.ascontiguousarray(values.astype(kind, copy=False).astype(np.dtype(kind).newbyteorder("=")))
        if kind is np.float32 and not np.isfinite(values).all():
            raise BadImage("it holds NaN or infinite values")
        return torch.from_numpy(values)


def scientific_folder(split: Split, *, files: TreeSettings, decoder: Bands) -> Source:
    """A tree of `.npy` and TIFF files of `in_chans` channels, laid out as `image_folder` has it.

    8 and 16 bit unsigned values stay as they are, and `data.mean` and `data.std` are theirs divided by 255
    or 65535; all else becomes float32, with mean and std in its own units. All files must be of one type.
    """
    try:
        import tifffile  # noqa: F401  # asked for here, so that it is not missed in the middle of a run
    except ImportError as error:
        raise UserError("data.name=scientific needs tifffile: pip install tifffile.") from error
    return tree(split, files, decoder, SUFFIXES)
