"""Probing: a frozen encoder, BatchNorm without affine, one matrix (arXiv 2111.06377, A.1, table 10).

An attentive probe pools the patch tokens by attention before them (arXiv 2506.10178).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from mae.config.build import call
from mae.data.source import Source
from mae.errors import UserError
from mae.metrics import Results
from mae.models.probe import AttentivePool
from mae.models.vit import Classifier, classifier
from mae.tasks.base import Autocast
from mae.tasks.classify import Classify
from mae.tasks.init_weights import need_init, warn_of_statistics
from mae.weights.load import load_pretrained
from mae.weights.parts import BATCH_NORM_EPS
from mae.weights.read import read_pretrained

HEAD_STD = 0.01  # reference, main_linprobe, after MoCo v3


@dataclass(frozen=True)
class ProbeSettings:
    """What a probe is and reads, as in `conf/task/linprobe.yaml`."""

    probe: Literal["linear", "attentive"]
    probe_queries: Annotated[int, "[1, inf)"]
    probe_projection: bool
    layer: int | list[int | None] | Literal["all"] | None
    global_pool: Literal["avg", "token"]
    cached_features: bool  # read, like learning_rates, by `linprobe_cached`
    learning_rates: list[Annotated[float, "(0, inf)"]] | None


class Linprobe(Classify):
    """Learn a linear classifier on the features of the encoder that `init` names."""

    compiled = ("encode",)
    several = False  # whether it probes several layers, and batches of features have an axis of them

    def __init__(self, cfg: DictConfig, val_set: Source, settings: ProbeSettings, layer: int | None):
        super().__init__(cfg, val_set)
        classes, queries = len(self.classes), settings.probe_queries if settings.probe == "attentive" else 0
        pool = "" if queries else settings.global_pool
        self.model = call(classifier, cfg.model, num_classes=classes, drop_path=0.0, global_pool=pool)
        add_probe(self.model, classes, queries, settings.probe_projection, layer)
        self.model.requires_grad_(False)
        self.head.requires_grad_(True)

    @property
    def head(self) -> nn.Sequential:
        """The probe: a BatchNorm and a matrix, after an `AttentivePool` where it has one."""
        head = self.model.get_submodule("head")
        assert isinstance(head, nn.Sequential)
        return head

    @property
    def layer_heads(self) -> list[nn.Sequential]:
        """The probe of each layer."""
        return [self.head]

    def take_results(self, results: Sequence[Results]) -> None:
        """Takes the results of each layer as those of the last validation."""
        self.results = results[0]

    def load_init(self) -> None:
        pretrained = read_pretrained(need_init(self.cfg))
        load_pretrained(self.model, pretrained, head="fresh")
        warn_of_statistics(self.cfg, pretrained)

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The head's input (B, D): the class token, or the mean of the patch tokens.

        Of an attentive probe the patch tokens (B, L, D)."""
        with torch.no_grad():
            return self.encode(self.images(batch))

    def encode(self, images: Tensor) -> Tensor:
        """What `features` returns, of images (B, C, H, W)."""
        return self.model.forward_head(self.model.head_tokens(images), pre_logits=True)

    def probe(self, features: Tensor) -> Tensor:
        """Features (B, D) or (B, L, D) to logits, in the head's number format.

        Batch statistics need more than half precision."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(next(self.head.parameters()).dtype))

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy."""
        features = self.features(batch)
        if len(features) < 2:
            raise UserError(
                "task=linprobe normalises over a batch, and one of a single image came: raise task.batch_size or "
                "task.micro_batch_size, and keep task.drop_last=true."
            )
        return self.objective(self.probe(features), batch["label"])

    def objective(self, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
        """What `loss` returns, of what `probe` returns and labels (B,)."""
        return {"loss": F.cross_entropy(logits, label)}

    def logits(self, batch: Mapping[str, Tensor], autocast: Autocast) -> Tensor:
        with autocast():
            features = self.features(batch)
        return self.probe(features)

    def train(self, mode: bool = True) -> "Linprobe":
        """The encoder stays in evaluation mode."""
        super().train(mode)
        for name, module in self.model.named_children():
            if name != "head":
                module.eval()
        return self


def add_probe(model: Classifier, classes: int, queries: int, projection: bool, layer: int | None) -> None:
    """Gives a classifier the head of a probe that reads block `layer`; `queries` 0: a linear one."""
    model.layer, model.reads_patches = layer, queries > 0
    width = model.embed_dim
    model.add_module(
        "head", attentive_head(width, classes, queries, projection) if queries else probe_head(width, classes)
    )


def attentive_head(width: int, classes: int, queries: int, projection: bool) -> nn.Sequential:
    """The head of arXiv 2506.10178's reference (probe_heads.py): its matrix starts as torch's do."""
    norm = RanksBatchNorm(width, affine=False, eps=BATCH_NORM_EPS)
    return nn.Sequential(AttentivePool(width, queries, projection), norm, nn.Linear(width, classes))


def probe_head(width: int, classes: int) -> nn.Sequential:
    """The reference's probe: BatchNorm without affine, then a matrix."""
    linear = nn.Linear(width, classes)
    nn.init.trunc_normal_(linear.weight, std=HEAD_STD)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(RanksBatchNorm(width, affine=False, eps=BATCH_NORM_EPS), linear)


class RanksBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the batches of all ranks together, on any device, for inputs (B, D).

    torch's SyncBatchNorm wants a GPU. Statistics count unbiased, as there.
    """

    alone = False  # true during a trial step, which may fail on one rank alone

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) to (B, D), normalised over all ranks' B in training."""
        if self.alone or not (self.training and dist.is_initialized()):
            return super().forward(input)
        count = torch.full((1,), len(input), dtype=torch.float64, device=input.device)
        sums = sum_over_ranks(torch.cat([input.sum(0, dtype=torch.float64), count]))
        count, mean = sums[-1], sums[:-1] / sums[-1]
        squares = sum_over_ranks(((input - mean) ** 2).sum(0))
        running_mean, running_var, seen, share = self.running_mean, self.running_var, self.num_batches_tracked, 0.1
        assert running_mean is not None and running_var is not None and seen is not None and self.momentum == share
        running_mean.lerp_(mean.detach().to(running_mean.dtype), share)
        running_var.lerp_((squares.detach() / (count.detach() - 1)).to(running_var.dtype), share)
        seen += 1
        return ((input - mean) / (squares / count + self.eps).sqrt()).to(input.dtype)


class SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors; its gradient is the sum of all ranks' gradients, as in torch's SyncBatchNorm."""

    @staticmethod
    def forward(ctx: object, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(own: Tensor) -> Tensor:
    """`SumOverRanks` with a type."""
    total = SumOverRanks.apply(own)
    assert isinstance(total, Tensor)
    return total
