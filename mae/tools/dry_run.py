"""`dry_run=true`: the plan of a config, computed without data, memory or a file on disk."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae import data, device, optim
from mae.config import rules
from mae.config.build import build, call
from mae.config.identity import run_directory
from mae.data.phases import phases_of
from mae.data.subsets import reduced
from mae.errors import UserError
from mae.launch.pipeline import stage_configs
from mae.models.layers import blocks_of
from mae.models.mae import MaskedAutoencoder
from mae.models.masking import middle_ratio
from mae.plan import Plan, check_batches, make_plan, steps_in_epoch
from mae.tasks.registry import TASKS
from mae.tools.bottlenecks import host_work
from mae.tools.cost import Cost, cost_text, duration_text, estimate_cost
from mae.tools.planned_model import images_at_once, mean_operations, model_on_meta, operations, parameters, peak_bytes


def count_images(cfg: DictConfig) -> int:
    """The number of training images: of the source, or of its YAML where the data are absent."""
    try:
        source = build(data.SOURCES, cfg.data, "train")
    except (ValueError, OSError):
        known = cfg.data.get("train_images")
        if known is None:
            raise
        known = max(1, round(known * cfg.data.fraction))
        if cfg.data.per_class is None:
            return known
        if cfg.data.num_classes is None:
            raise UserError(
                "data.per_class of data that are not here needs their data.num_classes: set it too."
            ) from None
        return min(known, cfg.data.per_class * cfg.data.num_classes)
    return len(reduced(source, cfg.data.fraction, cfg.data.per_class, cfg.seed))


def planned_device(cfg: DictConfig) -> tuple[torch.device, torch.dtype]:
    """The device and its number format; those of a device that is not here need `estimate.tflops`.

    Raises ValueError.
    """
    try:
        here = device.pick(cfg.device)
        return here, device.number_format(cfg.task.precision, here)
    except ValueError as error:
        if cfg.estimate.tflops is None:
            raise UserError(f"{error} To plan for one elsewhere, give its rate: estimate.tflops=300.") from error
        format = "bf16" if cfg.task.precision == "auto" and cfg.device == "cuda" else cfg.task.precision
        return torch.device(cfg.device), device.FORMATS.get(format, torch.float32)


def plan_of(cfg: DictConfig) -> Plan:
    """Steps and accumulation, as the run itself would compute them."""
    images, world = count_images(cfg), rules.devices(cfg)
    repeats = cfg.data.repeats
    per_epoch = steps_in_epoch(images, cfg.task.batch_size, cfg.task.drop_last or repeats > 1)
    plan = call(make_plan, cfg.task, images, per_epoch, world)
    check_batches(plan, cfg.task, repeats)
    return plan


class PlanText(NamedTuple):
    """A plan as text, a line for each fact, and the seconds of training that it takes."""

    text: str
    seconds: float


def report(cfg: DictConfig) -> str:
    """The plan of a config as text."""
    return plan_text(cfg).text


def total(seconds: Collection[float]) -> str:
    """The closing line of a sweep's plan, from the seconds of its members."""
    count = f"{len(seconds)} member{'s' * (len(seconds) > 1)}"
    return f"{count}: about {duration_text(sum(seconds))} of training, one after another\n"


def plan_text(cfg: DictConfig) -> PlanText:
    """The plan of a run, or those of a pipeline's stages in short."""
    if cfg.task.name == "pipeline":
        return pipeline_plan(cfg)
    if not TASKS[cfg.task.name].trains:
        return PlanText(f"{cfg.task.name}: no training. It would write to {run_directory(cfg)}.\n", 0.0)
    rows, seconds = training_plan(cfg)
    return PlanText(in_columns(rows), seconds)


def in_columns(rows: Mapping[str, str]) -> str:
    """Names and texts in two columns."""
    width = max(map(len, rows))
    return "".join(f"{name:<{width}}  {text}\n" for name, text in rows.items())


def pipeline_plan(cfg: DictConfig) -> PlanText:
    """Steps and time of each stage, and the time of all."""
    rows, total, hours = {"run": f"pipeline {cfg.model.name} on {cfg.data.name}"}, 0.0, 0.0
    for name, stage in stage_configs(cfg).items():
        rows[name] = "no training"
        if TASKS[name].trains:
            plan, model = plan_of(stage), model_on_meta(stage)
            seconds = cost_of(stage, plan, model, operations(stage, model)[1]).seconds
            rows[name], total = f"{plan.steps:,} steps, about {duration_text(seconds)}", total + seconds
            hours += seconds / 3600 * plan.devices
    rows["all stages"] = f"about {duration_text(total)} of training, computed; the plan of a stage: task=STAGE"
    if cfg.estimate.cost_per_hour is not None:
        rows["cost"] = cost_text(hours, cfg.estimate.cost_per_hour)
    rows["writes to"] = str(run_directory(cfg))
    return PlanText(in_columns(rows), total)


def cost_of(cfg: DictConfig, plan: Plan, model: MaskedAutoencoder | VisionTransformer, of_largest: int) -> Cost:
    """The time of a training run whose images of the largest size take so many operations each."""
    here, dtype = planned_device(cfg)
    host = host_work(cfg, len(blocks_of(model)), plan.devices, plan.micro_batch_size)
    if cfg.task.get("cached_features"):  # images are encoded once, and training on features takes no time beside it
        plan = replace(plan, steps=min(plan.steps, plan.steps_per_epoch))
    machines, mean = cfg.launcher.get("nodes", 1), mean_operations(cfg, plan, of_largest)
    return call(estimate_cost, cfg.estimate, plan, mean, machines, here, dtype, host)


def training_plan(cfg: DictConfig) -> tuple[dict[str, str], float]:
    """The facts about a training run by name, and its seconds."""
    plan, model = plan_of(cfg), model_on_meta(cfg)
    encoder, decoder = parameters(model)
    forward, in_training = operations(cfg, model)
    here, dtype = planned_device(cfg)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weight = 8 if dtype is torch.float64 else 4  # bytes
    average = weight * (encoder + decoder) if cfg.task.get("ema_decay") is not None else 0
    size = weight * (encoder + decoder) + weight * trained * states_per_weight(cfg) + average
    state = size + weight * trained  # gradients
    state //= {"none": 1, "full": plan.devices, "hybrid": plan.devices // cfg.launcher.get("nodes", 1)}[
        cfg.launcher.sharding
    ]
    activations = peak_bytes(cfg, plan, model, dtype, here)
    peak = call(optim.Schedule, cfg.optimizer, plan.batch_size, plan.epochs, cfg.task.warmup_epochs).peak
    count, auto = kept_checkpoints(cfg, plan), cfg.task.micro_batch_size == "auto"
    cost = cost_of(cfg, plan, model, in_training)
    rows = {
        "run": f"{cfg.task.name} {cfg.model.name} on {cfg.data.name}",
        "parameters": f"{encoder + decoder:,} (encoder {encoder:,}, decoder {decoder:,})"
        if decoder
        else f"{encoder:,}",
        "GFLOPs an image": f"{forward.total / 1e9:.3f} forward (encoder {forward.encoder / 1e9:.3f}, decoder "
        f"{forward.decoder / 1e9:.3f}"
        + (f", target {forward.target / 1e9:.3f}" if forward.target else "")
        + f"), {in_training / 1e9:.3f} in training",
        "memory a device": f"about {(state + activations) / 1e9:.2f} GB (weights, gradients and optimizer "
        f"{state / 1e9:.2f}, activations {activations / 1e9:.2f} for {images_at_once(cfg, plan)} images)",
        "effective batch": f"{plan.batch_size} = micro batch {plan.micro_batch_size} x accumulation "
        f"{plan.accumulation} x devices {plan.devices}" + " (auto: the largest that fits)" * auto,
        "peak lr": f"{peak:.4g} = {cfg.optimizer.base_lr:g} x {plan.batch_size} / 256",
        "steps": f"{plan.steps:,} ({plan.steps_per_epoch:,} an epoch of {plan.images:,} images)",
        "epochs": f"{plan.steps / plan.steps_per_epoch:g} of {plan.epochs:g}, {cfg.task.warmup_epochs:g} of warm-up",
        **phase_rows(cfg, model),
        "number format": str(dtype).removeprefix("torch."),
        **cost.rows,
        "checkpoints": f"every {cfg.checkpoint.every_epochs:g} epochs, {size / 1e9:.3f} GB each, up to {count} kept"
        if not cfg.task.get("cached_features")
        else "one at the end; the time is that of features, which are computed once",
        "runs on": launcher_text(cfg),
        "writes to": str(run_directory(cfg)),
    }
    return rows, cost.seconds


def phase_rows(cfg: DictConfig, model: nn.Module) -> dict[str, str]:
    """A row of a plan for images that grow."""
    if not isinstance(model, MaskedAutoencoder) or cfg.task.img_size_schedule is None:
        return {}
    phases = phases_of(cfg.task.img_size_schedule, model.patch_size, middle_ratio(cfg.task.mask_ratio))
    largest = "; operations here are those of model.img_size, memory is that of the costliest, time that of all sizes"
    return {"image sizes": ", ".join(map(str, phases)) + largest}


def launcher_text(cfg: DictConfig) -> str:
    """The launcher, and the processes that it starts."""
    count, nodes = rules.devices(cfg), cfg.launcher.get("nodes")
    if nodes is not None:
        return f"{cfg.launcher.name}: {nodes} node{'s' * (nodes > 1)} x {count // nodes} of its devices"
    return f"{cfg.launcher.name}: {count} process{'es' * (count > 1)} of this machine"


def states_per_weight(cfg: DictConfig) -> int:
    """Numbers that the optimizer stores for each weight."""
    return 2 if cfg.optimizer.name == "adamw" else 1


def kept_checkpoints(cfg: DictConfig, plan: Plan) -> int:
    """Checkpoints on disk at the end of the run."""
    epochs = plan.steps / plan.steps_per_epoch
    permanent = int(epochs / cfg.checkpoint.keep_every_epochs) if cfg.checkpoint.keep_every_epochs else 0
    written = max(1, int(epochs / cfg.checkpoint.every_epochs) + (epochs % cfg.checkpoint.every_epochs > 0))
    return min(written, cfg.checkpoint.keep + permanent)
