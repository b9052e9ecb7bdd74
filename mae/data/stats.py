"""What a data set is like: mean and deviation of its channels, sizes, classes, and how fast it loads."""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae.data.loader import Loader
from mae.data.source import BadImage, Source


class Statistics(NamedTuple):
    """Of the images read."""

    mean: list[float]  # one a channel, as `data.mean` wants it
    std: list[float]
    images: int
    bad: int
    sizes: Counter  # (height, width) -> images
    dtype: str


class _One(NamedTuple):
    count: int  # pixels
    mean: np.ndarray  # (C,)
    square: np.ndarray  # (C,) sum of squared deviations
    size: tuple[int, int]
    dtype: str


def statistics(source: Source, limit: int | None = None, workers: int = 4, seed: int = 0) -> Statistics:
    """One pass over the images, or over `limit` of them chosen by seed, in float64.

    Values of integer images are divided by the type's largest. Raises ValueError where no image is readable.
    """
    indices = np.random.default_rng(seed).permutation(len(source))[:limit]

    def one(index: int) -> _One | None:
        try:
            image = source[index][0]
        except (BadImage, OSError):
            return None
        top = 1.0 if image.is_floating_point() else float(torch.iinfo(image.dtype).max)
        values = image.numpy().reshape(len(image), -1).astype(np.float64) / top
        mean = values.mean(1)
        square = ((values - mean[:, None]) ** 2).sum(1)
        return _One(values.shape[1], mean, square, (image.shape[1], image.shape[2]), str(image.dtype))

    count, bad, sizes, dtype = 0, 0, Counter(), ""
    mean, square = np.zeros(1), np.zeros(1)
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(indices), 256):  # so that results do not pile up
            for part in pool.map(one, indices[start : start + 256].tolist()):
                if part is None:
                    bad += 1
                    continue
                # the parts' merge of Chan, Golub and LeVeque 1979
                shift, total = part.mean - mean, count + part.count
                square = square + part.square + shift**2 * (count * part.count / total)
                mean = mean + shift * (part.count / total)
                count, dtype = total, part.dtype
                sizes[part.size] += 1
    if not count:
        raise ValueError(f"none of the {len(indices)} images can be read.")
    std = np.sqrt(square / count)
    return Statistics(mean.tolist(), std.tolist(), len(indices) - bad, bad, sizes, dtype)


def class_counts(source: Source) -> dict[str, int]:
    """Class -> images; empty where unlabelled."""
    if source.labels is None:
        return {}
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    return dict(zip(source.classes, counts.tolist(), strict=True))


def loading_speed(make: Callable[[int], Loader], workers: list[int], batches: int = 20) -> dict[int, float]:
    """Images a second with each number of workers; `make` gives a fresh loader for a number."""
    found = {}
    for count in workers:
        loader = make(count)
        made = (batch for epoch in itertools.count() for step in loader.steps(epoch) for batch in step)
        next(made)  # the workers' start is not counted
        start = time.perf_counter()
        images = sum(len(batch["image"]) for batch in itertools.islice(made, batches))
        found[count] = images / (time.perf_counter() - start)
        made.close()
        loader.close()
    return found


def contact_sheet(images: Tensor, flip: Tensor | None = None, columns: int = 8, gap: int = 2) -> Image.Image:
    """Samples as the model gets them, before normalisation, side by side.

    images: (B, C, H, W) of any type. One channel is shown grey, three in colour, of others the first three;
    what is not 8 bit is stretched between its 2nd and 98th percentile.
    """
    if flip is not None:
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
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
