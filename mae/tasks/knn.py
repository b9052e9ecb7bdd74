"""Weighted cosine k-NN on frozen features (Wu et al., 2018; as DINO evaluates): no training, several k at once."""

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from mae import device
from mae.data.source import Source
from mae.data.subsets import Subset, reduced
from mae.device import Batch, full_precision
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.runs.summary import VAL_IMAGES, Summary, rate
from mae.tasks.base import Autocast
from mae.tasks.batches import bad_files_csv, both_sets, eval_batch_size, eval_loader, sent
from mae.tasks.features import Encode, Encoder, Features, extract
from mae.tasks.init_weights import same_weights
from mae.tasks.labels import check_classes
from mae.tracking.base import Tracker

TEMPERATURE = 0.07  # of the votes (Wu et al., 2018); task=knn takes its own
CHUNK = 65536  # neighbours compared at a time: 65536 x 256 similarities are 64 MiB


class Neighbours:
    """The training images' features, and the vote among those nearest to a query."""

    def __init__(self, bank: Features, classes: int, k: list[int], temperature: float, device: torch.device):
        feature = bank.feature.to(device, copy=True)
        self.feature = F.normalize(feature, dim=1, out=feature)
        self.label = bank.label.to(device)
        self.classes, self.k, self.temperature = classes, k, temperature

    def predict(self, queries: Tensor) -> Tensor:
        """Queries (B, D) to the predicted class for each k, (B, len(k))."""
        queries, most = F.normalize(queries.to(self.feature.dtype), dim=1), max(self.k)
        near = queries.new_full((len(queries), 0), 0.0)
        label = self.label.new_zeros((len(queries), 0))
        for start in range(0, len(self.label), CHUNK):
            with full_precision():
                similarity = queries @ self.feature[start : start + CHUNK].T
            near = torch.cat([near, similarity], 1)
            label = torch.cat([label, self.label[start : start + CHUNK].expand(len(queries), -1)], 1)
            near, order = near.topk(min(most, near.shape[1]), dim=1)  # sorted, nearest first
            label = label.gather(1, order)
        weight = ((near - near[:, :1]) / self.temperature).exp()  # of the nearest 1: exp overflows above 88
        votes = [
            weight.new_zeros(len(queries), self.classes).scatter_add_(1, label[:, :k], weight[:, :k]) for k in self.k
        ]
        return torch.stack([vote.argmax(1) for vote in votes], 1)


def check_neighbours(key: str, k: int, images: int) -> None:
    """Raises UserError where there are fewer images than neighbours."""
    if k > images:
        raise UserError(f"{key}={k} asks for that many neighbours, and there are {images} training images.")


@torch.no_grad()
def accuracy(
    encode: Encode, neighbours: Neighbours, batches: Iterable[Batch], ranks: Ranks, autocast: Autocast
) -> tuple[dict[int, float], int]:
    """k -> percent of the images whose neighbours vote for their class, over all ranks; and the number of images.

    One that cannot be used does not count."""
    parts = []
    for batch in batches:
        with autocast():
            feature = encode(batch)
        parts.append(neighbours.predict(feature) == batch["label"][:, None])
    mine = torch.cat(parts).cpu().numpy() if parts else np.zeros((0, len(neighbours.k)), bool)
    hits = np.concatenate(ranks.gather(mine))
    percent = 100.0 * hits.mean(0)
    return {k: float(value) for k, value in zip(neighbours.k, percent, strict=True)}, len(hits)


def at_most(source: Source, count: int | None, seed: int) -> Source:
    """At most `count` of the training images, chosen by seed."""
    if count is None or len(source) <= count:
        return source
    return Subset(source, np.sort(np.random.default_rng([seed, 0x6E6E]).permutation(len(source))[:count]))


class KnnMonitor:
    """k-NN accuracy of a network that is still in training, every so many epochs."""

    def __init__(self, cfg: DictConfig, train_set: Source, val_set: Source, every_epochs: float, images: int, k: int):
        check_classes(cfg, train_set, val_set)
        train_set = reduced(train_set, cfg.data.fraction, cfg.data.per_class, cfg.seed)
        self.cfg, self.every, self.k = cfg, every_epochs, k
        self.bank, self.val_set = at_most(train_set, images, cfg.seed), val_set
        check_neighbours("task.knn_k", k, len(self.bank))
        self.periods = 0  # periods that had ended when it was last measured

    def measure(self, encode: Encode, epoch: float, ranks: Ranks, autocast: Autocast) -> dict[str, float]:
        """`val/knn_K` in percent, or nothing where no period has ended since the last time."""
        periods = int(epoch / self.every + 1e-9)
        if periods <= self.periods:
            return {}
        self.periods = periods
        size = eval_batch_size(self.cfg.task)
        loader, val_loader = (eval_loader(self.cfg, ranks, source, size) for source in (self.bank, self.val_set))
        bank = extract(encode, sent(loader, ranks), ranks, autocast)
        neighbours = Neighbours(bank, len(self.bank.classes), [self.k], TEMPERATURE, ranks.device)
        percents, _ = accuracy(encode, neighbours, sent(val_loader, ranks), ranks, autocast)
        loader.close()
        val_loader.close()
        return {f"val/knn_{self.k}": percents[self.k]}


def knn(
    run: Path,
    cfg: DictConfig,
    ranks: Ranks,
    tracker: Tracker,
    *,
    k: list[Annotated[int, "[1, inf)"]],
    temperature: Annotated[float, "(0, inf)"],
    global_pool: Literal["avg", "token"],
    batch_size: Annotated[int, "[1, inf)"],
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"],
) -> Summary:
    """Classifies the validation images by the training images' features."""
    begun = time.perf_counter()
    train_set, val_set = both_sets(cfg)
    check_classes(cfg, train_set, val_set)
    train_set = reduced(train_set, cfg.data.fraction, cfg.data.per_class, cfg.seed)
    check_neighbours("task.k", max(k), len(train_set))
    encoder = Encoder(cfg, global_pool)
    same_weights(ranks, encoder.model)
    dtype = device.number_format(precision, ranks.device)
    encoder.to(ranks.device, device.weight_format(dtype))
    autocast = partial(device.inference_autocast, dtype, ranks.device)
    loader, val_loader = (
        eval_loader(cfg, ranks, source, batch_size, bad_csv=bad_files_csv(run, ranks), split=split)
        for split, source in (("train", train_set), ("val", val_set))
    )
    bank = extract(encoder, sent(loader, ranks), ranks, autocast)
    neighbours = Neighbours(bank, len(train_set.classes), k, temperature, ranks.device)
    percents, val_images = accuracy(encoder, neighbours, sent(val_loader, ranks), ranks, autocast)
    loader.close()
    val_loader.close()
    seconds, images = time.perf_counter() - begun, len(train_set) + len(val_set)
    tracker.start(0, 0)
    metrics = {f"val/knn_{number}": value for number, value in percents.items()}
    tracker.log({"step": 0, "images_seen": images, "epoch": 0.0, **metrics})
    return Summary(
        "knn",
        seconds,
        images_seen=images,
        images_per_second=rate(images, seconds),
        checkpoint=encoder.read_from,
        results={"knn": {str(number): value for number, value in percents.items()}, VAL_IMAGES: val_images},
    )
