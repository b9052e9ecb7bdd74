"""Masked-autoencoder pretraining (arXiv 2111.06377, section 3)."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from omegaconf import DictConfig
from torch import Tensor

from mae.checkpoint import weights_digest
from mae.data.phases import phases_of
from mae.data.source import Source
from mae.data.subsets import Subset, reduced
from mae.device import Batch, exact, select_rows
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.metrics import Collector
from mae.models.mae import MaskedAutoencoder
from mae.models.masking import bind_masking, middle_ratio, ratios_of
from mae.models.targets import FeatureTarget, PixelTarget
from mae.models.teacher import Teacher
from mae.tasks import images as pictures
from mae.tasks.autoencoder import build_autoencoder, restore_teacher
from mae.tasks.base import Autocast, TrainedTask
from mae.tasks.batches import eval_loader, sent
from mae.tasks.init_weights import same_weights, warn_of_statistics
from mae.tasks.knn import KnnMonitor
from mae.tasks.online_probe import OnlineProbe, check_probe_labels
from mae.tasks.patch_sums import images_to_fit
from mae.tasks.rankme import RankMe
from mae.tracking.base import Tracker
from mae.weights.adapt import Adaptation
from mae.weights.load import load_pretrained
from mae.weights.read import read_pretrained

log = logging.getLogger(__name__)
FIT_BATCH = 64  # images of which patches are summed at a time


class Pretrain(TrainedTask[MaskedAutoencoder]):
    """Predict a target of the patches that were removed."""

    def __init__(
        self,
        cfg: DictConfig,
        val_set: Source,
        *,
        mask_ratio: Annotated[float, "(0, 1)"] | list[Annotated[float, "(0, 1)"]],
        img_size_schedule: list[list[int | float | list[int]]] | None,
        predict_ratio: Annotated[float, "(0, 1)"] | None,
        norm_pix_loss: bool,
        num_images: Annotated[int, "[1, inf)"],
        eval_mask_ratios: list[Annotated[float, "(0, 1)"]],
        knn_every_epochs: Annotated[float, "(0, inf)"] | None,
        knn_images: Annotated[int, "[1, inf)"],
        knn_k: Annotated[int, "[1, inf)"],
        rankme: Annotated[int, "[2, inf)"] | None,
        online_probe: bool,
        online_probe_lr: Annotated[float, "(0, inf)"],
        init_channels: Literal["mean"] | list[list[Annotated[int, "[0, inf)"]]] | None,
        init_patch_size: Literal["resize"] | None,
    ):
        super().__init__(cfg, val_set)
        self.model = build_autoencoder(cfg, cfg.target, norm_pix_loss, self.prepare)
        self.mask_ratio, self.predict_ratio, self.num_images = middle_ratio(mask_ratio), predict_ratio, num_images
        self.phases = phases_of(img_size_schedule, self.model.patch_size, self.mask_ratio)
        self.model.smaller_sizes = tuple(phase.size for phase in self.phases)
        if self.phases and self.model.target.one_size:
            raise UserError(
                f"task.img_size_schedule changes the size of images, and target={cfg.target.name} needs one: "
                "set task.img_size_schedule=null, or choose target=pixels."
            )
        self.mask_ratios = tuple(phase.mask_ratio for phase in self.phases)
        self.mask_ratios = self.mask_ratios or ratios_of(mask_ratio, self.model.num_patches)
        self.masking = bind_masking(cfg.masking, self.model.grid_size, self.mask_ratio)
        self.eval_mask_ratios = eval_mask_ratios
        self.adaptation = Adaptation(init_channels, init_patch_size)
        self.samples: dict[str, Tensor] = {}  # validation images with their masks, the same in all pictures
        self.knn_settings = (knn_every_epochs, knn_images, knn_k)
        self.knn: KnnMonitor | None = None
        width = self.model.cls_token.shape[-1]
        self.rankme = None if rankme is None else RankMe(rankme, len(val_set), width)
        self.probe = OnlineProbe(width, len(val_set.classes), online_probe_lr) if online_probe else None
        self.feature: Tensor | None = None  # of the training step's images, for the probe
        if online_probe:
            self.classes = list(val_set.classes)
            self._note_features()

    def check_data(self, train_set: Source, val_set: Source) -> None:
        """Checks the labels, where k-NN accuracy is measured or a probe learns."""
        every_epochs, images, k = self.knn_settings
        if every_epochs is not None:
            self.knn = KnnMonitor(self.cfg, train_set, val_set, every_epochs, images, k)
        if self.probe is not None:
            check_probe_labels(self.cfg, train_set, val_set)

    def load_init(self) -> None:
        """Loads the weights that `init` names, if any; a decoder that they lack keeps its initial weights.

        They may be of another size of image, and as the keys `init_*` allow of other channels and patches.
        """
        if self.cfg.init is not None:
            pretrained = read_pretrained(self.cfg.init)
            load_pretrained(self.model, pretrained, adaptation=self.adaptation)
            if not pretrained.of_a_run:
                warn_of_statistics(self.cfg, pretrained)

    def estimate(self, train_set: Source, ranks: Ranks) -> None:
        """Fits the target, where it has anything to fit."""
        target = self.model.target
        if target.fit_from_file():
            log.info("target=%s: fitted from %s", self.cfg.target.name, self.cfg.target.fitted)
            return
        if target.fit_images is None:
            return
        data = self.cfg.data
        source = reduced(train_set, data.fraction, data.per_class, self.cfg.seed)
        source = Subset(source, images_to_fit(len(source), target.fit_images))
        log.info("fitting target=%s to %d training images", self.cfg.target.name, len(source))
        loader = eval_loader(self.cfg, ranks, source, FIT_BATCH)
        with torch.no_grad():
            target.estimate((self.model.patchify(self.images(batch)) for batch in sent(loader, ranks)), ranks.sum)

    def check_ranks(self, ranks: Ranks) -> None:
        """Compares the teacher that each rank has read."""
        if self.teacher is not None:
            same_weights(ranks, self.teacher, "target.teacher")

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean loss over the predicted ones of the removed patches, which `noise` (B, L) chooses."""
        ratio = self.mask_ratios[batch["ratio"].shape[0]] if "ratio" in batch else self.mask_ratio
        scalars = {"loss": self.model(self.images(batch), ratio, batch["noise"], self.predict_ratio).loss}
        if self.probe is not None and self.training:
            assert self.feature is not None
            scalars["online_loss"] = self.probe.learn(self.feature, batch["label"], batch.get("weight", 1.0))
            self.feature = None
        return scalars

    def _note_features(self) -> None:
        """From now on each training step notes in `feature` the mean of the visible patches' tokens (B, D).

        That estimates the mean over all patches, so that a probe of masked images serves whole ones.
        """
        encode_masked, norm = self.model.encode_masked, self.model.norm

        def noted(patches: Tensor, positions: Tensor) -> Tensor:
            tokens = encode_masked(patches, positions)
            if self.training:
                last = tokens.detach()
                visible = (last if last.ndim == 3 else norm(last[-1]))[:, 1 : 1 + patches.shape[1]]
                self.feature = visible.mean(1)
            return tokens

        vars(self.model)["encode_masked"] = noted

    def after_step(self, skipped: Tensor) -> None:
        if self.probe is not None:
            self.probe.step(skipped)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], ranks: Ranks, autocast: Autocast) -> dict[str, float]:
        """Masked loss over the validation set with fixed masks, and for pixels that of predicting each patch's mean.

        All masked patches are predicted, so that the loss is comparable whatever `predict_ratio` is. Of a range of mask
        ratios the middle one is taken.
        """
        self.eval()
        flat_name = ["val/loss_of_patch_mean"] if isinstance(self.model.target, PixelTarget) else []
        names = ["val/loss", *flat_name, *(f"val/loss_at_{r:g}" for r in self.eval_mask_ratios)]
        total = torch.zeros(len(names) + 1, dtype=torch.float64, device=exact(ranks.device))  # last: images
        chosen: list[dict[str, Tensor]] = []
        collector = Collector()
        for batch in batches:
            if ranks.main and not self.samples:
                chosen.append(self._choose(batch, ranks.world))
            images = self.images(batch)
            with autocast():
                loss, mask = self.model(images, self.mask_ratio, batch["noise"])
                more = [self.model(images, ratio, batch["noise"]).loss for ratio in self.eval_mask_ratios]
            self._examine(batch, images, collector, autocast)
            flat = [((self._centred(images) ** 2).mean(-1) * mask).sum() / mask.sum() for _ in flat_name]
            sums = torch.stack([loss, *flat, *more, torch.ones_like(loss)])
            total += sums.to(total.device).double() * len(images)
        if chosen:
            self.samples = {k: torch.cat([c[k] for c in chosen])[: self.num_images] for k in ("image", "noise")}
        self.train()
        *sums, count = ranks.sum(total).tolist()
        metrics = {name: value / count for name, value in zip(names, sums, strict=True)} if count else {}
        if self.rankme is not None:
            metrics |= self.rankme.result(ranks)
        if self.probe is not None and (results := collector.results(ranks)) is not None:
            metrics["val/online_top1"] = results.top(1)
        return metrics

    def _examine(self, batch: Batch, images: Tensor, collector: Collector, autocast: Autocast) -> None:
        """Collects the features of whole images for RankMe and the probe."""
        if self.rankme is None and self.probe is None:
            return
        with autocast():
            feature = self.model.forward_features(images)[:, 1:].mean(1)
        if self.rankme is not None:
            self.rankme.add(batch["index"], feature)
        if self.probe is not None:
            collector.add(batch["index"], batch["label"], self.probe(feature))

    def monitor(self, epoch: float, ranks: Ranks, autocast: Autocast) -> dict[str, float]:
        """k-NN accuracy of the class token, every `knn_every_epochs`."""
        if self.knn is None:
            return {}
        self.eval()
        metrics = self.knn.measure(
            lambda batch: self.model.forward_features(self.images(batch))[:, 0], epoch, ranks, autocast
        )
        self.train()
        return metrics

    def _choose(self, batch: Mapping[str, Tensor], world: int) -> dict[str, Tensor]:
        """The samples in this batch, of `num_images` that are spread evenly over the validation set."""
        stride = max(1, len(self.val_set) // (self.num_images * world)) * world
        wanted = (batch["index"] % stride == 0).nonzero().squeeze(1)
        return {k: select_rows(batch[k], wanted) for k in ("image", "noise")}

    def _centred(self, images: Tensor) -> Tensor:
        target = self.model.target(images, self.model.patchify(images))
        return target - target.mean(-1, keepdim=True)

    @torch.no_grad()
    def log_images(self, run: Path, step: int, epoch: float, tracker: Tracker, autocast: Autocast) -> None:
        """A row each of originals, masked images and predictions, as `reconstruction_rows` has them."""
        if not self.samples:
            return
        self.eval()
        images = self.images(self.samples)
        with autocast():
            pred, mask = self.model.predict(images, self.mask_ratio, self.samples["noise"])
        self.train()
        rows = pictures.reconstruction_rows(self.model, images, pred, mask, self.prepare.undo)
        path = run / "images" / f"reconstruction_{step:08d}.png"
        pictures.save_rows(rows, path)
        tracker.picture("reconstruction", path, step, f"mask ratio {self.mask_ratio:g}, epoch {epoch:g}")

    def extra_state(self) -> dict[str, object]:
        state: dict[str, object] = {} if self.knn is None else {"knn": self.knn.periods}
        if self.teacher is not None:
            state["teacher"] = weights_digest(self.teacher.state_dict())
        return state if self.probe is None else state | {"probe": self.probe.state_dict()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        if self.knn is not None:
            self.knn.periods = state["knn"]
        if self.probe is not None:
            self.probe.load_state_dict(state["probe"])
        if self.teacher is not None:
            restore_teacher(self.teacher, state["teacher"], self.cfg.target.teacher)

    @property
    def teacher(self) -> Teacher | None:
        """The network whose features are predicted, if any."""
        return self.model.target.teacher if isinstance(self.model.target, FeatureTarget) else None

    def summary(self, metrics: Mapping[str, float]) -> dict[str, float]:
        names = ("val/loss", "val/rankme", "val/online_top1")
        return {name.replace("/", "_"): metrics[name] for name in names if name in metrics}
