"""Decoding and cropping on a GPU: `data.decode_device=cuda`.

Workers read files and hand on their bytes; the main process decodes a batch at a time with torchvision's nvJPEG, and
crops each image there. Crops, flips and masks are those of the host, since they are functions of (seed, epoch, index).
Pixels are not: nvJPEG rounds otherwise, and resizing goes through float32. What a GPU does not decode, such as PNG or a
progressive JPEG, is decoded by the worker. So is what it refuses, which is then judged as on the host.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from mae.data import jpeg
from mae.data.crops import inside
from mae.data.dataset import Files, Loaded, Reader
from mae.data.decode import Decoder
from mae.data.source import Source
from mae.data.transforms import Transform
from mae.device import copy_stream
from mae.errors import UserError

log = logging.getLogger(__name__)

KEY = "data.decode_device=cuda"


def check(source: Source, transform: Transform) -> None:
    """Raises UserError where images are no files that a GPU decodes, or where it cannot crop them."""
    if not isinstance(source.decoder, Decoder):
        raise UserError(f"{KEY} decodes JPEG files, and these images are none: use data.decode_device=cpu.")
    if not transform.on_device:
        raise UserError(
            f"{KEY} crops on the GPU, and this augmentation works on the host: use data.decode_device=cpu, or "
            "augmentation=pretrain, which crops and flips alone."
        )


class Counts(NamedTuple):
    """Images so far."""

    all: int = 0
    by_host: int = 0


class DeviceDecoder:
    """Turns what `reader` loads, of which some rows are files, into batches of images on `device`."""

    def __init__(self, reader: Reader, device: torch.device):
        check(reader.source, reader.transform)
        assert isinstance(reader.source.decoder, Decoder)
        self.reader, self.device = reader, device
        self.grey = reader.source.decoder.in_chans == 1
        self.counts = Counts()
        log.info(
            "%s: training images are decoded and cropped there, to pixels that differ a little from the host's", KEY
        )

    def __call__(self, loaded: Loaded) -> Loaded:
        """A batch with `image` (B, C, H, W) on the device, and the images that could not be used."""
        files = loaded.files
        assert files is not None
        if self.device.type != "cuda":
            return self._decoded(loaded, files)
        with torch.cuda.stream(copy_stream(self.device)):  # which computation waits for, see `mae.device.Sender`
            return self._decoded(loaded, files)

    def _decoded(self, loaded: Loaded, files: Files) -> Loaded:
        batch, bad, images = {**loaded.batch}, [*loaded.bad], self._images(files)
        host, count = batch["image"], len(files.ticket.indices)
        rows = dict(zip(files.host_rows, host.to(self.device, non_blocking=True), strict=True))
        draws, transform = self.reader.draws(files.ticket), self.reader.transform_of(files.ticket)
        refused = [number for number, image in zip(files.numbers, images, strict=True) if image is None]
        for number, image in zip(files.numbers, images, strict=True):
            for repeat in range(self.reader.repeats if image is not None else 0):
                draw = draws[repeat][number]
                box = transform.box(draw)
                assert image is not None
                rows[repeat * count + number] = transform(inside(image, box) if box else image, draw)
        for number in refused:
            alone = self.reader.load_on_host(files.ticket, number)
            bad += alone.bad
            for repeat in range(self.reader.repeats):
                row = repeat * count + number
                rows[row] = alone.batch["image"][repeat].to(self.device)
                for name in ("index", "label"):
                    batch[name][row] = alone.batch[name][repeat]
        self._count(count, count - len(files.numbers) + len(refused))
        batch["image"] = torch.stack([rows[row] for row in range(len(rows))])
        return Loaded(batch, bad)

    def _images(self, files: Files) -> list[Tensor | None]:
        """The pixels of each file; None where the device refuses it."""
        encoded = list(files.data.split(files.sizes))
        if not encoded:
            return []
        try:
            return [*jpeg.all_on(self.device, encoded, self.grey)]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # of one of them; which, it does not say
            return [self._image(data) for data in encoded]

    def _image(self, data: Tensor) -> Tensor | None:
        try:
            return jpeg.all_on(self.device, [data], self.grey)[0]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None

    def _count(self, images: int, by_host: int) -> None:
        before = self.counts
        self.counts = Counts(before.all + images, before.by_host + by_host)
        if by_host and not before.by_host:
            log.info("%s: some images are no plain JPEG, such as PNG or progressive: the host decodes them", KEY)

    def summary(self) -> None:
        """Logs how many images the host decoded."""
        if self.counts.all:
            log.info("%s: the host decoded %d of %d images", KEY, self.counts.by_host, self.counts.all)
