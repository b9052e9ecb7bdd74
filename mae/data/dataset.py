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


class Loaded(NamedTuple):
    """What a worker sends: a batch, and the images that it could not use."""

    batch: Batch
    bad: list[Bad]


class Failure(NamedTuple):
    """A user error in a worker, returned as a value so that the main process can raise it."""

    message: str


class Samples:
    """The samples of a batch while they are made, `count` rows."""

    def __init__(self, count: int, transform: Transform):
        self.transform = transform
        self.images, self.targets = Stack(count), Stack(count)
        self.classes: list[int] = []  # of each image read, where targets are classes
        self.indices: list[int] = []  # of each image read
        self.bad: list[Bad] = []

    def label(self, repeats: int) -> Tensor:
        """The target of each row."""
        return torch.tensor(self.classes * repeats) if self.targets.tensor is None else self.targets.tensor


class Reader(Dataset):
    """A ticket to a batch: runs in the workers and makes every random choice.

    `by_phase` are the transforms of the phases of `batches`; a ticket of none has images of full size.
    """

    def __init__(self, source: Source, transform: Transform, batches: Batches, by_phase: Sequence[Transform] = ()):
        self.source, self.transform = source, transform
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

    def load(self, ticket: Ticket, over: threading.Event | None = None) -> Loaded:
        """The batch of a ticket; see `Loader`. Raises InterruptedError once `over` is set, when nobody waits for it."""
        self.source.prefetch(self.seed, ticket.epoch // self.repeats, ticket.indices)
        count = len(ticket.indices)
        of_phase = None if ticket.ratio is None or not self.by_phase else self.by_phase[ticket.ratio]
        samples = Samples(count * self.repeats, of_phase or self.transform)
        keys = [rng.keys(self.seed, ticket.epoch, ticket.indices, 16 * r) for r in range(self.repeats)]
        numbers = [rng.uniform(key, DRAWS + 1) for key in keys]
        lists = [n[:, 1:].tolist() for n in numbers]
        for row, index in enumerate(ticket.indices.tolist()):
            if over is not None and over.is_set():
                raise InterruptedError("the pass is over")
            draws = [Draw(lists[r][row], int(keys[r][row])) for r in range(self.repeats)]
            self._add(index, draws, range(row, count * self.repeats, count), samples)
        assert samples.images.tensor is not None
        batch = {
            "image": samples.images.tensor,
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
        return Loaded(batch, samples.bad)

    def _add(self, index: int, draws: list[Draw], rows: range, samples: Samples) -> None:
        """Puts the crops of an image into their rows. An image that cannot be used is replaced by the first usable one
        of a sequence that is a function of its index alone. Raises UserError where there is none."""
        for attempt in range(MAX_REPLACEMENTS):
            try:
                self._put_crops(index, draws, rows, samples)
                return
            except FAILURES as error:
                if limit := limits.limit_reached(error):  # no fault of the image
                    raise UserError(limit) from error
                samples.bad.append(Bad(index, self.source.name(index), reason(error)))
            key = rng.keys(self.seed, attempt, np.array([index]), STREAM_REPLACE)
            index = int(key[0] % np.uint64(len(self.source)))
        first = samples.bad[0]
        raise UserError(
            f"{MAX_REPLACEMENTS} images in a row cannot be used, the first of them {first.name}: {first.reason}."
        )

    def _put_crops(self, index: int, draws: list[Draw], rows: range, samples: Samples) -> None:
        transform = samples.transform
        box = transform.box(draws[0]) if self.repeats == 1 else None  # else several boxes of one decoded image
        image, target = self.source.region(index, box) if box else self.source[index]
        if is_map(target) and target.shape[-2:] != image.shape[-2:]:
            sizes = [f"{h} x {w}" for h, w in (target.shape[-2:], image.shape[-2:])]
            raise BadImage(f"its target is a map of {sizes[0]} pixels, and the image has {sizes[1]}")
        for row, draw in zip(rows, draws, strict=True):
            region, region_target = image, target
            if self.repeats > 1 and (box := transform.box(draw)):
                region, region_target = inside(image, box), crop_target(target, box)
            crop = transform(region, draw, samples.images.row(row))
            self._check_type(crop, samples.images.tensor, index, samples)
            samples.images.put(row, crop)
            if isinstance(region_target, Tensor):
                self._put_target(row, region_target, draw, index, samples)
        samples.indices.append(index)
        if not isinstance(target, Tensor):
            samples.classes.append(target)

    def _put_target(self, row: int, target: Tensor, draw: Draw, index: int, samples: Samples) -> None:
        result = samples.transform.target(target, draw) if is_map(target) else target
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
        batch, bad = loaded
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
                f"data.max_bad_fraction={self.limit:g} allows; the first: {names}."
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
