"""Parameter groups with layer decay, the learning-rate schedule, and the optimizers."""

import logging
import math
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from timm.optim.lion import Lion
from timm.optim.muon import Muon
from torch import Tensor, nn

from mae.device import has_bf16

log = logging.getLogger(__name__)

ParameterGroup = dict[str, Any]  # as torch's optimizers have them, with `lr_scale` and `layer`


def layer_id(name: str, depth: int) -> int:
    """Layer of a parameter for layer decay (arXiv 2111.06377, A.1, after BEiT).

    0: class token, position and patch embedding; k + 1: block k; depth + 1: all that follows.
    """
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def param_groups(
    model: nn.Module,
    *,
    weight_decay: Annotated[float, "[0, inf)"],
    layer_decay: Annotated[float, "(0, 1]"] | None,
    no_decay: list[str],
) -> list[ParameterGroup]:
    """Trained parameters as optimizer groups of one learning-rate scale and one weight decay each.

    Tensors of one dimension or none (biases, norms) are never decayed, nor are those that `no_decay` names.
    With `layer_decay`, layer i of a model with n + 1 layers is scaled by `layer_decay ** (n - i)`.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    depth = len({n.split(".")[1] for n, _ in model.named_parameters() if n.startswith("blocks.")})
    groups: dict[tuple[int, bool], ParameterGroup] = {}
    for name, parameter in named:
        layer = depth + 1 if layer_decay is None else layer_id(name, depth)
        decayed = parameter.ndim > 1 and name not in no_decay
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": 1.0 if layer_decay is None else layer_decay ** (depth + 1 - layer),
                "layer": layer,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


class Schedule:
    """Linear warm-up from 0, then half a cosine to `min_lr` (arXiv 2111.06377, table 8).

    A function of the fractional epoch. The peak is `base_lr * batch_size / 256` (Goyal et al., 2017).
    """

    def __init__(
        self,
        batch_size: int,
        epochs: float,
        warmup_epochs: float,
        *,
        base_lr: Annotated[float, "(0, inf)"],
        min_lr: Annotated[float, "[0, inf)"],
    ):
        self.peak = base_lr * batch_size / 256
        self.min_lr, self.epochs, self.warmup_epochs = min_lr, epochs, warmup_epochs

    def lr(self, epoch: float) -> float:
        """Learning rate at `epoch`, before a group's own scale."""
        if epoch < self.warmup_epochs:
            return self.peak * epoch / self.warmup_epochs
        done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-12)
        return self.min_lr + (self.peak - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def set(self, optimizer: torch.optim.Optimizer, epoch: float) -> float:
        """Gives each group its rate for the step at `epoch`; returns the unscaled rate."""
        lr = self.lr(epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        return lr


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017) as MoCo v3 and the MAE paper use it (table 10).

    Tensors of one dimension or none are neither decayed nor scaled. A step is skipped where `found_inf`, () on the
    device, is not 0, as torch's fused optimizers do it: without the host's knowing.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable, lr: float, momentum: float, trust_coefficient: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust_coefficient, "weight_decay": 0.0})
        self._step_supports_amp_scaling = True  # by which GradScaler, too, knows those that skip by themselves

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: ParameterGroup) -> None:
        update = p.grad
        assert update is not None
        if p.ndim > 1:
            update = update.add(p, alpha=group["weight_decay"])
            size, change = p.norm(), update.norm()
            ratio = group["trust"] * size / change
            update = update * torch.where((size > 0) & (change > 0), ratio, torch.ones_like(ratio))
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        moved = state["momentum_buffer"].mul(group["momentum"]).add_(update)
        for old, new in ((state["momentum_buffer"], moved), (p, p.add(moved, alpha=-group["lr"]))):
            old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))


def adamw(
    groups: list[ParameterGroup],
    *,
    betas: list[Annotated[float, "[0, 1)"]],
    eps: Annotated[float, "(0, inf)"],
    fused: bool,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019); `fused` makes one pass over each tensor."""
    return torch.optim.AdamW(groups, lr=0.0, betas=(betas[0], betas[1]), eps=eps, fused=fused)


def sgd(groups: list[ParameterGroup], *, momentum: Annotated[float, "[0, 1)"], nesterov: bool) -> torch.optim.Optimizer:
    """SGD with momentum, fused where torch can, since a fused step can be skipped without the host's knowing."""
    weights = [p for group in groups for p in group["params"]]
    fused = not any(hasattr(p, "placements") for p in weights)  # torch 2.14 has no fused SGD of spread weights
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov, fused=fused)
    for p in weights if momentum else []:
        # torch's own first step allocates them, and leaves in them what memory held where that step is skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def restore_fused(loaded: torch.optim.Optimizer) -> None:
        for group in loaded.param_groups:  # saved where weights were spread otherwise
            group["fused"] = fused

    optimizer.register_load_state_dict_post_hook(restore_fused)
    return optimizer


def lars(
    groups: list[ParameterGroup],
    *,
    momentum: Annotated[float, "[0, 1)"],
    trust_coefficient: Annotated[float, "(0, inf)"],
) -> torch.optim.Optimizer:
    """LARS, the linear probe's optimizer."""
    return LARS(groups, lr=0.0, momentum=momentum, trust_coefficient=trust_coefficient)


def lion(groups: list[ParameterGroup], *, betas: list[Annotated[float, "[0, 1)"]]) -> torch.optim.Optimizer:
    """Lion (Chen et al., 2023), timm's."""
    return Lion(groups, lr=1e-4, betas=(betas[0], betas[1]))


def muon(
    groups: list[ParameterGroup], *, betas: list[Annotated[float, "[0, 1)"]], momentum: Annotated[float, "[0, 1)"]
) -> torch.optim.Optimizer:
    """Muon (Jordan et al., 2024) for matrices and AdamW for the rest, timm's, which orthogonalises in bfloat16."""
    device = groups[0]["params"][0].device
    if device.type == "cpu" and not has_bf16(device):
        log.warning(
            "optimizer=muon computes in bfloat16, for which this cpu has no arithmetic of its own: a step can take "
            "many times as long as with optimizer=adamw."
        )
    return Muon(groups, lr=0.02, betas=(betas[0], betas[1]), momentum=momentum)


OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "lars": lars, "lion": lion, "muon": muon}
