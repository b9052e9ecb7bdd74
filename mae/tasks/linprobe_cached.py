"""Probing on features computed once, for several learning rates and layers in one pass."""

import contextlib
import copy
import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from mae import checkpoint, device, optim
from mae.config.build import build, call
from mae.data.source import Source
from mae.data.subsets import reduced
from mae.distributed.ranks import Ranks
from mae.errors import Diverged
from mae.metrics import Collector, Results
from mae.plan import Plan, check_batches, make_plan, steps_in_epoch
from mae.runs.summary import LAYERS, VAL_IMAGES, Summary
from mae.tasks.base import check_exemptions, training_summary
from mae.tasks.batches import bad_files_csv, both_sets, eval_batch_size, eval_loader, sent
from mae.tasks.features import Features, extract
from mae.tasks.init_weights import same_weights
from mae.tasks.linprobe import Linprobe, RanksBatchNorm, probe_head
from mae.tasks.linprobe_layers import LayersProbe, linprobe
from mae.tracking.base import Tracker

log = logging.getLogger(__name__)


class Probes(nn.Module):
    """One head a learning rate, on one BatchNorm: features (B, D) to logits (B, heads, classes)."""

    def __init__(self, width: int, classes: int, rates: list[float]):
        super().__init__()
        first = probe_head(width, classes)
        self.norm, self.classes, self.rates = first[0], classes, rates
        self.heads = nn.ModuleList(first[1] if k == 0 else nn.Linear(width, classes) for k in range(len(rates)))
        for other in self.heads[1:]:  # all start alike
            other.load_state_dict(first[1].state_dict())

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, heads, classes)."""
        weight = torch.cat([head.weight for head in self.heads])  # type: ignore[arg-type]
        bias = torch.cat([head.bias for head in self.heads])  # type: ignore[arg-type]
        return F.linear(self.norm(features), weight, bias).unflatten(1, (-1, self.classes))

    def whole(self, number: int) -> nn.Sequential:
        """Norm and matrix of one rate, as a probe has them."""
        return nn.Sequential(self.norm, self.heads[number])


class AttentiveProbes(nn.Module):
    """One attentive probe a learning rate: tokens (B, L, D) to logits (B, heads, classes)."""

    def __init__(self, head: nn.Sequential, rates: list[float]):
        super().__init__()
        self.rates, self.heads = rates, nn.ModuleList(copy.deepcopy(head) for _ in rates)  # all start alike

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, D) to logits (B, heads, classes)."""
        return torch.stack([head(tokens) for head in self.heads], 1)

    def whole(self, number: int) -> nn.Module:
        """The probe of one rate."""
        return self.heads[number]


def probe_features(
    run: Path,
    cfg: DictConfig,
    ranks: Ranks,
    tracker: Tracker,
    *,
    batch_size: int,
    learning_rates: list[float] | None,
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"],
) -> Summary:
    """Features of centre-cropped images, then for each layer a head for each of `learning_rates` (x batch / 256).

    The head that validates best becomes the run's checkpoint. Every rank computes the same heads. Raises UserError
    where the training set is smaller than a batch, and Diverged where the loss of the best head is not finite.
    """
    begun = time.perf_counter()
    torch.manual_seed(cfg.seed)
    train_set, val_set = both_sets(cfg)
    task = call(linprobe, cfg.task, cfg, val_set)
    task.check_data(train_set, val_set)
    task.load_init()
    same_weights(ranks, task.model)
    dtype = device.number_format(precision, ranks.device)
    task.to(ranks.device, device.weight_format(dtype)).eval()
    check_exemptions(task.model, cfg.optimizer.no_decay)
    train_set = reduced(train_set, cfg.data.fraction, cfg.data.per_class, cfg.seed)
    _plan(cfg, len(train_set))  # what cannot be trained on is refused before features are computed
    train, val = (
        _features(cfg, task, ranks, source, dtype, run, split)
        for split, source in (("train", train_set), ("val", val_set))
    )
    log.info("features of %d + %d images in %.1f s", len(train.label), len(val.label), time.perf_counter() - begun)

    rates = learning_rates or [cfg.optimizer.base_lr]
    plan = _plan(cfg, len(train.label))  # images that cannot be read have no features
    probes = initial_probes(task, rates).to(ranks.device, device.weight_format(dtype))
    numbers = range(len(task.layer_heads))
    outcomes = [_probe_layer(cfg, task, copy.deepcopy(probes), k, (train, val), plan) for k in numbers]
    task.take_results([outcome.results for outcome in outcomes])
    seconds = time.perf_counter() - begun
    outcome = next(outcome for outcome in outcomes if outcome.results is task.results)
    _write(run, ranks, tracker, task, plan, outcome.top1_by_rate)
    if not math.isfinite(loss := outcome.results.mean_loss()):
        raise Diverged(f"val/loss is {loss} after the last step.")
    extra = {"best_lr": outcome.rate, "top1_by_lr": outcome.top1_by_rate, VAL_IMAGES: len(outcome.results)}
    if isinstance(task, LayersProbe):
        extra |= task.layer_summary()
        for row, each in zip(extra[LAYERS].values(), outcomes, strict=True):
            row["best_lr"] = each.rate
    return training_summary("linprobe", plan, seconds, outcome.results.metrics() | extra)


def _plan(cfg: DictConfig, images: int) -> Plan:
    """The steps on so many images. Raises UserError where a batch is larger, or of one image."""
    plan = call(make_plan, cfg.task, images, steps_in_epoch(images, cfg.task.batch_size, cfg.task.drop_last), 1)
    check_batches(plan, cfg.task, repeats=1)
    return plan


class Outcome(NamedTuple):
    """What probing a layer gave: the best of its rates."""

    rate: float
    results: Results
    top1_by_rate: dict[str, float]


def initial_probes(task: Linprobe, rates: list[float]) -> Probes | AttentiveProbes:
    """A probe a rate, with initial weights. Every rank has all features, so that norms need no other rank's."""
    attentive = task.model.reads_patches
    probes = AttentiveProbes(task.head, rates) if attentive else Probes(task.model.embed_dim, len(task.classes), rates)
    for module in probes.modules():
        if isinstance(module, RanksBatchNorm):
            module.alone = True
    return probes


def _probe_layer(
    cfg: DictConfig,
    task: Linprobe,
    probes: Probes | AttentiveProbes,
    number: int,
    features: tuple[Features, Features],
    plan: Plan,
) -> Outcome:
    """Trains the probes of a layer on the first of `features`, validates on the second, and gives `task` the best."""
    if task.several:
        train, val = (each._replace(feature=each.feature[:, number]) for each in features)
    else:
        train, val = features
    _train(cfg, probes, train, plan)
    results = _validate(probes, val, plan.batch_size if task.model.reads_patches else len(val.label))
    best = max(range(len(results)), key=lambda k: results[k].top(1))
    task.layer_heads[number].load_state_dict(probes.whole(best).state_dict())
    top1_by_rate = {f"{rate:g}": each.top(1) for rate, each in zip(probes.rates, results, strict=True)}
    return Outcome(probes.rates[best], results[best], top1_by_rate)


def _features(
    cfg: DictConfig, task: Linprobe, ranks: Ranks, source: Source, dtype: torch.dtype, run: Path, split: str
) -> Features:
    """Features of a whole data set, on the device. The run lists the images that cannot be read."""
    if task.model.reads_patches:
        size = len(source) * task.model.patch_embed.num_patches * task.model.embed_dim * 4 * len(task.layer_heads)
        log.info("the tokens of %d images take %.2f GiB of each rank's memory", len(source), size / 2**30)
    loader = eval_loader(cfg, ranks, source, eval_batch_size(cfg.task), bad_csv=bad_files_csv(run, ranks), split=split)
    features = extract(task.features, sent(loader, ranks), ranks, partial(device.autocast, dtype, ranks.device))
    loader.close()
    return Features(*(column.to(ranks.device) for column in features))


def _groups(probes: Probes | AttentiveProbes, cfg: DictConfig) -> list[dict[str, Any]]:
    """Parameter groups, each with the number of its head."""
    return [
        group | {"head": number}
        for number in range(len(probes.rates))
        # under the names that a probe's tensors have in its model
        for group in call(
            optim.param_groups, cfg.optimizer, nn.ModuleDict({"head": probes.whole(number)}), layer_decay=None
        )
    ]


def _train(cfg: DictConfig, probes: Probes | AttentiveProbes, train: Features, plan: Plan) -> None:
    """All heads at once: their losses are summed, so that each gets its own gradient."""
    optimizer = build(optim.OPTIMIZERS, cfg.optimizer, _groups(probes, cfg))
    schedules = [
        call(optim.Schedule, cfg.optimizer, plan.batch_size, plan.epochs, cfg.task.warmup_epochs, base_lr=rate)
        for rate in probes.rates
    ]
    probes.train()
    order, logits = torch.empty(0, dtype=torch.int64), torch.zeros(1, len(schedules), 1)
    for step in range(plan.steps):
        epoch, number = divmod(step, plan.steps_per_epoch)
        if number == 0:
            permutation = np.random.default_rng([cfg.seed, epoch]).permutation(len(train.label))
            order = torch.from_numpy(permutation).to(train.label.device)
        chosen = order[number * plan.batch_size : (number + 1) * plan.batch_size]
        logits = probes(train.feature[chosen])
        targets = train.label[chosen][:, None].expand(-1, logits.shape[1])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) * logits.shape[1]
        for group in optimizer.param_groups:
            group["lr"] = schedules[group["head"]].lr(step / plan.steps_per_epoch)
        optimizer.zero_grad()
        loss.backward()
        if cfg.task.clip_grad is not None:
            for head in probes.heads:
                nn.utils.clip_grad_norm_(head.parameters(), cfg.task.clip_grad)
        optimizer.step()
    finite = logits.detach().isfinite().all(2).all(0).tolist()
    if bad := [f"{rate:g}" for rate, is_finite in zip(probes.rates, finite, strict=True) if not is_finite]:
        log.warning("with base learning rate %s the probe diverged: its head is worth nothing", " and ".join(bad))


@torch.no_grad()
def _validate(probes: Probes | AttentiveProbes, val: Features, batch_size: int) -> list[Results]:
    """Results of each head, of so many images at once. All ranks hold all features, so that nothing is gathered."""
    probes.eval()
    alone, results = Ranks(torch.device("cpu")), []
    logits_of_all = torch.cat([probes(features) for features in val.feature.split(batch_size)])
    for logits in logits_of_all.cpu().unbind(1):
        collector = Collector()
        collector.add(val.sample_index.cpu(), val.label.cpu(), logits)
        result = collector.results(alone)
        assert result is not None
        results.append(result)
    return results


def _write(
    run: Path, ranks: Ranks, tracker: Tracker, task: Linprobe, plan: Plan, top1_by_rate: dict[str, float]
) -> None:
    """Logs all rates, and writes the best head as a checkpoint with its results."""
    step, epoch = plan.steps, plan.steps / plan.steps_per_epoch
    position = {"step": step, "images_seen": plan.images_seen(step), "epoch": epoch}
    tracker.start(0, step)
    tracker.log(position | {f"val/top1_lr_{rate}": value for rate, value in top1_by_rate.items()})
    assert task.results is not None
    by_layer = task.by_layer() if isinstance(task, LayersProbe) else {}
    tracker.log(position | {f"val/{name}": value for name, value in task.results.metrics().items()} | by_layer)
    if ranks.main:
        task.log_images(run, step, epoch, tracker, contextlib.nullcontext)
        task.on_train_end(run, step, tracker)
        state = task.model.state_dict()
        about = {"step": step, "epoch": epoch, **task.manifest_facts(run)}
        checkpoint.write(run / "checkpoints" / checkpoint.step_name(step), state, {}, about)
