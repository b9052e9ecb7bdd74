"""Figures of a classifier, exact over any number of ranks: each image counts once, in the data set's order."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae.device import exact

if TYPE_CHECKING:
    from mae.distributed.ranks import Ranks

MISS = 1 << 30  # the rank of a class where a logit is not a number: behind any other


@dataclass
class Results:
    """Predictions of a classifier, ordered by the image's index. All arrays are (N,)."""

    index: np.ndarray  # int64: the image's number in the data set
    label: np.ndarray  # int64: its class
    predicted: np.ndarray  # int64: the class of the largest logit
    true_rank: np.ndarray  # int64: how many classes scored higher than its own; 0 is a hit
    loss: np.ndarray  # float64: cross-entropy without smoothing
    confidence: np.ndarray  # float64: softmax of the largest logit; 0 where a logit is no number

    def __len__(self) -> int:
        return len(self.index)

    def top(self, k: int) -> float:
        """Top-k accuracy in percent."""
        return 100.0 * float((self.true_rank < k).mean())

    def mean_loss(self) -> float:
        """Mean cross-entropy, to six significant digits: batches of other sizes round differently beyond them."""
        return float(f"{self.loss.mean():.6g}")

    def metrics(self) -> dict[str, float]:
        """top1 and top5 in percent, and loss."""
        return {"top1": self.top(1), "top5": self.top(5), "loss": self.mean_loss()}

    def per_class(self, classes: int) -> np.ndarray:
        """(classes, 2) int64: images of each class, and of these the hits."""
        count = np.bincount(self.label, minlength=classes)
        hits = np.bincount(self.label[self.true_rank == 0], minlength=classes)
        return np.stack([count, hits], 1)

    def confusion(self, classes: int) -> np.ndarray:
        """(classes, classes) int64: row the true class, column the predicted one."""
        cells = np.bincount(self.label * classes + self.predicted, minlength=classes**2)
        return cells.reshape(classes, classes)

    def calibration(self, bins: int) -> tuple[float, np.ndarray]:
        """Expected calibration error (Guo et al., 2017, equation 3) and (bins, 3): images, confidence, accuracy."""
        number = np.minimum((self.confidence * bins).astype(np.int64), bins - 1)  # of each image's bin
        count = np.bincount(number, minlength=bins)
        safe = np.maximum(count, 1)
        confidence = np.bincount(number, self.confidence, bins) / safe
        accuracy = np.bincount(number, (self.true_rank == 0).astype(float), bins) / safe
        error = float((count * np.abs(accuracy - confidence)).sum() / max(1, len(self)))
        return error, np.stack([count, confidence, accuracy], 1)


class Collector:
    """Collects predictions batch by batch, without waiting for the device."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, ...]] = []

    def add(self, index: Tensor, label: Tensor, logits: Tensor) -> None:
        """index, label (B,) int64 and logits (B, C)."""
        logits = logits.float()
        own = logits.gather(1, label[:, None])
        earlier = torch.arange(logits.shape[1], device=logits.device) < label[:, None]
        true_rank = ((logits > own) | ((logits == own) & earlier)).sum(1)
        finite = logits.isfinite().all(1)
        true_rank = torch.where(finite, true_rank, MISS)  # NaN is a miss, not a tie
        loss = F.cross_entropy(logits, label, reduction="none")
        confidence = torch.where(finite, logits.softmax(1).amax(1), 0.0)
        self.batches.append((index, label, logits.argmax(1), true_rank, loss, confidence))

    def results(self, ranks: "Ranks") -> Results | None:
        """The results of all ranks on every rank, or None where no rank had an image."""
        mine = [torch.cat(columns).cpu().numpy() for columns in zip(*self.batches, strict=True)]
        together = [columns for columns in ranks.gather(mine) if columns]
        if not together:
            return None
        columns = [np.concatenate(column) for column in zip(*together, strict=True)]
        order = np.argsort(columns[0])
        names = (field.name for field in fields(Results))
        columns = [c[order].astype(np.float64 if c.dtype == np.float32 else np.int64) for c in columns]
        return Results(**dict(zip(names, columns, strict=True)))


@dataclass(frozen=True)
class PixelResults:
    """What a segmenter's validation counts."""

    counts: np.ndarray  # (classes, classes) int64 pixels: row the true class, column the predicted one
    loss: float  # mean cross-entropy of the pixels

    def iou(self) -> np.ndarray:
        """Intersection over union of each class (classes,) in percent; NaN where it is neither true nor predicted."""
        hits = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        return np.where(union > 0, 100.0 * hits / np.maximum(union, 1), np.nan)

    def accuracy(self) -> np.ndarray:
        """The share of each class's pixels that are predicted so (classes,), in percent; NaN where it has none."""
        pixels = self.counts.sum(1)
        return np.where(pixels > 0, 100.0 * self.counts.diagonal() / np.maximum(pixels, 1), np.nan)

    def metrics(self) -> dict[str, float]:
        """miou, pixel_accuracy and mean_accuracy in percent, and loss."""
        return {
            "miou": float(np.nanmean(self.iou())),
            "pixel_accuracy": 100.0 * float(self.counts.trace() / self.counts.sum()),
            "mean_accuracy": float(np.nanmean(self.accuracy())),
            "loss": float(f"{self.loss:.6g}"),
        }


class PixelCounter:
    """Counts the pixels of maps, in whole numbers, so that the sum over ranks does not depend on their order."""

    def __init__(self, classes: int):
        self.classes = classes
        self.counts: Tensor | int = 0  # (classes * classes,) int64
        self.loss: Tensor | float = 0.0  # () float64, summed over pixels

    def add(self, label: Tensor, logits: Tensor) -> None:
        """A map of classes (B, H, W), in which values past the classes are ignored, and logits (B, classes, H, W)."""
        label = label.long()
        counted = label < self.classes
        cells = torch.where(counted, label * self.classes + logits.argmax(1), self.classes**2)
        self.counts = self.counts + torch.bincount(cells.flatten(), minlength=self.classes**2 + 1)[:-1]
        losses = F.cross_entropy(logits.float(), torch.where(counted, label, -100), ignore_index=-100, reduction="none")
        self.loss = self.loss + losses.to(exact(losses.device)).sum(dtype=torch.float64)

    def results(self, ranks: "Ranks") -> PixelResults | None:
        """The results of all ranks on every rank, or None where no pixel was counted."""
        counts = self.counts.cpu().numpy() if isinstance(self.counts, Tensor) else np.zeros(self.classes**2, np.int64)
        shares = ranks.gather((counts, float(self.loss)))
        total = np.sum([share for share, _ in shares], axis=0).reshape(self.classes, self.classes)
        if not total.sum():
            return None
        return PixelResults(total, sum(loss for _, loss in shares) / int(total.sum()))
