"""Probes of several layers that are trained and validated in one pass of the frozen encoder."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from mae.config.probing_rules import probed_layers
from mae.data.source import Source
from mae.device import Batch
from mae.distributed.fsdp import load_weights
from mae.distributed.ranks import Ranks
from mae.metrics import Collector, Results
from mae.models.vit import layer_tokens
from mae.runs.checkpoints import PROBED_LAYER
from mae.runs.layout import LAYERS_CSV
from mae.runs.summary import BEST_LAYER, LAYERS
from mae.tasks import charts
from mae.tasks.base import Autocast
from mae.tasks.linprobe import Linprobe, ProbeSettings
from mae.tasks.results import write_csv
from mae.tracking.base import Tracker


class LayersProbe(Linprobe):
    """A probe of each of several layers, of which `model` has the one that validated best.

    All start with the same weights, and none changes what another learns. Before the first validation `model` has the
    probe of the deepest layer.
    """

    several = True

    def __init__(self, cfg: DictConfig, val_set: Source, settings: ProbeSettings, layers: Sequence[int | None]):
        depth = cfg.model.depth
        deepest = max(range(len(layers)), key=lambda k: depth if layers[k] is None else layers[k] % depth)
        super().__init__(cfg, val_set, settings, layers[deepest])
        self.layers = list(layers)
        self.heads = nn.ModuleList(copy.deepcopy(self.head) for _ in layers)
        self.networks = nn.ModuleDict({"heads": self.heads, "encoder": self.model})
        self.layer_results: list[Results] = []  # of the last validation
        self.choose(deepest)

    @property
    def trained(self) -> nn.Module:
        return self.networks

    @property
    def layer_heads(self) -> list[nn.Sequential]:
        return [head for head in self.heads if isinstance(head, nn.Sequential)]

    def choose(self, number: int) -> None:
        """Gives `model` the probe of the layer of this number in the list."""
        self.chosen = number
        self.model.layer = self.layers[number]
        self.model.add_module("head", self.heads[number])

    def take_results(self, results: Sequence[Results]) -> None:
        """Chooses the layer of the highest top-1, of equal ones the first."""
        self.layer_results = list(results)
        self.choose(max(range(len(results)), key=lambda k: results[k].top(1)))
        self.results = results[self.chosen]

    # ------------------------------------------------------------ steps and validation

    def encode(self, images: Tensor) -> Tensor:
        """The heads' inputs (B, layers, D), of attentive probes (B, layers, L, D), of images (B, C, H, W)."""
        tokens = layer_tokens(self.model, images, self.layers)
        return torch.stack([self.model.forward_head(each, pre_logits=True) for each in tokens], 1)

    def probe(self, features: Tensor) -> Tensor:
        """Features (B, layers, ...) to logits (B, layers, classes), in the heads' number format."""
        with torch.autocast(features.device.type, enabled=False):
            inputs = features.to(next(self.heads.parameters()).dtype).unbind(1)
            return torch.stack([head(each) for head, each in zip(self.heads, inputs, strict=True)], 1)

    def objective(self, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The mean loss of the layers, and each. Its gradient is the sum's, so that a layer learns as it does alone."""
        losses = torch.stack([F.cross_entropy(each, label) for each in logits.unbind(1)])
        total = losses.sum()
        loss = losses.detach().mean() + (total - total.detach())
        return {"loss": loss} | dict(zip(self.names("loss"), losses.detach(), strict=True))

    def names(self, metric: str) -> list[str]:
        """The name of each layer's metric."""
        return [f"{metric}_layer_{layer_text(layer)}" for layer in self.layers]

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], ranks: Ranks, autocast: Autocast) -> dict[str, float]:
        """top1, top5 and loss of the best layer, and top1 of each, of the validation set over all ranks."""
        self.eval()
        collectors = [Collector() for _ in self.layers]
        for batch in batches:
            for collector, logits in zip(collectors, self.logits(batch, autocast).unbind(1), strict=True):
                collector.add(batch["index"], batch["label"], logits)
        self.train()
        results = [result for collector in collectors if (result := collector.results(ranks)) is not None]
        if not results:
            return {}
        self.take_results(results)
        return {f"val/{name}": value for name, value in results[self.chosen].metrics().items()} | self.by_layer()

    def by_layer(self) -> dict[str, float]:
        """`val/top1_layer_N` of each layer in the last validation."""
        top1 = (result.top(1) for result in self.layer_results)
        return dict(zip(self.names("val/top1"), top1, strict=True))

    # ------------------------------------------------------------ results

    def table(self) -> dict[str, dict[str, float]]:
        """Layer -> its metrics in the last validation."""
        rows = (result.metrics() for result in self.layer_results)
        return dict(zip(map(layer_text, self.layers), rows, strict=True))

    def summary(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        chosen = {name: value for name, value in metrics.items() if name not in self.names("val/top1")}
        return super().summary(chosen) | self.layer_summary()

    def layer_summary(self) -> dict[str, Any]:
        """What summary.json says of the layers."""
        return {BEST_LAYER: self.layers[self.chosen], LAYERS: self.table()}

    def log_images(self, run: Path, step: int, epoch: float, tracker: Tracker, autocast: Autocast) -> None:
        super().log_images(run, step, epoch, tracker, autocast)
        write_layers(run, self.table())

    def on_train_end(self, run: Path, step: int, tracker: Tracker) -> None:
        super().on_train_end(run, step, tracker)
        track_layers(run, self.table(), step, tracker)

    # ------------------------------------------------------------ checkpoints

    def weights_facts(self) -> dict[str, object]:
        return {PROBED_LAYER: self.layers[self.chosen]}

    def extra_state(self) -> dict[str, object]:
        return super().extra_state() | {"chosen": self.chosen, "heads": self.heads.state_dict()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        load_weights(self.heads, state["heads"])
        self.choose(state["chosen"])


def linprobe(cfg: DictConfig, val_set: Source, *, settings: ProbeSettings) -> Linprobe:
    """The probe of one layer, or those of the several that `task.layer` lists."""
    layer = settings.layer
    if isinstance(layer, list | str):
        return LayersProbe(cfg, val_set, settings, probed_layers(layer, cfg.model.depth))
    return Linprobe(cfg, val_set, settings, layer)


def layer_text(layer: int | None) -> str:
    """A layer as `task.layer` names it."""
    return "null" if layer is None else str(layer)


def write_layers(run: Path, table: Mapping[str, Mapping[str, float]]) -> None:
    """layers.csv: a row a layer, in the order of `task.layer`."""
    rows = [[layer, *metrics.values()] for layer, metrics in table.items()]
    columns = next(iter(table.values()), {})
    write_csv(run / LAYERS_CSV, ["layer", *columns], rows)


def track_layers(run: Path, table: Mapping[str, Mapping[str, float]], step: int, tracker: Tracker) -> None:
    """The table over layers, and a chart of it, for trackers."""
    path = run / "images" / "layers.png"
    charts.bars([f"task.layer={layer}" for layer in table], [row["top1"] for row in table.values()], "top-1 %", path)
    tracker.picture("layers", path, step, "top-1 of each layer")
    columns = list(next(iter(table.values()), {}))
    rows = [[layer, *(row[name] for name in columns)] for layer, row in table.items()]
    tracker.table("layers", ["layer", *columns], rows, step)
