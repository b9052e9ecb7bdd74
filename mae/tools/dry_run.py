"""`dry_run=true`: the plan of a config, computed without data, memory or a file on disk."""

import copy

import torch
from omegaconf import DictConfig
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae import data, device, optim
from mae.config import rules
from mae.config.build import build, call
from mae.config.check import with_values
from mae.config.identity import run_directory
from mae.data.phases import phases_of
from mae.data.source import Arrays
from mae.data.subsets import reduced
from mae.errors import UserError
from mae.launch.pipeline import check_stages
from mae.models.layers import ON_GPU_ONLY, blocks_of, set_attention_kernel, set_checkpointing, set_residual_dtype
from mae.models.mae import MaskedAutoencoder
from mae.models.masking import middle_ratio, ratios_of
from mae.models.target import ShapesOnly
from mae.perf.activations import saved_for_backward
from mae.plan import Plan, check_batches, make_plan, steps_in_epoch
from mae.tasks.base import build_task
from mae.tasks.linprobe_layers import LayersProbe
from mae.tasks.registry import TASKS
from mae.tools.bottlenecks import host_work
from mae.tools.cost import Flops, estimate_cost, forward_flops


def count_images(cfg: DictConfig) -> int:
    """The number of training images: of the source, or of its YAML where the data are absent."""
    try:
        source = build(data.SOURCES, cfg.data, "train")
    except (ValueError, OSError):
        known = cfg.data.get("train_images")
        if known is None:
            raise
        known = max(1, round(known * cfg.data.fraction))
        return known if cfg.data.per_class is None else min(known, cfg.data.per_class * cfg.data.num_classes)
    return len(reduced(source, cfg.data.fraction, cfg.data.per_class, cfg.seed))


def model_on_meta(cfg: DictConfig) -> MaskedAutoencoder | VisionTransformer:
    """The task's model, in training mode, without memory for its weights."""
    classes = [str(i) for i in range(cfg.data.num_classes or 0)]
    no_images = Arrays(torch.empty(0, 1, 1, 1), None, classes, "")  # of which only the classes matter
    with torch.device("meta"):
        task = build_task(with_values(cfg, init=None), no_images)
    model = task.trained
    if isinstance(task, LayersProbe):
        model = task.model
        model.add_module("heads", task.heads)  # which are counted too
    assert isinstance(model, MaskedAutoencoder | VisionTransformer)
    if isinstance(model, MaskedAutoencoder):
        model.target.to("meta")  # a teacher is read into memory
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):  # of a linear probe: one image has no statistics
            module.eval()
    return model


def parameters(model: nn.Module) -> tuple[int, int]:
    """(encoder or classifier, decoder): all tensors of the state dict that are parameters, fixed ones included."""
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    decoder = model.decoder_keys() if isinstance(model, MaskedAutoencoder) else set()
    of_decoder = sum(count for name, count in counts.items() if name in decoder)
    return sum(counts.values()) - of_decoder, of_decoder


def operations(cfg: DictConfig, model: MaskedAutoencoder | VisionTransformer) -> tuple[Flops, int]:
    """Operations of one image: in a forward pass, and in training.

    A backward pass takes twice a forward pass; frozen blocks have none.
    """
    mask_ratio = middle_ratio(cfg.task.mask_ratio) if "mask_ratio" in cfg.task else None
    ratios = mask_ratio, cfg.task.get("predict_ratio")
    forward = forward_flops(copy.deepcopy(model).eval(), *ratios)
    if cfg.task.name == "linprobe":
        return forward, forward.total
    trained = cfg.task.get("finetune_blocks")
    share = 1.0 if trained is None else trained / cfg.model.depth
    again = share if cfg.task.checkpointing == "blocks" else 0.0  # whose forward pass is computed a second time
    once = forward_flops(model, *ratios)  # in training mode: task.patch_drop leaves patches out
    return forward, round((once.total - once.target) * (1 + 2 * share + again)) + once.target


def mean_operations(cfg: DictConfig, plan: Plan, of_largest: int) -> int:
    """Operations of a training image, averaged over the images of a run whose sizes grow."""
    schedule = cfg.task.get("img_size_schedule")
    if schedule is None:
        return of_largest
    end = plan.steps / plan.steps_per_epoch
    phases = phases_of(schedule, rules.pair(cfg.model.patch_size), middle_ratio(cfg.task.mask_ratio))
    total = 0.0
    for phase, last in zip(phases, [*(following.epoch for following in phases[1:]), end], strict=True):
        epochs = min(last, end) - phase.epoch
        if epochs > 0:
            values = {"mask_ratio": phase.mask_ratio, "img_size_schedule": None}
            model, task = {**cfg.model, "img_size": list(phase.size)}, {**cfg.task, **values}
            sized = with_values(cfg, model=model, task=task)
            total += epochs * operations(sized, model_on_meta(sized))[1]
    return round(total / end)


def activation_bytes(cfg: DictConfig, model: nn.Module, dtype: torch.dtype, target: torch.device, images: int) -> int:
    """Bytes that autograd saves for the backward pass of `images` images, counted on tensors without memory.

    Computed from two images and a third one, since autocast's copies of the weights are saved once, and a head with
    batch norm takes no single image.
    """
    two, three = (saved_bytes(cfg, model, dtype, target, count) for count in (2, 3))
    return two + (images - 2) * (three - two)


def saved_bytes(cfg: DictConfig, model: nn.Module, dtype: torch.dtype, target: torch.device, count: int) -> int:
    """Bytes that autograd saves for `count` images, as the model would compute on the device `target`."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # seconds to import; autocast does nothing on `meta`

    model = copy.deepcopy(model)
    set_checkpointing(model, cfg.task.checkpointing)
    set_residual_dtype(model, torch.bfloat16 if cfg.task.residual_dtype == "bf16" else None)
    elsewhere = cfg.task.attention_kernel == "auto" and target.type != "cpu"
    fused = elsewhere or cfg.task.attention_kernel in ON_GPU_ONLY
    set_attention_kernel(model, "fused" if fused else cfg.task.attention_kernel)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # a GPU's autocast, of which there may be none here, casts the same products
        images = torch.empty(count, cfg.model.in_chans, *rules.pair(cfg.model.img_size))
        with saved_for_backward(model.parameters()) as saved, torch.autocast("cpu", dtype, dtype.itemsize == 2):
            if isinstance(model, MaskedAutoencoder):
                ratios = ratios_of(cfg.task.mask_ratio, model.num_patches) or (cfg.task.mask_ratio,)
                noise = torch.empty(count, model.num_patches)
                model.target = ShapesOnly(model.target)
                model(images, ratios[0], noise, cfg.task.get("predict_ratio"))  # the lowest shows most patches
            else:
                model(images)
    return sum(saved.values())


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


def report(cfg: DictConfig) -> str:
    """The plan as text, a line for each fact."""
    if cfg.task.name == "pipeline":
        check_stages(cfg)
        stages = ", ".join(cfg.task.stages)
        return f"pipeline: {stages}, in {run_directory(cfg)}. The plan of a stage: task=STAGE dry_run=true.\n"
    if not TASKS[cfg.task.name].trains:
        return f"{cfg.task.name}: no training. It would write to {run_directory(cfg)}.\n"
    plan, model = plan_of(cfg), model_on_meta(cfg)
    encoder, decoder = parameters(model)
    forward, in_training = operations(cfg, model)
    here, dtype = planned_device(cfg)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    average = 4 * (encoder + decoder) if cfg.task.get("ema_decay") is not None else 0
    size = 4 * (encoder + decoder) + 4 * trained * states_per_weight(cfg) + average
    state = size + 4 * trained  # gradients
    state //= {"none": 1, "full": plan.devices, "hybrid": plan.devices // cfg.launcher.get("nodes", 1)}[
        cfg.launcher.sharding
    ]
    activations = activation_bytes(cfg, model, dtype, here, plan.micro_batch_size)
    peak = call(optim.Schedule, cfg.optimizer, plan.batch_size, plan.epochs, cfg.task.warmup_epochs).peak
    host = host_work(cfg, len(blocks_of(model)), plan.devices, plan.micro_batch_size)
    count, auto = kept_checkpoints(cfg, plan), cfg.task.micro_batch_size == "auto"
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
        f"{state / 1e9:.2f}, activations {activations / 1e9:.2f} for {plan.micro_batch_size} images)",
        "effective batch": f"{plan.batch_size} = micro batch {plan.micro_batch_size} x accumulation "
        f"{plan.accumulation} x devices {plan.devices}" + " (auto: the largest that fits)" * auto,
        "peak lr": f"{peak:.4g} = {cfg.optimizer.base_lr:g} x {plan.batch_size} / 256",
        "steps": f"{plan.steps:,} ({plan.steps_per_epoch:,} an epoch of {plan.images:,} images)",
        "epochs": f"{plan.steps / plan.steps_per_epoch:g} of {plan.epochs:g}, {cfg.task.warmup_epochs:g} of warm-up",
        **phase_rows(cfg, model),
        "number format": str(dtype).removeprefix("torch."),
        **call(
            estimate_cost,
            cfg.estimate,
            plan,
            mean_operations(cfg, plan, in_training),
            cfg.launcher.get("nodes", 1),
            here,
            dtype,
            host,
        ),
        "checkpoints": f"every {cfg.checkpoint.every_epochs:g} epochs, {size / 1e9:.3f} GB each, up to {count} kept",
        "runs on": launcher_text(cfg),
        "writes to": str(run_directory(cfg)),
    }
    width = max(map(len, rows))
    return "".join(f"{name:<{width}}  {text}\n" for name, text in rows.items())


def phase_rows(cfg: DictConfig, model: nn.Module) -> dict[str, str]:
    """A row of a plan for images that grow."""
    if not isinstance(model, MaskedAutoencoder) or cfg.task.img_size_schedule is None:
        return {}
    phases = phases_of(cfg.task.img_size_schedule, model.patch_size, middle_ratio(cfg.task.mask_ratio))
    largest = "; operations and memory here are those of model.img_size, time is that of all sizes"
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
