"""A linear classifier that learns on the features of an encoder while that trains, and never changes it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from mae.data.source import Source
from mae.errors import UserError
from mae.tasks.labels import check_classes
from mae.weights.parts import BATCH_NORM_EPS

BETAS, ADAM_EPS = (0.9, 0.999), 1e-8  # Adam (Kingma and Ba, 2015)
SHARE = 0.1  # of a step's statistics in the running ones, as in torch's BatchNorm


class OnlineProbe(nn.Module):
    """A linear classifier on normalised features, trained by Adam at a constant rate on each step's batch.

    Its state is buffers alone, and its gradient, a closed form, is added up beside autograd. So the optimizer, the
    gradient's norm, the loss scale, DDP and FSDP see nothing of it, and the encoder keeps its bits. It starts at zero
    and draws no random number. Features are normalised by running statistics, in training as in validation.
    """

    weight: Tensor  # (C, D + 1), the last column the bias
    momentum: Tensor  # (C, D + 1)
    square: Tensor  # (C, D + 1)
    mean: Tensor  # (D,) of the features
    variance: Tensor  # (D,)
    steps: Tensor  # (): of the probe itself
    sums: Tensor  # (C (D + 1) + 2 D + 1,) since the last step: gradient, features, their squares, images
    alone = False  # true during a trial step, which may fail on one rank alone

    def __init__(self, width: int, classes: int, lr: float):
        super().__init__()
        self.width, self.classes, self.lr = width, classes, lr
        for name in ("weight", "momentum", "square"):
            self.register_buffer(name, torch.zeros(classes, width + 1))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("sums", torch.zeros(classes * (width + 1) + 2 * width + 1))

    def forward(self, feature: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C)."""
        return F.linear(self._normalised(feature), self.weight)

    def _normalised(self, feature: Tensor) -> Tensor:
        normal = (feature.to(self.mean.dtype) - self.mean) / (self.variance + BATCH_NORM_EPS).sqrt()
        return F.pad(normal, (0, 1), value=1.0)

    @torch.no_grad()
    def learn(self, feature: Tensor, label: Tensor, weight: Tensor | float) -> Tensor:
        """Adds the gradient of a micro-batch, (B, D) and (B,); returns its mean cross-entropy ().

        A micro-batch of `weight` 0 stands in for one of no image.
        """
        with torch.autocast(feature.device.type, enabled=False):
            normal = self._normalised(feature)
            logits = F.linear(normal, self.weight)
            gradient = (logits.softmax(1) - F.one_hot(label, self.classes)).T @ normal
            plain = feature.to(self.mean.dtype)
            count = torch.full_like(self.sums[-1:], len(feature))
            sums = torch.cat([gradient.flatten(), plain.sum(0), plain.square().sum(0), count])
            self.sums += sums * (weight > 0)
            return F.cross_entropy(logits, label)

    @torch.no_grad()
    def step(self, skipped: Tensor) -> None:
        """One step on the images of all ranks. It changes nothing where the encoder's was skipped, or where a feature
        is not finite."""
        if dist.is_initialized() and not self.alone:
            dist.all_reduce(self.sums)
        good = self.sums.isfinite().all() & (skipped == 0)
        gradient, feature, squares, count = (self.sums / self.sums[-1]).split(
            [self.weight.numel(), self.width, self.width, 1]
        )
        del count
        steps = self.steps + 1
        gradient = gradient.view_as(self.weight)
        momentum = self.momentum.lerp(gradient, 1 - BETAS[0])
        square = self.square.lerp(gradient.square(), 1 - BETAS[1])
        scale = (square / (1 - BETAS[1] ** steps)).sqrt() + ADAM_EPS
        share = (1 / steps).clamp(min=SHARE)  # first the mean of all steps
        changes = {
            "weight": self.weight - self.lr * momentum / (1 - BETAS[0] ** steps) / scale,
            "momentum": momentum,
            "square": square,
            "mean": self.mean.lerp(feature, share),
            "variance": self.variance.lerp((squares - feature.square()).clamp(min=0), share),
            "steps": steps,
        }
        for name, value in changes.items():
            buffer = self.get_buffer(name)
            buffer.copy_(torch.where(good, value, buffer))
        self.sums.zero_()


def check_probe_labels(cfg: DictConfig, train_set: Source, val_set: Source) -> None:
    """Raises UserError where the probe has no labels to learn from."""
    try:
        check_classes(cfg, train_set, val_set)
    except UserError as error:
        raise UserError(f"task.online_probe=true learns from labels, false needs none: {error}") from error
