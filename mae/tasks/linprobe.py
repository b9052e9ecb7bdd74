"""Linear probing (arXiv 2111.06377, A.1, table 10): a frozen encoder, BatchNorm without affine, one matrix."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from mae.config.build import call
from mae.data.source import Source
from mae.metrics import Collector
from mae.models.vit import classifier
from mae.tasks.classify import Classify
from mae.tasks.common import need_init, warn_of_statistics
from mae.weights.load import load_pretrained
from mae.weights.parts import BATCH_NORM_EPS
from mae.weights.read import read_pretrained

HEAD_STD = 0.01  # reference, main_linprobe, after MoCo v3


class Linprobe(Classify):
    """Learn a linear classifier on the features of the encoder that `init` names."""

    def __init__(
        self,
        cfg: DictConfig,
        val_set: Source,
        *,
        global_pool: Literal["avg", "token"],
        cached_features: bool,  # this one and the next are for `linprobe_cached`
        learning_rates: list[Annotated[float, "(0, inf)"]] | None,
    ):
        super().__init__(cfg, val_set)
        classes = len(self.classes)
        self.model = call(classifier, cfg.model, num_classes=classes, drop_path=0.0, global_pool=global_pool)
        self.model.head = head(self.model.embed_dim, classes)
        self.model.requires_grad_(False)
        self.model.head.requires_grad_(True)

    def take_up_init(self, cfg: DictConfig) -> None:
        pretrained = read_pretrained(need_init(cfg))
        load_pretrained(self.model, pretrained, head="fresh")
        warn_of_statistics(cfg, pretrained)

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the head reads, (B, D): the class token after `norm`, or the mean of the patch tokens."""
        with torch.no_grad():
            return self.model.forward_head(self.model.forward_features(self.images(batch)), pre_logits=True)

    def logits(self, features: Tensor) -> Tensor:
        """The head in its own number format: statistics over a batch want more than half precision."""
        with torch.autocast(features.device.type, enabled=False):
            return self.model.head(features.to(self.model.head[1].weight.dtype))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy."""
        features = self.features(batch)
        if len(features) < 2:
            raise ValueError(
                "task=linprobe normalises over a batch, and one of a single image came: raise task.batch_size or "
                "task.micro_batch_size, and keep task.drop_last=true."
            )
        return {"loss": F.cross_entropy(self.logits(features), batch["label"])}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]], ranks: Any, autocast: Any) -> dict[str, float]:
        """top1 and top5 in percent, and loss."""
        self.eval()
        found = Collector()
        for batch in batches:
            with autocast():
                features = self.features(batch)
            found.add(batch["index"], batch["label"], self.logits(features))
        self.train()
        return self.told(found.results(ranks))

    def train(self, mode: bool = True) -> "Linprobe":
        """The encoder stays as in evaluation."""
        super().train(mode)
        for name, part in self.model.named_children():
            if name != "head":
                part.eval()
        return self


def head(width: int, classes: int) -> nn.Sequential:
    """The reference's probe: BatchNorm without affine, then a matrix."""
    linear = nn.Linear(width, classes)
    nn.init.trunc_normal_(linear.weight, std=HEAD_STD)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(RanksBatchNorm(width, affine=False, eps=BATCH_NORM_EPS), linear)


class RanksBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the batches of all ranks together, on any device, for inputs (B, D) that need no gradient.

    torch's SyncBatchNorm wants a GPU. Statistics count unbiased, as there.
    """

    alone = False  # during a trial, which not every rank need come through

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """(B, D) to (B, D), normalised over all ranks' B in training."""
        if self.alone or not (self.training and dist.is_initialized()):
            return super().forward(input)
        count = torch.full((1,), len(input), dtype=torch.float64, device=input.device)
        sums = torch.cat([input.sum(0, dtype=torch.float64), count])
        dist.all_reduce(sums)
        count, mean = sums[-1], sums[:-1] / sums[-1]
        squares = ((input - mean) ** 2).sum(0)
        dist.all_reduce(squares)
        running_mean, running_var, seen, share = self.running_mean, self.running_var, self.num_batches_tracked, 0.1
        assert running_mean is not None and running_var is not None and seen is not None and self.momentum == share
        running_mean.lerp_(mean.to(running_mean.dtype), share)
        running_var.lerp_((squares / (count - 1)).to(running_var.dtype), share)
        seen += 1
        return ((input - mean) / (squares / count + self.eps).sqrt()).to(input.dtype)
