"""One micro-batch from its ticket: reading, replacing what cannot be read, and every random choice."""

import csv
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from mae import limits, rng
from mae.data.batch_buffer import Stack
from mae.data.crops import inside
from mae.data.decode import Decoder
from mae.data.sampler import Batches, Ticket
from mae.data.source import FAILURES, BadImage, Source, crop_target, is_map, reason
from mae.data.transforms import DRAWS, Draw, Transform
from mae.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
STREAM_SAMPLE, STREAM_NOISE, STREAM_REPLACE = 0, 1, 2  # uses of random numbers; repeats shift by 16 each
MAX_REPLACEMENTS = 100  # tries at a readable image before the data set is given up
MIN_JUDGED = 10_000  # images over which the share of bad ones is judged at least, or all if fewer
BAD_COLUMNS = ("index", "name", "reason", "part")  # of bad_files.csv


class Bad(NamedTuple):
    """An image that was replaced."""

    sample_index: int
    name: str
    reason: str


class Files(NamedTuple):
    """Files of a batch that a device is to decode, one after another; see `mae.data.device_decode`."""

    ticket: Ticket
    data: Tensor  # (bytes,) uint8
    sizes: list[int]  # bytes of each
    numbers: list[int]  # which of the ticket's images each is
    host_rows: list[int]  # rows of the batch that the host has decoded, in the order of `image`


class Loaded(NamedTuple):
    """What a worker sends: a batch, and the images that it could not use."""

    batch: Batch
    bad: list[Bad]
    files: Files | None = None  # where the batch is to be completed with their images


class Failure(NamedTuple):
    """A user error in a worker, returned as a value so that the main process can raise it."""

    message: str


class Samples:
    """The samples of a batch while they are made, `count` rows. `files` are those left to a device; None: none are."""

    def __init__(self, count: int, transform: Transform, files: dict[int, bytearray] | None):
        self.transform = transform
        self.images, self.targets = Stack(count), Stack(count)
        self.classes: list[int] = []  # of each image read, where targets are classes
        self.indices: list[int] = []  # of each image read
        self.bad: list[Bad] = []
        self.files = files  # by the image's number in the ticket
        self.host_rows: list[int] = []  # beside files: the rows of what is decoded here, which `images` has in order

    def forget(self, rows: range) -> None:
        """Drops the crops of an image of which not all could be made."""
        self.host_rows = [row for row in self.host_rows if row not in rows]

    def row_of_image(self, row: int) -> int:
        """Where `images` holds a row of the batch."""
        if self.files is None:
            return row
        self.host_rows.append(row)
        return len(self.host_rows) - 1

    def decoded(self) -> Tensor:
        """The images that are decoded here: all rows, or beside files `host_rows`."""
        if self.files is None:
            assert self.images.tensor is not None
            return self.images.tensor
        return torch.empty(0) if self.images.tensor is None else self.images.tensor[: len(self.host_rows)]

    def left_to_device(self, ticket: Ticket) -> Files | None:
        if self.files is None:
            return None
        joined = bytearray().join(self.files.values())
        data = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        return Files(ticket, data, [len(f) for f in self.files.values()], list(self.files), self.host_rows)

    def label(self, repeats: int) -> Tensor:
        """The target of each row."""
        return torch.tensor(self.classes * repeats) if self.targets.tensor is None else self.targets.tensor


class Reader(Dataset):
    """A ticket to a batch: runs in the workers and makes every random choice.

    `by_phase` are the transforms of the phases of `batches`; a ticket of none has images of full size. With `files`
    those that a device decodes are left to it (see `mae.data.device_decode`).
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batches: Batches,
        by_phase: Sequence[Transform] = (),
        files: bool = False,
    ):
        self.source, self.transform, self.files = source, transform, files
        self.seed, self.masking, self.repeats = batches.seed, batches.masking, batches.repeats
        self.by_phase = by_phase
        self.masks: list[dict[str, object]] = [{"mask_ratio": ratio} for ratio in batches.mask_ratios]
        if batches.phases:
            self.masks = [{"mask_ratio": phase.mask_ratio, "grid": phase.grid} for phase in batches.phases]

    def __getitem__(self, ticket: Ticket) -> Loaded | Failure:
        try:
            return self.load(ticket)
        except UserError as error:
            if get_worker_info() is None:
                raise
            return Failure(str(error))

    def _numbers(self, ticket: Ticket) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of each repeat the keys (b,) of a ticket's samples, and their uniform numbers (b, 1 + DRAWS)."""
        keys = [rng.keys(self.seed, ticket.epoch, ticket.indices, 16 * r) for r in range(self.repeats)]
        return keys, [rng.uniform(key, DRAWS + 1) for key in keys]

    def draws(self, ticket: Ticket) -> list[list[Draw]]:
        """Of each repeat what the transform may use for each image."""
        return draws_of(*self._numbers(ticket))

    def load_on_host(self, ticket: Ticket, number: int) -> Loaded:
        """The samples of one of a ticket's images, which no device decodes."""
        alone = ticket._replace(indices=ticket.indices[number : number + 1])
        return self._load(alone, Samples(self.repeats, self.transform_of(ticket), None))

    def transform_of(self, ticket: Ticket) -> Transform:
        """The transform of a ticket's phase."""
        return self.transform if ticket.ratio is None or not self.by_phase else self.by_phase[ticket.ratio]

    def load(self, ticket: Ticket, over: threading.Event | None = None) -> Loaded:
        """The batch of a ticket; see `Loader`. Raises InterruptedError once `over` is set, when nobody waits for it."""
        count = len(ticket.indices) * self.repeats
        return self._load(ticket, Samples(count, self.transform_of(ticket), {} if self.files else None), over)

    def _load(self, ticket: Ticket, samples: Samples, over: threading.Event | None = None) -> Loaded:
        self.source.prefetch(self.seed, ticket.epoch // self.repeats, ticket.indices)
        count = len(ticket.indices)
        keys, numbers = self._numbers(ticket)
        lists = draws_of(keys, numbers)
        for row, index in enumerate(ticket.indices.tolist()):
            if over is not None and over.is_set():
                raise InterruptedError("the pass is over")
            self._add(index, [draws[row] for draws in lists], range(row, count * self.repeats, count), samples)
        batch = {
            "image": samples.decoded(),
            "flip": torch.from_numpy(np.concatenate([n[:, 0] < 0.5 for n in numbers]) & self.transform.hflip),
            "label": samples.label(self.repeats),
            "index": torch.tensor(samples.indices * self.repeats),
            "weight": torch.tensor(ticket.weight, dtype=torch.float32),
        }
        if self.masking is not None:
            streams = [STREAM_NOISE + 16 * r for r in range(self.repeats)]
            keys = [rng.keys(self.seed, ticket.epoch, ticket.indices, stream) for stream in streams]
            settings = {} if ticket.ratio is None else self.masks[ticket.ratio]
            batch["noise"] = torch.from_numpy(self.masking(np.concatenate(keys), **settings))
        if ticket.ratio is not None:
            batch["ratio"] = torch.empty(ticket.ratio, 0)  # a length, which the host knows without asking the device
        return Loaded(batch, samples.bad, samples.left_to_device(ticket))

    def _add(self, index: int, draws: list[Draw], rows: range, samples: Samples) -> None:
        """Puts the crops of an image into their rows. An image that cannot be used is replaced by the first usable one
        of a sequence that is a function of its index alone. Raises UserError where there is none."""
        for attempt in range(MAX_REPLACEMENTS):
            try:
                if samples.files is not None and self._put_file(index, rows, samples):
                    return
                self._put_crops(index, draws, rows, samples)
                return
            except FAILURES as error:
                if limit := limits.limit_reached(error):  # no fault of the image
                    raise UserError(limit) from error
                samples.bad.append(Bad(index, self.source.name(index), reason(error)))
            key = rng.keys(self.seed, attempt, np.array([index]), STREAM_REPLACE)
            index = int(key[0] % np.uint64(len(self.source)))
        tried = samples.bad[-MAX_REPLACEMENTS:]  # of a small source some are the same
        first, count = tried[0], len({bad.sample_index for bad in tried})
        if count == 1:
            raise UserError(f"{first.name} cannot be used: {first.reason}.")
        raise UserError(f"{count} images in a row cannot be used, the first of them {first.name}: {first.reason}.")

    def _put_file(self, index: int, rows: range, samples: Samples) -> bool:
        """Leaves an image to the device, if that decodes it. Raises BadImage or OSError."""
        encoded, decoder = self.source.encoded(index), self.source.decoder
        if encoded is None or not isinstance(decoder, Decoder) or decoder.on_device(encoded[0]) is None:
            return False
        data, target = encoded
        assert samples.files is not None
        samples.files[rows.start] = data
        samples.indices.append(index)
        if isinstance(target, Tensor):
            for row in rows:
                self._put_target(row, target, None, index, samples)
        else:
            samples.classes.append(target)
        return True

    def _put_crops(self, index: int, draws: list[Draw], rows: range, samples: Samples) -> None:
        transform = samples.transform
        box = transform.box(draws[0]) if self.repeats == 1 else None  # else several boxes of one decoded image
        image, target = self.source.region(index, box) if box else self.source[index]
        if is_map(target) and target.shape[-2:] != image.shape[-2:]:
            sizes = [f"{h} x {w}" for h, w in (target.shape[-2:], image.shape[-2:])]
            raise BadImage(f"its target is a map of {sizes[0]} pixels, and the image has {sizes[1]}")
        samples.forget(rows)
        for row, draw in zip(rows, draws, strict=True):
            region, region_target = image, target
            if self.repeats > 1 and (box := transform.box(draw)):
                region, region_target = inside(image, box), crop_target(target, box)
            image_row = samples.row_of_image(row)
            crop = transform(region, draw, samples.images.row(image_row))
            self._check_type(crop, samples.images.tensor, index, samples)
            samples.images.put(image_row, crop)
            if isinstance(region_target, Tensor):
                self._put_target(row, region_target, draw, index, samples)
        samples.indices.append(index)
        if not isinstance(target, Tensor):
            samples.classes.append(target)

    def _put_target(self, row: int, target: Tensor, draw: Draw | None, index: int, samples: Samples) -> None:
        """`draw` is that of a map, which is cropped."""
        result = samples.transform.target(target, draw) if draw is not None and is_map(target) else target
        targets = samples.targets.tensor
        self._check_type(result, targets, index, samples)
        if targets is not None and result.shape != targets.shape[1:]:
            shapes = [" x ".join(map(str, shape)) for shape in (targets.shape[1:], result.shape)]
            raise UserError(f"the target of {self.source.name(index)} is {shapes[1]}, and others are {shapes[0]}.")
        samples.targets.put(row, result)

    def _check_type(self, sample: Tensor, others: Tensor | None, index: int, samples: Samples) -> None:
        """Raises UserError where a sample is of another type than those before it: its numbers would be cut."""
        if others is None or sample.dtype == others.dtype:
            return
        types = [str(dtype).removeprefix("torch.") for dtype in (others.dtype, sample.dtype)]
        first, second = (self.source.name(k) for k in (samples.indices[0] if samples.indices else index, index))
        raise UserError(f"{first} holds {types[0]} and {second} {types[1]}: all files must be of one type.")


def draws_of(keys: list[np.ndarray], numbers: list[np.ndarray]) -> list[list[Draw]]:
    """Of each repeat the draws of samples with these keys (b,) and uniform numbers (b, 1 + DRAWS)."""
    return [
        [Draw(row, key) for row, key in zip(n[:, 1:].tolist(), k.tolist(), strict=True)]
        for k, n in zip(keys, numbers, strict=True)
    ]


class Record:
    """Bad images seen so far: each written once to `bad_files.csv`, and an error when they are too many."""

    def __init__(
        self,
        count: int,
        max_bad_fraction: float,
        path: str | Path | None,
        split: str = "train",
        world: int = 1,
        repeats: int = 1,
    ):
        self.limit, self.path, self.split = max_bad_fraction, path, split
        self.judged = min(-(-count // world), MIN_JUDGED)  # a rank sees its share of an epoch
        self.repeats = repeats
        self.bad: dict[int, Bad] = {}
        self.seen = 0  # different images read, bad ones too
        self.met = np.zeros(count, bool)  # which those are: a rank meets some again before it has met all
        self.listed = listed(path, split)  # by earlier attempts of the run

    def receive(self, loaded: Loaded | Failure) -> Batch:
        """The batch, once its bad images are recorded. Raises UserError."""
        if isinstance(loaded, Failure):
            raise UserError(loaded.message)
        batch, bad = loaded.batch, loaded.bad
        for image in bad:
            if image.sample_index not in self.bad:
                self.bad[image.sample_index] = image
                log.warning("passed over %s: %s", image.name, image.reason)
                self._write(image)
        read = batch["index"].numpy()[: len(batch["index"]) // self.repeats]  # one crop of each image
        read = np.concatenate([read, np.array([image.sample_index for image in bad], np.int64)])
        new = np.unique(read[~self.met[read]])
        self.met[new] = True
        self.seen += len(new)
        share = len(self.bad) / max(1, self.seen)
        if share > self.limit and len(self.bad) > self.limit * self.judged:
            names = ", ".join(f"{b.name} ({b.reason})" for b in list(self.bad.values())[:3])
            raise UserError(
                f"{len(self.bad)} of the {self.seen} images read so far cannot be used, more than "
                f"data.max_bad_fraction={self.limit:g} allows; the first: {names}. bad_files.csv lists them. "
                "Mend or remove them, or raise data.max_bad_fraction."
            )
        return batch

    def _write(self, image: Bad) -> None:
        if self.path is None or image.name in self.listed:
            return
        self.listed.add(image.name)
        new = not os.path.exists(self.path)
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(BAD_COLUMNS)
            writer.writerow((*image, self.split))


def listed(path: str | Path | None, split: str) -> set[str]:
    """The names that a `bad_files.csv` holds of the training or validation images."""
    if path is None or not os.path.exists(path):
        return set()
    with open(path, newline="", errors="replace") as file:
        return {str(row["name"]) for row in csv.DictReader(file) if row.get("part") == split}
