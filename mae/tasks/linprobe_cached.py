"""Linear probing on features computed once, for several learning rates in one pass."""

import logging
import math
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from mae import checkpoint, device, optim
from mae.config.build import build, call
from mae.data.subsets import reduced
from mae.metrics import Collector, Results
from mae.plan import make_plan, steps_in_epoch
from mae.tasks.common import both_sets, eval_loader, keep_classes, same_weights, sent
from mae.tasks.features import Features, extract
from mae.tasks.linprobe import Linprobe, head
from mae.tasks.results import tell, write_all

log = logging.getLogger(__name__)


class Probes(nn.Module):
    """One head a learning rate, on one BatchNorm: features (B, D) to logits (B, heads, classes)."""

    def __init__(self, width: int, classes: int, count: int):
        super().__init__()
        first = head(width, classes)
        self.norm, self.classes = first[0], classes
        self.heads = nn.ModuleList(first[1] if k == 0 else nn.Linear(width, classes) for k in range(count))
        for other in self.heads[1:]:  # all start alike
            other.load_state_dict(first[1].state_dict())

    def forward(self, features: Tensor) -> Tensor:
        weight = torch.cat([h.weight for h in self.heads])  # type: ignore[arg-type]
        bias = torch.cat([h.bias for h in self.heads])  # type: ignore[arg-type]
        return F.linear(self.norm(features), weight, bias).unflatten(1, (-1, self.classes))


def probe_features(
    run: Path,
    cfg: DictConfig,
    ranks: Any,
    tracker: Any,
    *,
    epochs: float,
    warmup_epochs: float,
    batch_size: int,
    learning_rates: list[float] | None,
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"],
) -> dict[str, Any]:
    """Features of centre-cropped images, then a head for each of `learning_rates` (x batch / 256).

    The head that validates best becomes the run's checkpoint. Every rank computes the same heads.
    """
    begun = time.perf_counter()
    torch.manual_seed(cfg.seed)
    train_set, val_set = both_sets(cfg)
    task = build({"linprobe": Linprobe}, cfg.task, cfg, val_set)
    task.begin(cfg, train_set, val_set)
    task.take_up_init(cfg)
    same_weights(ranks, task.model)
    task.to(ranks.device).eval()
    train_set = reduced(train_set, cfg.data.fraction, cfg.data.per_class, cfg.seed)
    if batch_size > len(train_set):
        raise ValueError(
            f"task.batch_size={batch_size} is larger than the training set ({len(train_set)} images), and the heads on "
            "cached features are trained on whole batches: choose a smaller one."
        )
    bank, held = (_features(cfg, task, ranks, part, precision) for part in (train_set, val_set))
    log.info("features of %d + %d images in %.1f s", len(bank.label), len(held.label), time.perf_counter() - begun)

    rates = learning_rates or [cfg.optimizer.base_lr]
    per_epoch = steps_in_epoch(len(bank.label), batch_size, drop_last=True)
    plan = call(make_plan, cfg.task, len(bank.label), per_epoch, 1)
    probes = Probes(bank.feature.shape[1], len(task.classes), len(rates)).to(ranks.device)
    optimizer = build(optim.OPTIMIZERS, cfg.optimizer, _groups(probes, rates, cfg))
    schedule = call(optim.Schedule, cfg.optimizer, batch_size, epochs, warmup_epochs)
    _train(probes, optimizer, schedule, bank, plan, cfg.seed, ranks.device)
    found = _validate(probes, held, ranks)
    best = max(range(len(rates)), key=lambda k: found[k].top(1))
    seconds = time.perf_counter() - begun

    task.model.head[0].load_state_dict(probes.norm.state_dict())
    task.model.head[1].load_state_dict(probes.heads[best].state_dict())
    path = run / "checkpoints" / checkpoint.step_name(plan.steps)
    images = plan.images_seen(plan.steps)
    tracker.start(0, plan.steps)
    where = {"step": plan.steps, "images_seen": images, "epoch": plan.steps / per_epoch}
    by_rate = {f"{rate:g}": result.top(1) for rate, result in zip(rates, found, strict=True)}
    tracker.log(where | {f"val/top1_lr_{rate}": value for rate, value in by_rate.items()})
    tracker.log(where | {f"val/{name}": value for name, value in found[best].figures().items()})
    if ranks.main:
        keep_classes(run, task.classes)
        write_all(run, task.classes, found[best])
        tell(run, task.classes, val_set, found[best], plan.steps, tracker, cfg.data.name)
        checkpoint.write(path, task.model.state_dict(), {}, {"step": plan.steps, "epoch": where["epoch"]})
    return {
        "task": "linprobe",
        "steps": plan.steps,
        "epochs": where["epoch"],
        "images_seen": images,
        "seconds": round(seconds, 2),
        "images_per_second": round(images / seconds, 1),
        "checkpoint": str(path.relative_to(run)),
        **found[best].figures(),
        "best_lr": rates[best],
        "top1_by_lr": by_rate,
    }


def _features(cfg: DictConfig, task: Linprobe, ranks: Any, source: Any, precision: str) -> Features:
    loader = eval_loader(cfg, ranks, source, cfg.task.micro_batch_size or min(256, cfg.task.batch_size))
    dtype = device.number_format(precision, ranks.device)
    found = extract(task.features, sent(loader, ranks), ranks, lambda: device.autocast(dtype, ranks.device))
    loader.close()
    return found


def _groups(probes: Probes, rates: list[float], cfg: DictConfig) -> list[dict[str, Any]]:
    """Parameter groups, each head's rate as a scale of `optimizer.base_lr`."""
    groups = []
    for linear, rate in zip(probes.heads, rates, strict=True):
        for group in call(optim.param_groups, cfg.optimizer, linear, layer_decay=None):
            groups.append(group | {"lr_scale": rate / cfg.optimizer.base_lr})
    return groups


def _train(
    probes: Probes, optimizer: Any, schedule: optim.Schedule, bank: Features, plan: Any, seed: int, where: torch.device
) -> None:
    """All heads at once: their losses are summed, so that each gets its own gradient."""
    feature, label = bank.feature.to(where), bank.label.to(where)
    probes.train()
    for step in range(plan.steps):
        epoch, number = divmod(step, plan.steps_per_epoch)
        if number == 0:
            order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(label))).to(where)
        chosen = order[number * plan.batch_size : (number + 1) * plan.batch_size]
        logits = probes(feature[chosen])
        targets = label[chosen][:, None].expand(-1, logits.shape[1])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) * logits.shape[1]
        schedule.set(optimizer, step / plan.steps_per_epoch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not math.isfinite(float(loss.detach())):
        log.warning("the largest of task.learning_rates diverged: its head is worth nothing")


@torch.no_grad()
def _validate(probes: Probes, held: Features, ranks: Any) -> list[Results]:
    """Results of each head. All ranks hold all features, so that nothing is gathered."""
    probes.eval()
    found = []
    logits = probes(held.feature.to(ranks.device)).cpu()
    for k in range(logits.shape[1]):
        collector = Collector()
        collector.add(held.index, held.label, logits[:, k])
        results = collector.results(_Alone())
        assert results is not None
        found.append(results)
    return found


class _Alone:
    """Stands for the ranks where every rank has everything."""

    @staticmethod
    def gather(value: Any) -> list[Any]:
        return [value]
