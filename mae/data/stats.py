"""What a data set is like: mean and deviation of its channels, sizes, classes, and how fast it loads."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae.data.dataset import Bad
from mae.data.loader import Loader
from mae.data.prepare import flipped
from mae.data.source import FAILURES, Source, reason

BLOCK = 1 << 20  # pixels of which sums are taken at once: a large image does not become an eightfold one


class Moments(NamedTuple):
    """Of values of some channels."""

    num_pixels: int
    mean: np.ndarray  # (C,) float64
    square: np.ndarray  # (C,) float64, sum of squared deviations

    def merged(self, other: "Moments") -> "Moments":
        """Of both together (Chan, Golub and LeVeque 1979)."""
        total = self.num_pixels + other.num_pixels
        if not total:
            return self
        shift = other.mean - self.mean
        square = self.square + other.square + shift**2 * (self.num_pixels * other.num_pixels / total)
        return Moments(total, self.mean + shift * (other.num_pixels / total), square)

    @staticmethod
    def of(image: Tensor) -> "Moments":
        """Of an image (C, H, W), integer values divided by the type's largest."""
        top = 1.0 if image.is_floating_point() else float(torch.iinfo(image.dtype).max)
        flat = image.numpy().reshape(len(image), -1)
        moments = Moments(0, np.zeros(len(image)), np.zeros(len(image)))
        for start in range(0, flat.shape[1], BLOCK):
            values = flat[:, start : start + BLOCK].astype(np.float64) / top
            mean = values.mean(1)
            moments = moments.merged(Moments(values.shape[1], mean, ((values - mean[:, None]) ** 2).sum(1)))
        return moments


class Statistics(NamedTuple):
    """Of the images read."""

    moments: Moments
    images: int
    bad: list[Bad]
    sizes: Counter  # (height, width) -> images
    dtype: str

    @property
    def mean(self) -> list[float]:
        """One a channel, as `data.mean` wants it."""
        return self.moments.mean.tolist()

    @property
    def std(self) -> list[float]:
        """One a channel, as `data.std` wants it."""
        return np.sqrt(self.moments.square / max(1, self.moments.num_pixels)).tolist()

    def merged(self, other: "Statistics") -> "Statistics":
        """Of both together, such as two ranks' parts."""
        if not self.images or not other.images:  # the number of channels of nothing is not known
            first, second = (self, other) if self.images else (other, self)
            return first._replace(bad=second.bad + first.bad)
        return Statistics(
            self.moments.merged(other.moments),
            self.images + other.images,
            self.bad + other.bad,
            self.sizes + other.sizes,
            self.dtype,
        )


class Observer(Protocol):
    """Who looks at the images of a pass beside their statistics."""

    def crop(self, index: int, image: Tensor) -> Tensor | None:
        """What it wants of an image, called by threads; None for nothing."""

    def add(self, crop: Tensor) -> None:
        """Takes what it wanted, in the order of the images."""


def statistics(source: Source, indices: np.ndarray, workers: int = 1, observer: Observer | None = None) -> Statistics:
    """One pass over the images of these numbers, in float64, by `workers` threads.

    Every pixel counts alike, so that large images weigh more. Those that cannot be read are listed.
    """

    def measured(index: int) -> tuple[Moments, tuple[int, int], str, Tensor | None] | Bad:
        try:
            image = source[index][0]
        except FAILURES as error:
            return Bad(index, source.name(index), reason(error))
        crop = observer.crop(index, image) if observer else None
        return Moments.of(image), (image.shape[1], image.shape[2]), str(image.dtype).removeprefix("torch."), crop

    total = Statistics(Moments(0, np.zeros(1), np.zeros(1)), 0, [], Counter(), "")
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in range(0, len(indices), 256):  # so that results do not pile up
            for result in pool.map(measured, indices[start : start + 256].tolist()):
                if isinstance(result, Bad):
                    total.bad.append(result)
                    continue
                moments, size, dtype, crop = result
                if observer and crop is not None:
                    observer.add(crop)
                total = total.merged(Statistics(moments, 1, [], Counter([size]), dtype))
    return total


def class_counts(source: Source) -> dict[str, int]:
    """Class -> images; empty where unlabelled."""
    if source.labels is None:
        return {}
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    return dict(zip(source.classes, counts.tolist(), strict=True))


def loading_speed(make: Callable[[int], Loader], workers: list[int], batches: int = 20) -> dict[int, float]:
    """Images a second with each number of workers; `make` gives a fresh loader for a number.

    As many batches as there are workers go first uncounted: they started together and come together.
    """
    speeds = {}
    for first, count in enumerate(workers, start=1):  # each in another epoch: what was read lies in memory
        loader = make(count)
        stream = (batch for epoch in itertools.count(first) for step in loader.steps(epoch) for batch in step)
        for _ in range(max(1, count)):
            next(stream)
        start = time.perf_counter()
        images = sum(len(batch["image"]) for batch in itertools.islice(stream, max(batches, 2 * count)))
        speeds[count] = images / (time.perf_counter() - start)
        stream.close()
        loader.close()
    return speeds


def worker_counts(most: int) -> Iterator[int]:
    """1 to `most`: each up to 4, then doubling, and the last."""
    count = 1
    while count < most:
        yield count
        count = count + 1 if count < 4 else 2 * count
    yield most


def contact_sheet(images: Tensor, flip: Tensor | None = None, columns: int = 8, gap: int = 2) -> Image.Image:
    """Samples as the model gets them, before normalisation, side by side.

    images: (B, C, H, W) of any type. One channel is shown grey, three in colour, of others the first three;
    what is not 8 bit is stretched between its 2nd and 98th percentile.
    """
    if flip is not None:
        images = flipped(images, flip)
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1].repeat_interleave(3, 1)
    if shown.dtype != torch.uint8:
        values = shown.to(torch.float32).numpy()
        low, high = np.percentile(values, [2, 98])
        shown = torch.from_numpy(np.clip((values - low) / max(high - low, 1e-12) * 255, 0, 255).astype(np.uint8))
    count, _, height, width = shown.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for k, image in enumerate(shown.permute(0, 2, 3, 1).numpy()):
        top, left = gap + k // columns * (height + gap), gap + k % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)
