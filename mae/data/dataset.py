"""One micro-batch from its ticket: reading, replacing what cannot be read, and all that is random."""

import csv
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from mae import limits
from mae.data import rng, transforms
from mae.data.batch_buffer import Stack
from mae.data.crops import inside
from mae.data.sampler import Ticket
from mae.data.source import FAILURES, Source, part, reason

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
STREAM_SAMPLE, STREAM_NOISE, STREAM_REPLACE = 0, 1, 2  # uses of chance; repeats shift by 16 each
MAX_REPLACEMENTS = 100  # tries at a readable image before the data set is given up
MIN_JUDGED = 10_000  # images over which the share of bad ones is judged at least, or all if fewer


class Bad(NamedTuple):
    """An image that was replaced."""

    index: int
    name: str
    reason: str


class Failure(NamedTuple):
    """A user's error in a worker, sent home whole instead of as a traceback in a traceback."""

    message: str


class Reader(Dataset):
    """A ticket to a batch: runs in the workers and holds all that is random."""

    def __init__(
        self,
        source: Source,
        transform: Callable[..., Tensor],
        seed: int,
        num_patches: int | None,
        repeats: int = 1,
    ):
        self.source, self.transform, self.seed = source, transform, seed
        self.num_patches, self.repeats = num_patches, repeats
        self.fills = getattr(transform, "fills", False)  # whether it writes its result where it is told to

    def __getitem__(self, ticket: Ticket) -> dict[str, Any] | Failure:
        try:
            return self.batch(ticket)
        except ValueError as error:
            if get_worker_info() is None:
                raise
            return Failure(str(error))

    def batch(self, ticket: Ticket, over: threading.Event | None = None) -> dict[str, Any]:
        """Raises InterruptedError as soon as nobody waits for it any more."""
        if hasattr(self.source, "ahead"):  # a source that fetches what comes next meanwhile
            self.source.ahead(self.seed, ticket.epoch // self.repeats, ticket.indices)  # type: ignore[attr-defined]
        wanted = ticket.indices.tolist()
        taken, labels, bad, stack = [], [], [], Stack(len(wanted) * self.repeats)
        keys = [rng.keys(self.seed, ticket.epoch, ticket.indices, 16 * r) for r in range(self.repeats)]
        numbers = [rng.uniform(key, transforms.DRAWS + 1) for key in keys]
        draws = [n[:, 1:].tolist() for n in numbers]
        for k, index in enumerate(wanted):
            if over is not None and over.is_set():
                raise InterruptedError("the pass is over")
            drawn = [transforms.Draw(draws[r][k], int(keys[r][k])) for r in range(self.repeats)]
            places = range(k, stack.count, len(wanted))
            index, label = self._filled(index, drawn, stack, places, bad, taken)
            taken.append(index)
            labels.append(label)
        hflip = getattr(self.transform, "hflip", False)
        batch: dict[str, Any] = {
            "image": stack.images,
            "flip": torch.from_numpy(np.concatenate([n[:, 0] < 0.5 for n in numbers]) & hflip),
            "label": torch.tensor(labels * self.repeats),
            "index": torch.tensor(taken * self.repeats),
            "weight": torch.tensor(ticket.weight, dtype=torch.float32),
            "bad": bad,
        }
        if self.num_patches is not None:
            streams = [STREAM_NOISE + 16 * r for r in range(self.repeats)]
            noise = [rng.keys(self.seed, ticket.epoch, ticket.indices, s) for s in streams]
            noise = rng.uniform(np.concatenate(noise), self.num_patches).astype(np.float32)
            batch["noise"] = torch.from_numpy(noise)
        return batch

    def _two_types(self, first: int, type_: torch.dtype, other: int, another: torch.dtype) -> NoReturn:
        types = [str(one).removeprefix("torch.") for one in (type_, another)]
        names = [self.source.name(k) for k in (first, other)]
        raise ValueError(f"{names[0]} holds {types[0]} and {names[1]} {types[1]}: all files must be of one type.")

    def _filled(
        self, index: int, draws: list[transforms.Draw], stack: Stack, places: range, bad: list[Bad], taken: list[int]
    ) -> tuple[int, int]:
        """Puts the crops of an image where they belong; or those of the first usable image of a sequence that is a
        function of its index alone. The image's number, and its label."""
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return index, self._transformed(index, draws, stack, places, taken)
            except FAILURES as error:
                if limit := limits.limit_reached(error):  # no fault of the image
                    raise ValueError(limit) from error
                bad.append(Bad(index, self.source.name(index), reason(error)))
            key = rng.keys(self.seed, attempt, np.array([index]), STREAM_REPLACE)
            index = int(key[0] % np.uint64(len(self.source)))
        raise ValueError(
            f"{MAX_REPLACEMENTS} images in a row cannot be used, the first of them {bad[0].name}: {bad[0].reason}."
        )

    def _transformed(
        self, index: int, draws: list[transforms.Draw], stack: Stack, places: range, taken: list[int]
    ) -> int:
        """Puts the crops of an image where they belong. Its label."""
        find = getattr(self.transform, "box", None)  # the part of an image that the transform looks at
        once = partial(find, draw=draws[0]) if find and self.repeats == 1 else None
        image, label = part(self.source, index, once) if once else self.source[index]
        for place, draw in zip(places, draws, strict=True):
            seen = inside(image, partial(find, draw=draw)) if find and not once else image
            given = {"out": stack.room(place)} if self.fills else {}
            made = self.transform(seen, draw, **given)
            if stack.images is not None and made.dtype != stack.images.dtype:  # its numbers would be cut
                self._two_types(taken[0] if taken else index, stack.images.dtype, index, made.dtype)
            stack.put(place, made)
        return label


class Record:
    """Bad images seen so far: each written once to `bad_files.csv`, and an error when they are too many."""

    def __init__(
        self,
        count: int,
        max_bad_fraction: float,
        path: str | Path | None,
        part: str = "train",
        world: int = 1,
        repeats: int = 1,
    ):
        self.limit, self.path, self.part = max_bad_fraction, path, part
        self.judged = min(-(-count // world), MIN_JUDGED)  # a rank sees its share of an epoch
        self.repeats = repeats
        self.bad: dict[int, Bad] = {}
        self.seen = 0  # different images read, bad ones too
        self.met = np.zeros(count, bool)  # which those are: a rank meets some again before it has met all
        self.listed = listed(path, part)  # by earlier attempts of the run

    def receive(self, batch: Any) -> Batch:
        """The batch without its note of bad images. Raises ValueError."""
        if isinstance(batch, Failure):
            raise ValueError(batch.message)
        bad = batch.pop("bad")
        for one in bad:
            if one[0] not in self.bad:
                self.bad[one[0]] = Bad(*one)
                log.warning("passed over %s: %s", one[1], one[2])
                self._write(Bad(*one))
        read = batch["index"].numpy()[: len(batch["index"]) // self.repeats]  # one crop of each image
        read = np.concatenate([read, np.array([one[0] for one in bad], np.int64)])
        new = np.unique(read[~self.met[read]])
        self.met[new] = True
        self.seen += len(new)
        share = len(self.bad) / max(1, self.seen)
        if share > self.limit and len(self.bad) > self.limit * self.judged:
            names = ", ".join(f"{b.name} ({b.reason})" for b in list(self.bad.values())[:3])
            raise ValueError(
                f"{len(self.bad)} of the {self.seen} images read so far cannot be used, more than "
                f"data.max_bad_fraction={self.limit:g} allows; the first: {names}."
            )
        return batch

    def _write(self, one: Bad) -> None:
        if self.path is None or one.name in self.listed:
            return
        self.listed.add(one.name)
        new = not os.path.exists(self.path)
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow((*Bad._fields, "part"))
            writer.writerow((*one, self.part))


def listed(path: str | Path | None, part: str) -> set[str]:
    """The names that a `bad_files.csv` holds of the training or validation images."""
    if path is None or not os.path.exists(path):
        return set()
    with open(path, newline="", errors="replace") as file:
        return {str(row["name"]) for row in csv.DictReader(file) if row.get("part") == part}
