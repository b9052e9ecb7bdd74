"""Masked-autoencoder pretraining (arXiv 2111.06377, section 3)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from mae.data.source import Source
from mae.device import Batch, exact
from mae.distributed.ranks import Ranks
from mae.metrics import Collector
from mae.models.mae import MaskedAutoencoder
from mae.models.masking import bind_masking
from mae.tasks import images as pictures
from mae.tasks.autoencoder import build_autoencoder
from mae.tasks.base import Autocast, TrainedTask
from mae.tasks.init_weights import warn_of_statistics
from mae.tasks.knn import KnnMonitor
from mae.tasks.online_probe import OnlineProbe, check_probe_labels
from mae.tasks.rankme import RankMe
from mae.tracking.base import Tracker
from mae.weights.load import load_pretrained
from mae.weights.read import read_pretrained


class Pretrain(TrainedTask[MaskedAutoencoder]):
    """Predict the pixels of the patches that were removed."""

    def __init__(
        self,
        cfg: DictConfig,
        val_set: Source,
        *,
        mask_ratio: Annotated[float, "(0, 1)"],
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
    ):
        super().__init__(cfg, val_set)
        self.model = build_autoencoder(cfg, cfg.target, norm_pix_loss)
        self.masking = bind_masking(cfg.masking, self.model.grid_size, mask_ratio)
        self.mask_ratio, self.predict_ratio, self.num_images = mask_ratio, predict_ratio, num_images
        self.eval_mask_ratios = eval_mask_ratios
        self.samples: dict[str, Tensor] = {}  # validation images with their masks, the same in all pictures
        self.knn_settings = (knn_every_epochs, knn_images, knn_k)
        self.knn: KnnMonitor | None = None
        width = self.model.cls_token.shape[-1]
        self.rankme = None if rankme is None else RankMe(rankme, len(val_set), width)
        self.probe = OnlineProbe(width, len(val_set.classes), online_probe_lr) if online_probe else None
        self.feature: Tensor | None = None  # of the training step's images, for the probe
        if online_probe:
            self._note_features()

    def check_data(self, train_set: Source, val_set: Source) -> None:
        """Checks the labels, where k-NN accuracy is measured or a probe learns."""
        every_epochs, images, k = self.knn_settings
        if every_epochs is not None:
            self.knn = KnnMonitor(self.cfg, train_set, val_set, every_epochs, images, k)
        if self.probe is not None:
            check_probe_labels(self.cfg, train_set, val_set)

    def load_init(self) -> None:
        """Loads the weights that `init` names, if any; a decoder that they lack keeps its initial weights."""
        if self.cfg.init is not None:
            pretrained = read_pretrained(self.cfg.init)
            load_pretrained(self.model, pretrained)
            if not pretrained.of_a_run:
                warn_of_statistics(self.cfg, pretrained)

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean loss over the predicted ones of the removed patches, which `noise` (B, L) chooses."""
        images, noise = self.images(batch), batch["noise"]
        scalars = {"loss": self.model(images, self.mask_ratio, noise, self.predict_ratio).loss}
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

        def noted(patches: Tensor, order: Tensor, num_visible: int) -> Tensor:
            tokens = encode_masked(patches, order, num_visible)
            if self.training:
                last = tokens.detach()
                visible = (last if last.ndim == 3 else norm(last[-1]))[:, 1 : 1 + num_visible]
                self.feature = visible.mean(1)
            return tokens

        vars(self.model)["encode_masked"] = noted

    def after_step(self, skipped: Tensor) -> None:
        if self.probe is not None:
            self.probe.step(skipped)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], ranks: Ranks, autocast: Autocast) -> dict[str, float]:
        """Masked loss over the validation set with fixed masks, and that of predicting each patch's mean.

        All masked patches are predicted, so that the loss is comparable whatever `predict_ratio` is.
        """
        self.eval()
        names = ["val/loss", "val/loss_of_patch_mean", *(f"val/loss_at_{r:g}" for r in self.eval_mask_ratios)]
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
            flat = ((self._centred(images) ** 2).mean(-1) * mask).sum() / mask.sum()
            sums = torch.stack([loss, flat, *more, torch.ones_like(loss)])
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
        return {k: batch[k][wanted] for k in ("image", "noise")}

    def _centred(self, images: Tensor) -> Tensor:
        target = self.model.target(images, self.model.patchify(images))
        return target - target.mean(-1, keepdim=True)

    @torch.no_grad()
    def log_images(self, run: Path, step: int, epoch: float, tracker: Tracker, autocast: Autocast) -> None:
        """A row each of originals, masked images, reconstructions, and reconstructions with the visible patches."""
        if not self.samples:
            return
        self.eval()
        images = self.images(self.samples)
        with autocast():
            pred, mask = self.model.predict(images, self.mask_ratio, self.samples["noise"])
        self.train()
        rows = pictures.reconstruction_rows(self.model, images, pred, mask)
        path = run / "images" / f"reconstruction_{step:08d}.png"
        pictures.save_rows({title: self.prepare.undo(row.float()) for title, row in rows.items()}, path)
        tracker.picture("reconstruction", path, step, f"mask ratio {self.mask_ratio:g}, epoch {epoch:g}")

    def extra_state(self) -> dict[str, object]:
        state: dict[str, object] = {} if self.knn is None else {"knn": self.knn.periods}
        return state if self.probe is None else state | {"probe": self.probe.state_dict()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        if self.knn is not None:
            self.knn.periods = state["knn"]
        if self.probe is not None:
            self.probe.load_state_dict(state["probe"])

    def summary(self, metrics: Mapping[str, float]) -> dict[str, float]:
        names = ("val/loss", "val/rankme", "val/online_top1")
        return {name.replace("/", "_"): metrics[name] for name in names if name in metrics}
