"""Masked-autoencoder pretraining (arXiv 2111.06377, section 3)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from mae import device
from mae.config.build import call
from mae.data.prepare import Prepare
from mae.models.mae import MaskedAutoencoder
from mae.tasks import images as pictures
from mae.tasks.common import warn_of_statistics
from mae.tasks.knn import Signal
from mae.weights.load import load_pretrained
from mae.weights.read import read_pretrained


class Pretrain(nn.Module):
    """Predict the pixels of the patches that were removed."""

    def __init__(
        self,
        cfg: DictConfig,
        val_set: Any,
        *,
        mask_ratio: Annotated[float, "(0, 1)"],
        norm_pix_loss: bool,
        num_images: Annotated[int, "[1, inf)"],
        eval_mask_ratios: list[Annotated[float, "(0, 1)"]],
        knn_every_epochs: Annotated[float, "(0, inf)"] | None,
        knn_images: Annotated[int, "[1, inf)"],
        knn_k: Annotated[int, "[1, inf)"],
    ):
        super().__init__()
        self.model = call(MaskedAutoencoder, cfg.model, norm_pix_loss=norm_pix_loss)
        self.prepare = call(Prepare, cfg.data)
        self.mask_ratio, self.num_images = mask_ratio, num_images
        self.eval_mask_ratios = eval_mask_ratios
        self.val_count = len(val_set)
        self.samples: dict[str, Tensor] = {}  # validation images with their masks, the same in all pictures
        self.knn_settings = (knn_every_epochs, knn_images, knn_k)
        self.knn: Signal | None = None

    def begin(self, cfg: DictConfig, train_set: Any, val_set: Any) -> None:
        """Looks at the labels, where k-NN accuracy is wanted."""
        every, images, k = self.knn_settings
        if every is not None:
            self.knn = Signal(cfg, train_set, val_set, every, images, k)

    def take_up_init(self, cfg: DictConfig) -> None:
        """Loads the weights that `init` names, if any; without a decoder in them ours starts afresh."""
        if cfg.init is not None:
            pretrained = read_pretrained(cfg.init)
            load_pretrained(self.model, pretrained)
            if not pretrained.of_a_run:
                warn_of_statistics(cfg, pretrained)

    @property
    def trained(self) -> nn.Module:
        """What the optimizer works on."""
        return self.model

    @property
    def num_patches(self) -> int:
        """How many numbers of masking noise a sample needs."""
        return self.model.num_patches

    def images(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The batch as the model takes it: flipped, normalised, in the weights' type."""
        return self.prepare(batch["image"], batch.get("flip")).to(self.model.pos_embed.dtype)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean loss over removed patches; `noise` (B, L) decides which those are."""
        return {"loss": self.model(self.images(batch), self.mask_ratio, batch["noise"]).loss}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]], ranks: Any, autocast: Any) -> dict[str, float]:
        """Masked loss over the validation set with fixed masks, and that of predicting each patch's mean."""
        self.eval()
        names = ["val/loss", "val/loss_of_patch_mean", *(f"val/loss_at_{r:g}" for r in self.eval_mask_ratios)]
        total = torch.zeros(len(names) + 1, dtype=torch.float64, device=device.exact(ranks.device))  # last: images
        chosen: list[dict[str, Tensor]] = []
        for batch in batches:
            if ranks.main and not self.samples:
                chosen.append(self._choose(batch, ranks.world))
            images = self.images(batch)
            with autocast():
                loss, mask = self.model(images, self.mask_ratio, batch["noise"])
                more = [self.model(images, ratio, batch["noise"]).loss for ratio in self.eval_mask_ratios]
            flat = ((self._centred(images) ** 2).mean(-1) * mask).sum() / mask.sum()
            found = torch.stack([loss, flat, *more, torch.ones_like(loss)])
            total += found.to(total.device).double() * len(images)
        if chosen:
            self.samples = {k: torch.cat([c[k] for c in chosen])[: self.num_images] for k in ("image", "noise")}
        self.train()
        *sums, count = ranks.sum(total).tolist()
        return {name: value / count for name, value in zip(names, sums, strict=True)} if count else {}

    def signal(self, epoch: float, ranks: Any, autocast: Any) -> dict[str, float]:
        """k-NN accuracy of the class token, where `knn_every_epochs` asks for it."""
        if self.knn is None:
            return {}
        self.eval()
        found = self.knn.measure(lambda b: self.model.forward_features(self.images(b))[:, 0], epoch, ranks, autocast)
        self.train()
        return found

    def _choose(self, batch: Mapping[str, Tensor], world: int) -> dict[str, Tensor]:
        """The batch's share of `num_images` samples, evenly spread over the validation set."""
        stride = max(1, self.val_count // (self.num_images * world)) * world
        wanted = (batch["index"] % stride == 0).nonzero().squeeze(1)
        return {k: batch[k][wanted] for k in ("image", "noise")}

    def _centred(self, images: Tensor) -> Tensor:
        target = self.model.target(images)
        return target - target.mean(-1, keepdim=True)

    @torch.no_grad()
    def draw(self, run: Path, where: Mapping[str, Any], tracker: Any, autocast: Any) -> None:
        """original, masked, reconstruction, reconstruction with the visible patches: a row each."""
        if not self.samples:
            return
        self.eval()
        images = self.images(self.samples)
        with autocast():
            pred, mask = self.model.predict(images, self.mask_ratio, self.samples["noise"])
        self.train()
        rows = pictures.reconstruction_rows(self.model, images, pred, mask)
        shown = {title: self.prepare.undo(row.float()) for title, row in rows.items()}
        path = run / "images" / f"reconstruction_{where['step']:08d}.png"
        pictures.save_rows(shown, path)
        caption = f"mask ratio {self.mask_ratio:g}, epoch {where['epoch']:g}"
        tracker.picture("reconstruction", path, where["step"], caption)

    def conclude(self, run: Path, step: int, tracker: Any, data: str) -> None:
        """Nothing that the validations have not told."""

    def improved(self, metrics: Mapping[str, float]) -> bool:
        """No checkpoint is kept as the best: the last one serves best downstream."""
        return False

    def after_step(self, skipped: Tensor) -> None:
        """Nothing to do between steps."""

    def extra_state(self) -> dict[str, Any]:
        """When k-NN was last measured."""
        return {} if self.knn is None else {"knn": self.knn.last}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `extra_state` gave."""
        if self.knn is not None:
            self.knn.last = state["knn"]

    @staticmethod
    def summary(metrics: Mapping[str, float]) -> dict[str, float]:
        """The main result."""
        return {"val_loss": metrics["val/loss"]} if metrics else {}
