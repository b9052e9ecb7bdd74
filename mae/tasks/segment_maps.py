"""Maps of classes that a segmenter predicts: at an image's own size, by sliding window."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae.data.prepare import Prepare
from mae.data.source import IGNORED
from mae.data.transforms import WholeImage
from mae.device import Batch
from mae.distributed.ranks import Ranks
from mae.metrics import PixelCounter, PixelResults
from mae.models.segmenter import Segmenter, sliding_logits
from mae.tasks.base import Autocast
from mae.tasks.images import save_rows

WINDOWS = 16  # computed at a time
SHOWN = 256  # pixels of the longer side of an image in a sheet of overlays
STRENGTH = 0.6  # of a class's colour over the image


@torch.no_grad()
def full_size_logits(
    model: Segmenter, images: Tensor, size: tuple[int, int], stride: float, windows: int = WINDOWS
) -> Tensor:
    """Logits (B, classes, *size) of normalised images (B, C, H, W) that are at least as large as a window.

    `stride` is the step between windows as a share of a window's side; `windows` are computed at a time."""
    height, width = model.patch_embed.img_size  # type: ignore[misc]
    steps = max(1, round(height * stride)), max(1, round(width * stride))
    logits = sliding_logits(model, images, steps, windows)
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def predict_maps(
    model: Segmenter,
    prepare: Callable[[Tensor], Tensor],
    images: Iterable[Tensor],
    *,
    eval_size: int | None,
    eval_stride: float,
    autocast: Autocast = nullcontext,
) -> Iterator[Tensor]:
    """The class of each pixel (H, W) uint8, on the host, of images (C, H, W) of any size as a source has them.

    The model is in evaluation mode, and on the same device as `prepare`. `eval_size` and `eval_stride` are the keys of
    task=segment. For the bits of task=evaluate, `autocast` must be its own.
    """
    sizes = model.patch_embed.img_size
    whole = WholeImage(img_size=[*sizes], eval_size=eval_size)  # type: ignore[misc]
    weight = next(model.parameters())
    for image in images:
        pixels = prepare(whole(image)[None].to(weight.device)).to(weight.dtype)
        with autocast():
            logits = full_size_logits(model, pixels, (image.shape[-2], image.shape[-1]), eval_stride)
        yield logits[0].argmax(0).to(torch.uint8).cpu()


@torch.no_grad()
def count_pixels(
    model: Segmenter,
    prepare: Prepare,
    batches: Iterable[Batch],
    ranks: Ranks,
    autocast: Autocast,
    stride: float,
    overlays: "Overlays",
    windows: int = WINDOWS,
) -> PixelResults | None:
    """Counts of whole images over all ranks; `batches` are one image each, each image once."""
    counter = PixelCounter(model.decode_head.num_classes)
    overlays.clear()
    dtype = next(model.parameters()).dtype
    for batch in batches:
        index = int(batch["index"][0])
        label, images = batch["label"], prepare(batch["image"]).to(dtype)
        with autocast():
            logits = full_size_logits(model, images, (label.shape[-2], label.shape[-1]), stride, windows)
        counter.add(label, logits)
        if index in overlays.wanted:
            overlays.add(batch["image"][0], label[0], logits[0].argmax(0))
    overlays.gather(ranks)
    return counter.results(ranks)


class Overlays:
    """Images, truth and prediction side by side, of images spread over the validation set."""

    def __init__(self, total: int, num_images: int):
        self.wanted = {round(k * (total - 1) / max(1, num_images - 1)) for k in range(num_images)}
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def clear(self) -> None:
        self.rows = []

    def add(self, image: Tensor, label: Tensor, predicted: Tensor) -> None:
        """An image (C, H, W) as the source has it, or enlarged, with its map and the predicted one (h, w)."""
        scale = min(1.0, SHOWN / max(label.shape))
        size = [max(1, round(side * scale)) for side in label.shape]
        pixels = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0]
        low, high = pixels.amin(), pixels.amax()
        shown = (pixels - low) / (high - low).clamp(min=1e-6) if image.dtype != torch.uint8 else pixels / 255
        maps = [F.interpolate(m[None, None].float(), size=size)[0, 0].to(torch.uint8).cpu() for m in (label, predicted)]
        self.rows.append((shown.cpu().numpy(), maps[0].numpy(), maps[1].numpy()))

    def gather(self, ranks: Ranks) -> None:
        """Takes those of all ranks, on every rank."""
        self.rows = [row for rows in ranks.gather(self.rows) for row in rows]

    def save(self, path: Path, classes: int) -> bool:
        """Writes them as a PNG; returns whether there were any."""
        if not self.rows:
            return False
        height, width = (max(row[1].shape[axis] for row in self.rows) for axis in (0, 1))
        cells: dict[str, list[Tensor]] = {"image": [], "truth": [], "prediction": []}
        for pixels, label, predicted in self.rows:
            grey = torch.from_numpy(pixels)
            image = grey if len(grey) == 3 else grey.mean(0, keepdim=True).expand(3, -1, -1)
            pad = (0, width - image.shape[2], 0, height - image.shape[1])
            for title, values in (("image", None), ("truth", label), ("prediction", predicted)):
                shown = image if values is None else overlay(image, values, classes)
                cells[title].append(F.pad(shown, pad, value=1.0))
        save_rows({title: torch.stack(images) for title, images in cells.items()}, path)
        return True


def overlay(image: Tensor, values: np.ndarray, classes: int) -> Tensor:
    """An image (3, H, W) in [0, 1] with each pixel tinted by its class (H, W); ignored pixels white."""
    colours = palette(classes)[np.minimum(values, classes)]
    tint = torch.from_numpy(colours).permute(2, 0, 1)
    return torch.where(torch.from_numpy(values == IGNORED), 1.0, (1 - STRENGTH) * image + STRENGTH * tint)


def palette(classes: int) -> np.ndarray:
    """Colours (classes + 1, 3) in [0, 1]: class 0 black, the others by matplotlib's tab20 or a wheel of hues."""
    from matplotlib import colormaps  # slow to import

    chosen = colormaps["tab10" if classes <= 11 else "tab20" if classes <= 21 else "hsv"]
    numbers = np.arange(classes)
    colours = chosen(numbers) if classes <= 21 else chosen(numbers * 0.618 % 1)  # neighbours far apart
    return np.concatenate([np.zeros((1, 3)), colours[:, :3]]).astype(np.float32)
