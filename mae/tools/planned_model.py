"""The model that a plan is of, without memory for its weights: its parameters, operations and activations."""

import copy

import torch
from omegaconf import DictConfig
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.config import rules
from mae.config.check import with_values
from mae.data.phases import phases_of
from mae.data.source import Arrays
from mae.models.layers import ON_GPU_ONLY, set_attention_kernel, set_checkpointing, set_residual_dtype
from mae.models.mae import MaskedAutoencoder
from mae.models.masking import middle_ratio, ratios_of
from mae.models.target import ShapesOnly
from mae.perf.activations import saved_for_backward
from mae.plan import Plan
from mae.tasks.base import build_task
from mae.tasks.batches import eval_batch_size
from mae.tasks.linprobe_layers import LayersProbe
from mae.tools.cost import Flops, forward_flops


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
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):  # one image has no statistics
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
    if is_frozen(cfg):
        return forward, forward.encoder + 3 * forward.decoder
    trained = cfg.task.get("finetune_blocks")
    share = 1.0 if trained is None else trained / cfg.model.depth
    again = share if cfg.task.checkpointing == "blocks" else 0.0  # whose forward pass is computed a second time
    once = forward_flops(model, *ratios)  # in training mode: task.patch_drop leaves patches out
    return forward, round((once.total - once.target) * (1 + 2 * share + again)) + once.target


def is_frozen(cfg: DictConfig) -> bool:
    """Whether a task trains a head on an encoder that stays as it is."""
    return cfg.task.name == "linprobe" or bool(cfg.task.get("frozen"))


def phase_configs(cfg: DictConfig, plan: Plan) -> list[tuple[DictConfig, float]]:
    """A config and its epochs for each size of a run whose images grow; the run's own where they do not."""
    schedule, end = cfg.task.get("img_size_schedule"), plan.steps / plan.steps_per_epoch
    if schedule is None:
        return [(cfg, end)]
    phases = phases_of(schedule, rules.pair(cfg.model.patch_size), middle_ratio(cfg.task.mask_ratio))
    configs = []
    for phase, last in zip(phases, [*(following.epoch for following in phases[1:]), end], strict=True):
        epochs = min(last, end) - phase.epoch
        if epochs > 0:
            values = {"mask_ratio": phase.mask_ratio, "img_size_schedule": None}
            model, task = {**cfg.model, "img_size": list(phase.size)}, {**cfg.task, **values}
            configs.append((with_values(cfg, model=model, task=task), epochs))
    return configs


def mean_operations(cfg: DictConfig, plan: Plan, of_largest: int) -> int:
    """Operations of a training image, averaged over the images of a run whose sizes grow."""
    if cfg.task.get("img_size_schedule") is None:
        return of_largest
    configs = phase_configs(cfg, plan)
    total = sum(epochs * operations(sized, model_on_meta(sized))[1] for sized, epochs in configs)
    return round(total / sum(epochs for _, epochs in configs))


def peak_bytes(cfg: DictConfig, plan: Plan, model: nn.Module, dtype: torch.dtype, target: torch.device) -> int:
    """Bytes that a device holds beside weights and optimizer: what the costliest size saves for the backward pass, and
    of a frozen encoder, which saves nothing, the images and the largest layer."""
    models = [(sized, model if sized is cfg else model_on_meta(sized)) for sized, _ in phase_configs(cfg, plan)]
    saved = max(activation_bytes(sized, each, dtype, target, plan.micro_batch_size) for sized, each in models)
    if not is_frozen(cfg):
        return saved
    height, width = rules.pair(cfg.model.img_size)
    down, across = rules.pair(cfg.model.patch_size)
    tokens, images = 1 + height // down * (width // across), cfg.model.in_chans * height * width * 4
    # the residual stream and the hidden values of an MLP, each as input and output
    layer = tokens * cfg.model.embed_dim * 2 * (4 + cfg.model.mlp_ratio * dtype.itemsize)
    return saved + round(images_at_once(cfg, plan) * (images + layer))


def images_at_once(cfg: DictConfig, plan: Plan) -> int:
    """Images that a device encodes at a time."""
    return eval_batch_size(cfg.task) if cfg.task.get("cached_features") else plan.micro_batch_size


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
    weight = torch.float64 if dtype is torch.float64 else torch.float32
    model.to(weight)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # a GPU's autocast, of which there may be none here, casts the same products
        images = torch.empty(count, cfg.model.in_chans, *rules.pair(cfg.model.img_size), dtype=weight)
        with saved_for_backward(model.parameters()) as saved, torch.autocast("cpu", dtype, dtype.itemsize == 2):
            if isinstance(model, MaskedAutoencoder):
                ratios = ratios_of(cfg.task.mask_ratio, model.num_patches) or (cfg.task.mask_ratio,)
                noise = torch.empty(count, model.num_patches)
                model.target = ShapesOnly(model.target)
                model(images, ratios[0], noise, cfg.task.get("predict_ratio"))  # the lowest shows most patches
            else:
                model(images)
    return sum(saved.values())
