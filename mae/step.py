"""One optimizer step: gradients of its micro-batches, and the step itself, skipped where it is not finite."""

import math

import torch
from torch import Tensor, nn

from mae import device
from mae.distributed.fsdp import gathered, replicated_like
from mae.tracking import norms
from mae.training import Training


def accumulate(t: Training, batch: device.Batch, last_of_step: bool) -> dict[str, Tensor]:
    """Adds the gradients of a micro-batch; returns its scalars, weighted by its share of the step."""
    with t.ranks.accumulating(t.model, more=not last_of_step):
        with t.autocast():
            scalars = {name: value * batch["weight"] for name, value in t.model(batch).items()}
        t.ranks.alive()
        t.scaler.scale(poisoned(scalars["loss"])).backward()
    return scalars


def poisoned(loss: Tensor) -> Tensor:
    """The loss, with NaN gradients where it is not finite: every rank then sees it in the shared gradient."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def take_step(t: Training, clip_grad: float | None, by_block: bool) -> dict[str, Tensor]:
    """One optimizer step, skipped on the device itself where the gradient is not finite.

    Returns the gradient's norm, and with `by_block` those of each block's gradient and weights.
    """
    t.scaler.unscale_(t.optimizer)
    parameters = [p for p in t.task.trained.parameters() if p.grad is not None]
    norm = gathered(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    sizes = {"grad_norm": norm} | (gathered(norms.norms(t.task.trained)) if by_block else {})
    if clip_grad is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
    bad = (~norm.isfinite()).to(torch.float32)
    if t.scaler.is_enabled():
        t.scaler.step(t.optimizer)
        t.scaler.update()
    elif device.skips_by_itself(t.optimizer, t.ranks.device):
        t.optimizer.found_inf = replicated_like(bad, parameters)  # type: ignore[attr-defined]  # as GradScaler tells them
        t.optimizer.step()
    elif not bad:  # the other optimizers cannot skip by themselves: here the host waits
        t.optimizer.step()
    t.optimizer.zero_grad(set_to_none=True)
    t.task.after_step(bad)
    t.progress.bad_steps += bad
    t.progress.bad_run = (t.progress.bad_run + bad) * bad
    return sizes
