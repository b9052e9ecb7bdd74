"""Weighted cosine k-NN on frozen features (Wu et al., 2018; as DINO evaluates): no training, several k at once."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from mae import device
from mae.data.source import Source
from mae.data.subsets import Subset, reduced
from mae.tasks.common import both_sets, check_classes, eval_loader, same_weights, sent
from mae.tasks.features import Encoder, Features, extract

TEMPERATURE = 0.07  # of the votes (Wu et al., 2018); task=knn takes its own
CHUNK = 65536  # neighbours compared at a time: 65536 x 256 similarities are 64 MiB


class Neighbours:
    """The training images' features, and the vote among those nearest to a query."""

    def __init__(self, bank: Features, classes: int, k: list[int], temperature: float, where: torch.device):
        self.feature = F.normalize(bank.feature.to(where), dim=1)
        self.label = bank.label.to(where)
        self.classes, self.k, self.temperature = classes, k, temperature

    def predict(self, queries: Tensor) -> Tensor:
        """Queries (B, D) to the predicted class for each k, (B, len(k))."""
        queries, most = F.normalize(queries.float(), dim=1), max(self.k)
        near = queries.new_full((len(queries), 0), 0.0)
        label = self.label.new_zeros((len(queries), 0))
        for start in range(0, len(self.label), CHUNK):
            part = self.feature[start : start + CHUNK]
            near = torch.cat([near, queries @ part.T], 1)
            label = torch.cat([label, self.label[start : start + CHUNK].expand(len(queries), -1)], 1)
            near, order = near.topk(min(most, near.shape[1]), dim=1)  # sorted, nearest first
            label = label.gather(1, order)
        weight = (near / self.temperature).exp()
        votes = [
            torch.zeros(len(queries), self.classes, device=queries.device).scatter_add_(1, label[:, :k], weight[:, :k])
            for k in self.k
        ]
        return torch.stack([vote.argmax(1) for vote in votes], 1)


def enough(key: str, k: int, images: int) -> None:
    """Raises ValueError where there are fewer images than neighbours."""
    if k > images:
        raise ValueError(f"{key}={k} asks for that many neighbours, and there are {images} training images.")


@torch.no_grad()
def accuracy(
    encode: Callable[[Mapping[str, Tensor]], Tensor],
    neighbours: Neighbours,
    batches: Iterable[Mapping[str, Tensor]],
    ranks: Any,
    autocast: Any,
) -> dict[int, float]:
    """k -> percent of the images whose neighbours vote for their class, over all ranks."""
    parts = []
    for batch in batches:
        with autocast():
            feature = encode(batch)
        hit = neighbours.predict(feature) == batch["label"][:, None]
        parts.append(torch.cat([batch["index"][:, None], hit.long()], 1))
    mine = torch.cat(parts).cpu().numpy() if parts else np.zeros((0, 1 + len(neighbours.k)), np.int64)
    together = np.concatenate(ranks.gather(mine))
    _, first = np.unique(together[:, 0], return_index=True)
    percent = 100.0 * together[first, 1:].mean(0)
    return {k: float(value) for k, value in zip(neighbours.k, percent, strict=True)}


def bank_of(source: Source, most: int | None, seed: int) -> Source:
    """At most `most` of the training images, drawn by seed."""
    if most is None or len(source) <= most:
        return source
    return Subset(source, np.sort(np.random.default_rng([seed, 0x6E6E]).permutation(len(source))[:most]))


class Signal:
    """k-NN accuracy of a network that is still in training, every so many epochs."""

    def __init__(self, cfg: DictConfig, train_set: Source, val_set: Source, every_epochs: float, images: int, k: int):
        check_classes(cfg, train_set, val_set)
        train_set = reduced(train_set, cfg.data.fraction, cfg.data.per_class, cfg.seed)
        self.cfg, self.every, self.k = cfg, every_epochs, k
        self.bank, self.val_set = bank_of(train_set, images, cfg.seed), val_set
        enough("task.knn_k", k, len(self.bank))
        self.last = 0  # how many periods had passed when it was last looked at

    def measure(self, encode: Any, epoch: float, ranks: Any, autocast: Any) -> dict[str, float]:
        """`val/knn_K` in percent, or nothing where no period has ended since the last time."""
        periods = int(epoch / self.every + 1e-9)
        if periods <= self.last:
            return {}
        self.last = periods
        size = min(256, self.cfg.task.micro_batch_size or self.cfg.task.batch_size)
        loader, val_loader = (eval_loader(self.cfg, ranks, part, size) for part in (self.bank, self.val_set))
        bank = extract(encode, sent(loader, ranks), ranks, autocast)
        neighbours = Neighbours(bank, len(self.bank.classes), [self.k], TEMPERATURE, ranks.device)
        found = accuracy(encode, neighbours, sent(val_loader, ranks), ranks, autocast)
        loader.close()
        val_loader.close()
        return {f"val/knn_{self.k}": found[self.k]}


def knn(
    run: Path,
    cfg: DictConfig,
    ranks: Any,
    tracker: Any,
    *,
    k: list[Annotated[int, "[1, inf)"]],
    temperature: Annotated[float, "(0, inf)"],
    global_pool: Literal["avg", "token"],
    batch_size: Annotated[int, "[1, inf)"],
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"],
) -> dict[str, Any]:
    """Classifies the validation images by the training images' features."""
    begun = time.perf_counter()
    train_set, val_set = both_sets(cfg)
    check_classes(cfg, train_set, val_set)
    train_set = reduced(train_set, cfg.data.fraction, cfg.data.per_class, cfg.seed)
    enough("task.k", max(k), len(train_set))
    encoder = Encoder(cfg, global_pool)
    same_weights(ranks, encoder.model)
    encoder.to(ranks.device)
    dtype = device.number_format(precision, ranks.device)

    def autocast() -> Any:
        return device.autocast(dtype, ranks.device)

    loader, val_loader = (eval_loader(cfg, ranks, part, batch_size) for part in (train_set, val_set))
    bank = extract(encoder, sent(loader, ranks), ranks, autocast)
    neighbours = Neighbours(bank, len(train_set.classes), k, temperature, ranks.device)
    found = accuracy(encoder, neighbours, sent(val_loader, ranks), ranks, autocast)
    loader.close()
    val_loader.close()
    seconds, images = time.perf_counter() - begun, len(train_set) + len(val_set)
    where = {"step": 0, "images_seen": images, "epoch": 0.0}
    tracker.start(0, 0)
    tracker.log(where | {f"val/knn_{number}": value for number, value in found.items()})
    return {
        "task": "knn",
        "steps": 0,
        "epochs": 0,
        "images_seen": images,
        "seconds": round(seconds, 2),
        "images_per_second": round(images / seconds, 1),
        "checkpoint": encoder.read_from,
        "knn": {str(number): value for number, value in found.items()},
    }
