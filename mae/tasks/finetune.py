"""End-to-end and partial fine-tuning, and training from scratch (arXiv 2111.06377, A.1, tables 9 and 11)."""

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from timm.data.mixup import Mixup, mixup_target
from timm.layers.patch_dropout import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.config.build import call
from mae.data.source import Source
from mae.distributed.fsdp import load_weights, local_shard
from mae.errors import UserError
from mae.models.vit import classifier
from mae.tasks.classify import Classify
from mae.tasks.init_weights import warn_of_statistics
from mae.weights.load import load_pretrained
from mae.weights.read import read_pretrained

log = logging.getLogger(__name__)


class Finetune(Classify):
    """Learn the labels, all of the network or its last blocks, from `init` or from scratch.

    With `ema_decay`, `model` is the moving average of the weights, and `trained` the weights themselves.
    """

    compiled = ("objective",)

    def __init__(
        self,
        cfg: DictConfig,
        val_set: Source,
        *,
        global_pool: Literal["avg", "token"],
        drop_path: Annotated[float, "[0, 1)"],
        patch_drop: Annotated[float, "[0, 1)"],
        finetune_blocks: Annotated[float, "[0, inf)"] | None,
        mixup: Annotated[float, "[0, inf)"],
        cutmix: Annotated[float, "[0, inf)"],
        mixup_prob: Annotated[float, "[0, 1]"],
        mixup_switch_prob: Annotated[float, "[0, 1]"],
        label_smoothing: Annotated[float, "[0, 1)"],
        ema_decay: Annotated[float, "(0, 1)"] | None,
    ):
        super().__init__(cfg, val_set)
        classes = len(self.classes)
        self.model = call(classifier, cfg.model, num_classes=classes, drop_path=drop_path, global_pool=global_pool)
        if patch_drop:
            self.model.patch_drop = PatchDropout(patch_drop, num_prefix_tokens=1)
        self.label_smoothing, self.mix = label_smoothing, None
        if mixup or cutmix:  # random on the host, from numpy's generator, whose state checkpoints hold
            self.mix = Mixup(
                mixup, cutmix, None, mixup_prob, mixup_switch_prob, "batch", True, label_smoothing, classes
            )
        self.live, self.ema_decay = self.model, ema_decay
        if finetune_blocks is not None:
            freeze(self.live, finetune_blocks)
        if ema_decay is not None:
            self.model = copy.deepcopy(self.live).requires_grad_(False)

    def load_init(self) -> None:
        cfg = self.cfg
        if cfg.init is not None:
            pretrained = read_pretrained(cfg.init)
            load_pretrained(self.live, pretrained)
            if cfg.task.finetune_blocks is not None or not pretrained.of_a_run:
                warn_of_statistics(cfg, pretrained)
            self.model.load_state_dict(self.live.state_dict())
        elif cfg.task.finetune_blocks is not None:
            raise UserError(
                f"task.finetune_blocks={cfg.task.finetune_blocks:g} trains the last blocks of a network that init= "
                "gives: set init, or task.finetune_blocks=null to train from scratch."
            )
        else:
            log.info("init is not set: training starts from scratch")

    @property
    def trained(self) -> nn.Module:
        return self.live

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy with smoothed labels, and mixed ones where images are mixed."""
        images, labels = self.images(batch), batch["label"]
        if self.mix is None:
            return {"loss": self.objective(images, labels, self.label_smoothing)}
        if len(images) % 2 and not self.mix.mix_prob:  # for which timm wants pairs all the same
            targets = mixup_target(labels, self.mix.num_classes, smoothing=self.label_smoothing)
        else:
            images, targets = self.mix(images, labels)
        return {"loss": self.objective(images, targets, 0.0)}

    def objective(self, images: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """The mean cross-entropy with labels (B,) or shares of classes (B, classes)."""
        return F.cross_entropy(self.live(images).float(), targets, label_smoothing=label_smoothing)

    def train(self, mode: bool = True) -> "Finetune":
        """Frozen blocks stay in evaluation mode, without drop path."""
        super().train(mode)
        for block in self.live.blocks:
            if not any(p.requires_grad for p in block.parameters()):
                block.eval()
        return self

    @torch.no_grad()
    def after_step(self, skipped: Tensor) -> None:
        """Moves the average towards the weights, unless the step was skipped."""
        if self.ema_decay is not None:
            averages = [local_shard(average) for average in self.model.parameters()]
            weights = [local_shard(weight) for weight in self.live.parameters()]
            share = (1.0 - self.ema_decay) * (1.0 - skipped)  # on the device, where `_foreach_lerp_` takes numbers
            moves = torch._foreach_sub(weights, averages)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_mul_(moves, share.to(averages[0].dtype))  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(averages, moves)  # pyright: ignore[reportPrivateImportUsage]

    def extra_state(self) -> dict[str, object]:
        live = {} if self.ema_decay is None else {"live": self.live.state_dict()}
        return super().extra_state() | live

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        if self.ema_decay is not None:
            load_weights(self.live, state["live"])


def freeze(model: VisionTransformer, blocks: float) -> None:
    """Leaves only the last `blocks` blocks, the final norm and the head to be trained (paper, figure 9).

    Half a block is its MLP with its norm; 0 is the head alone.
    """
    model.requires_grad_(False)
    for module in unfrozen(model, blocks):
        module.requires_grad_(True)


def unfrozen(model: VisionTransformer, blocks: float) -> Iterator[nn.Module]:
    """The modules of a ViT that partial fine-tuning trains."""
    yield model.head
    if not blocks:
        return
    yield from (model.norm, model.fc_norm)
    whole = math.floor(blocks)
    yield from list(model.blocks)[len(model.blocks) - whole :]
    if blocks > whole:
        half = model.blocks[len(model.blocks) - whole - 1]
        yield from (half.get_submodule("norm2"), half.get_submodule("mlp"))
