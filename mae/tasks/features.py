"""Features of a frozen encoder, computed once: what k-NN compares and cached probing trains on."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from mae.config.build import call
from mae.data.prepare import Prepare
from mae.device import Batch, as_float
from mae.distributed.ranks import Ranks
from mae.models.vit import classifier
from mae.tasks.base import Autocast
from mae.tasks.init_weights import need_init, read_from, warn_of_statistics
from mae.weights.load import load_pretrained
from mae.weights.read import read_pretrained

Encode = Callable[[Mapping[str, Tensor]], Tensor]  # a batch -> features (B, D)


class Features(NamedTuple):
    """Features of a data set, ordered by index, the same on every rank; on the host."""

    sample_index: Tensor  # (N,) int64
    label: Tensor  # (N,) int64
    feature: Tensor  # (N, D) float32, or float64 of an encoder in float64


class Encoder(nn.Module):
    """The encoder that `init` names, without a head: batch -> features (B, D), in float32 or the weights' float64."""

    def __init__(self, cfg: DictConfig, pool: Literal["avg", "token"]):
        super().__init__()
        self.model = call(classifier, cfg.model, num_classes=0, drop_path=0.0, global_pool=pool)
        pretrained = read_pretrained(need_init(cfg))
        load_pretrained(self.model, pretrained, head="fresh", trained=False)
        warn_of_statistics(cfg, pretrained)
        self.read_from = read_from(cfg, pretrained)
        self.prepare = call(Prepare, cfg.data)
        self.requires_grad_(False).eval()

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        images = self.prepare(batch["image"], batch.get("flip")).to(next(self.model.parameters()).dtype)
        return as_float(self.model(images))


@torch.no_grad()
def extract(encode: Encode, batches: Iterable[Batch], ranks: Ranks, autocast: Autocast) -> Features:
    """Features of all ranks' images on every rank, each image once."""
    rows: list[tuple[Tensor, ...]] = []
    for batch in batches:
        with autocast():
            feature = encode(batch)
        rows.append((batch["index"].cpu(), batch["label"].cpu(), as_float(feature).cpu()))  # else a GPU holds all twice
    mine = [torch.cat(columns).numpy() for columns in zip(*rows, strict=True)]
    together = [columns for columns in ranks.gather(mine) if columns]
    columns = [np.concatenate(column) for column in zip(*together, strict=True)]
    order = np.argsort(columns[0])
    return Features(*(torch.from_numpy(column[order]) for column in columns))
