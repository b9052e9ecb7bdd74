"""Semantic segmentation from pretrained weights or from scratch (arXiv 2111.06377, section 5 and A.4)."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from mae import device
from mae.config.build import call
from mae.data.prepare import flipped
from mae.data.source import IGNORED, Source, has_class_maps
from mae.device import Batch
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.metrics import PixelResults
from mae.models.decode_heads import DecodeHead
from mae.models.segmenter import Segmenter, segmenter
from mae.tasks.base import Autocast, TrainedTask
from mae.tasks.init_weights import warn_of_statistics
from mae.tasks.labels import write_class_names
from mae.tasks.segment_maps import Overlays, count_pixels
from mae.tasks.segment_results import track_pixels, write_pixels
from mae.tracking.base import Tracker
from mae.weights.load import load_pretrained
from mae.weights.read import read_pretrained

log = logging.getLogger(__name__)


class Segment(TrainedTask[Segmenter]):
    """Learn each pixel's class: all of the network, or a head on a frozen encoder."""

    whole_images = True

    def __init__(
        self,
        cfg: DictConfig,
        val_set: Source,
        *,
        head: Literal["linear", "dpt", "upernet"],
        frozen: bool,
        drop_path: Annotated[float, "[0, 1)"],
        dice_weight: Annotated[float, "[0, inf)"],
        eval_size: Annotated[int, "[1, inf)"] | None,  # read by `eval_loader`
        eval_stride: Annotated[float, "(0, 1]"],
        num_images: Annotated[int, "[1, inf)"],
    ):
        super().__init__(cfg, val_set)
        self.classes, self.frozen = list(val_set.classes), frozen
        self.dice_weight, self.stride = dice_weight, eval_stride
        # with no classes, `check_data` says what is wrong
        self.model = call(segmenter, cfg.model, num_classes=max(1, len(self.classes)), drop_path=drop_path, head=head)
        self.model.decode_head = synchronised(self.model.decode_head, head, cfg.device)
        if frozen:
            self.model.requires_grad_(False)
            self.model.decode_head.requires_grad_(True)
        self.overlays = Overlays(len(val_set), num_images)
        self.results: PixelResults | None = None  # of the last validation
        self.best = -1.0  # mIoU of the best validation so far

    def check_data(self, train_set: Source, val_set: Source) -> None:
        """Raises UserError where images have no maps, or the splits differ in their classes."""
        name = self.cfg.data.name
        for split, source in (("training", train_set), ("validation", val_set)):
            if not has_class_maps(source):
                raise UserError(
                    f"task=segment needs a map of classes for each image, and the {split} images of data.name={name} "
                    "have none: choose data=digit_scenes, or data=segmentation_folder data.root=DIR."
                )
        if train_set.classes != val_set.classes:
            raise UserError(f"the training and validation maps of data.name={name} are of different classes.")
        if len(self.classes) < 2:
            raise UserError(f"data.name={name} has a single class: segmentation needs two or more.")

    def load_init(self) -> None:
        cfg = self.cfg
        if cfg.init is None:
            log.info("init is not set: training starts from scratch")
            return
        pretrained = read_pretrained(cfg.init)
        load_pretrained(self.model, pretrained, head="fresh" if self.frozen else "match")
        if self.model.decode_head.reads_class_token and not self.model.num_prefix_tokens:
            raise UserError(
                f"{pretrained} has no class token, which task.head={cfg.task.head} reads and a frozen encoder does not "
                "learn: choose task.head=linear or upernet, or set task.frozen=false."
            )
        warn_of_statistics(cfg, pretrained)

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean cross-entropy of the micro-batch's pixels, and with `dice_weight` the Dice loss times it."""
        if len(batch["image"]) < self.model.decode_head.smallest_batch and self.training:
            raise UserError(
                f"task.head={self.cfg.task.head} normalises over a batch, and one of a single image came: raise "
                "task.batch_size or task.micro_batch_size, or set task.drop_last=true."
            )
        logits, label = self.model(self.images(batch)).float(), flipped(batch["label"], batch["flip"]).long()
        cross_entropy = pixel_loss(logits, label)
        if not self.dice_weight:
            return {"loss": cross_entropy}
        dice = dice_loss(logits, label)
        return {"loss": cross_entropy + self.dice_weight * dice, "cross_entropy": cross_entropy, "dice": dice}

    def example_target(self, images: int) -> Tensor:
        height, width = self.model.patch_embed.img_size  # type: ignore[misc]
        return torch.zeros(images, height, width, dtype=torch.uint8)

    def train(self, mode: bool = True) -> "Segment":
        """A frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
            self.model.decode_head.train(mode)
        return self

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], ranks: Ranks, autocast: Autocast) -> dict[str, float]:
        """miou, pixel_accuracy, mean_accuracy in percent, and loss, of whole images by sliding window."""
        self.eval()
        with device.explaining_memory(ranks.device, "Images are validated whole: set task.eval_size to fewer pixels."):
            self.results = count_pixels(self.model, self.prepare, batches, ranks, autocast, self.stride, self.overlays)
        self.train()
        return {f"val/{name}": value for name, value in self.results.metrics().items()} if self.results else {}

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """By mIoU."""
        miou = metrics.get("val/miou", -1.0)
        better = miou > self.best
        self.best = max(self.best, miou)
        return better

    def log_images(self, run: Path, step: int, epoch: float, tracker: Tracker, autocast: Autocast) -> None:
        """Class names for evaluation and export, the IoU of each class, and overlays of some images."""
        write_class_names(run, self.classes)
        if self.results is not None:
            write_pixels(run, self.classes, self.results)
            path = run / "images" / f"segmentation_{step:08d}.png"
            if self.overlays.save(path, len(self.classes)):
                tracker.picture("segmentation", path, step, f"epoch {epoch:g}")

    def on_train_end(self, run: Path, step: int, tracker: Tracker) -> None:
        """The IoU of each class and the confusion matrix of the last validation, for trackers."""
        if self.results is not None:
            track_pixels(run, self.classes, self.results, step, tracker)

    def extra_state(self) -> dict[str, object]:
        return {"best": self.best}

    def load_extra_state(self, state: Mapping[str, float]) -> None:
        self.best = state["best"]

    def summary(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return super().summary(metrics) | {"best_miou": self.best}


def synchronised(head: DecodeHead, name: str, device: str) -> DecodeHead:
    """A head whose batch norms take statistics over all ranks. Raises UserError where torch cannot do so."""
    if not head.batch_norm or not dist.is_initialized() or dist.get_world_size() == 1:
        return head
    if device == "cpu" or not torch.cuda.is_available():
        raise UserError(
            f"task.head={name} normalises over a batch, whose statistics torch shares between GPUs alone: set "
            "launcher.processes=1, or task.head=linear."
        )
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(head)
    assert isinstance(shared, DecodeHead)
    return shared


def pixel_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy () over the pixels of a map (B, H, W) that are not ignored; 0 where all are."""
    total = F.cross_entropy(logits, label, ignore_index=IGNORED, reduction="sum")
    return total / (label != IGNORED).sum().clamp(min=1)


def dice_loss(logits: Tensor, label: Tensor) -> Tensor:
    """1 less the Dice coefficient () of softmax and truth (Milletari et al., arXiv 1606.04797, with plain sums).

    Sums go over a class's pixels in all of the micro-batch; the mean over the classes that occur in it."""
    classes = logits.shape[1]
    counted = (label != IGNORED)[:, None]
    truth = F.one_hot(label.where(counted[:, 0], 0), classes).movedim(-1, 1) * counted
    predicted = logits.softmax(1) * counted
    shared, sizes = (predicted * truth).sum((0, 2, 3)), (predicted + truth).sum((0, 2, 3))
    occurs = (truth.sum((0, 2, 3)) > 0).to(logits.dtype)
    coefficients = 2 * shared / sizes.clamp(min=1e-6)
    return ((1 - coefficients) * occurs).sum() / occurs.sum().clamp(min=1)
