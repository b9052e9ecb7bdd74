"""What fine-tuning and probing share: a classifier that is validated by top-1, top-5 and loss."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from mae.config.build import call
from mae.data.prepare import Prepare
from mae.data.source import Source
from mae.metrics import Collector, Results
from mae.tasks.common import check_classes, keep_classes
from mae.tasks.results import tell, write_all


class Classify(nn.Module):
    """A trained task whose result is a classifier: `model` is validated and saved, `trained` is learned."""

    model: Any
    num_patches = None  # no masking noise

    def __init__(self, cfg: DictConfig, val_set: Source):
        super().__init__()
        self.classes = list(val_set.classes)
        self.prepare = call(Prepare, cfg.data)
        self.val_set = val_set
        self.results: Results | None = None  # of the last validation
        self.best = -1.0  # top-1 of the best validation so far

    def begin(self, cfg: DictConfig, train_set: Source, val_set: Source) -> None:
        """Checks the labels. Raises ValueError where they will not do."""
        check_classes(cfg, train_set, val_set)

    def take_up_init(self, cfg: DictConfig) -> None:
        """Loads what `init` names, where no checkpoint of the run is there that has it all. Raises ValueError."""
        raise NotImplementedError

    @property
    def trained(self) -> nn.Module:
        """What the optimizer works on."""
        return self.model

    def images(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The batch as the model takes it: flipped, normalised, in the weights' type."""
        return self.prepare(batch["image"], batch.get("flip")).to(self.model.pos_embed.dtype)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]], ranks: Any, autocast: Any) -> dict[str, float]:
        """top1 and top5 in percent, and loss, of the validation set over all ranks."""
        self.eval()
        found = Collector()
        for batch in batches:
            images = self.images(batch)
            with autocast():
                logits = self.model(images)
            found.add(batch["index"], batch["label"], logits)
        self.train()
        return self.told(found.results(ranks))

    def told(self, results: Results | None) -> dict[str, float]:
        """Metrics of a validation, which is remembered for what is drawn of it."""
        self.results = results
        return {f"val/{name}": value for name, value in results.figures().items()} if results else {}

    def signal(self, epoch: float, ranks: Any, autocast: Any) -> dict[str, float]:
        """Nothing: the validation itself tells how good the features are."""
        return {}

    def improved(self, metrics: Mapping[str, float]) -> bool:
        """Whether this validation is the best so far; remembers it."""
        better = metrics.get("val/top1", -1.0) > self.best
        self.best = max(self.best, metrics.get("val/top1", -1.0))
        return better

    def draw(self, run: Path, where: Mapping[str, Any], tracker: Any, autocast: Any) -> None:
        """Names of the classes, for evaluation and export, and accuracy and confusion of each."""
        keep_classes(run, self.classes)
        if self.results is not None:
            write_all(run, self.classes, self.results)

    def conclude(self, run: Path, step: int, tracker: Any, data: str) -> None:
        """The last validation's confusion matrix and predictions, for whoever listens."""
        if self.results is not None:
            tell(run, self.classes, self.val_set, self.results, step, tracker, data)

    def after_step(self, skipped: Tensor) -> None:
        """Nothing to do between steps."""

    def extra_state(self) -> dict[str, Any]:
        """What belongs into a checkpoint beside the weights."""
        return {"best": self.best}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `extra_state` gave."""
        self.best = state["best"]

    def summary(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The main results."""
        shown = {name.removeprefix("val/"): value for name, value in metrics.items()}
        return shown | {"best_top1": self.best}
