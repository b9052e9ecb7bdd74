"""What fine-tuning and probing share: a classifier that is validated by top-1, top-5 and loss."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from mae.data.source import Source
from mae.device import Batch
from mae.distributed.ranks import Ranks
from mae.metrics import Collector, Results
from mae.models.vit import Classifier
from mae.runs.summary import VAL_IMAGES
from mae.tasks.base import Autocast, TrainedTask
from mae.tasks.labels import write_class_names
from mae.tasks.results import track_results, write_results
from mae.tracking.base import Tracker


class Classify(TrainedTask[Classifier]):
    """A trained task whose result is a classifier; a subclass defines `model` and `loss`."""

    def __init__(self, cfg: DictConfig, val_set: Source):
        super().__init__(cfg, val_set)
        self.classes = list(val_set.classes)
        self.results: Results | None = None  # of the last validation
        self.best = -1.0  # top-1 of the best validation so far

    def logits(self, batch: Mapping[str, Tensor], autocast: Autocast) -> Tensor:
        """Logits (B, classes) of a validation batch."""
        with autocast():
            return self.model(self.images(batch))

    def validate(self, batch: Mapping[str, Tensor], autocast: Autocast) -> Tensor:
        return self.logits(batch, autocast)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], ranks: Ranks, autocast: Autocast) -> dict[str, float]:
        """top1 and top5 in percent, and loss, of the validation set over all ranks."""
        self.eval()
        collector = Collector()
        for batch in batches:
            collector.add(batch["index"], batch["label"], self.logits(batch, autocast))
        self.train()
        self.results = collector.results(ranks)
        return {f"val/{name}": value for name, value in self.results.metrics().items()} if self.results else {}

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """By top-1."""
        top1 = metrics.get("val/top1", -1.0)
        better = top1 > self.best
        self.best = max(self.best, top1)
        return better

    def log_images(self, run: Path, step: int, epoch: float, tracker: Tracker, autocast: Autocast) -> None:
        """Class names, for evaluation and export, and accuracy and confusion of each class."""
        write_class_names(run, self.classes)
        if self.results is not None:
            write_results(run, self.classes, self.results)

    def on_train_end(self, run: Path, step: int, tracker: Tracker) -> None:
        """The confusion matrix and predictions of the last validation, for trackers."""
        if self.results is not None:
            track_results(run, self.classes, self.val_set, self.results, step, tracker)

    def extra_state(self) -> dict[str, object]:
        return {"best": self.best}

    def load_extra_state(self, state: Mapping[str, float]) -> None:
        self.best = state["best"]

    def summary(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        images = {} if self.results is None else {VAL_IMAGES: len(self.results)}
        return super().summary(metrics) | {"best_top1": self.best} | images
