"""What values contradict each other. Checked before anything is built or queued."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mae.config import pretraining_rules
from mae.config.probing_rules import probe_contradictions
from mae.config.schema import signature, table
from mae.config.values import pair
from mae.plan import mixes
from mae.tasks.registry import TASKS, names

COLOURED = ("rand_augment", "color_jitter")  # augmentations that need red, green and blue
SMALLEST_CUTMIX = 16  # pixels: a box of a smaller image is a patch or two


def nearest_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`, in words."""
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below and below != above else str(above)


def contradictions(cfg: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each pair of values that cannot both hold."""
    if wrong := list(_sides(cfg)):  # which the other rules compute with
        yield from wrong
        return
    for rule in RULES:
        yield from rule(cfg)


def _sides(cfg: Mapping[str, Any]) -> Iterator[str]:
    for key in ("img_size", "patch_size"):
        size = cfg["model"][key]
        if isinstance(size, list) and len(size) != 2:
            yield f"model.{key} must be one number or [height, width], got {size}."


def _model(cfg: Mapping[str, Any]) -> Iterator[str]:
    model = cfg["model"]
    image, patch = pair(model["img_size"]), pair(model["patch_size"])
    for side, unit in zip(image, patch, strict=True):
        if side % unit:
            near = nearest_multiples(side, unit)
            yield f"model.img_size={side} is not a multiple of model.patch_size={unit}: the nearest that are: {near}."
            return
    for width, heads in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
        if model[width] % model[heads]:
            yield f"model.{width}={model[width]} is not a multiple of model.{heads}={model[heads]}."
        elif model[width] % 4:
            yield f"model.{width}={model[width]} is not a multiple of 4, which the sine-cosine positions need."
    patches = (image[0] // patch[0]) * (image[1] // patch[1])
    for key in ("mask_ratio", "eval_mask_ratios"):
        value = cfg["task"].get(key)
        ratios = [ratio for ratio in (value if isinstance(value, list) else [value]) if ratio is not None]
        visible = next((k for k in (int(patches * (1 - ratio)) for ratio in ratios) if not 0 < k < patches), None)
        if visible is not None:
            yield (
                f"task.{key}={value} keeps {visible} of the {patches} patches (model.img_size={model['img_size']}, "
                f"model.patch_size={model['patch_size']}): at least one must be kept and one masked."
            )


def _schedule(cfg: Mapping[str, Any]) -> Iterator[str]:
    task, optimizer = cfg["task"], cfg["optimizer"]
    if "warmup_epochs" not in task:
        return
    if task["warmup_epochs"] > task["epochs"]:
        warmup, epochs = task["warmup_epochs"], task["epochs"]
        yield f"task.warmup_epochs={warmup:g} is longer than task.epochs={epochs:g}: lower it too."
    peak = optimizer["base_lr"] * task["batch_size"] / 256
    if optimizer["min_lr"] > peak:
        min_lr = optimizer["min_lr"]
        yield f"optimizer.min_lr={min_lr:g} is above the peak learning rate {peak:g} (base_lr x batch / 256)."


def _lists(cfg: Mapping[str, Any]) -> Iterator[str]:
    task, optimizer = cfg["task"], cfg["optimizer"]
    if len(optimizer.get("betas", [0, 0])) != 2:
        yield f"optimizer.betas must be two numbers, got {optimizer['betas']}."
    if optimizer.get("nesterov") and not optimizer["momentum"]:
        yield "optimizer.nesterov=true needs optimizer.momentum above 0: set it, or leave nesterov out."
    if task.get("learning_rates") and not task["cached_features"]:
        yield "task.learning_rates needs task.cached_features=true: otherwise set optimizer.base_lr."
    if task.get("k") == []:
        yield "task.k must name one number of neighbours or more, got []."
    possible = names(stage=True)
    if unknown := [name for name in task.get("stages", []) if name not in possible]:
        yield f"task.stages must be a list, each one of {', '.join(possible)}, got {unknown[0]}."


def _batch(cfg: Mapping[str, Any]) -> Iterator[str]:
    task = cfg["task"]
    if "micro_batch_size" not in task:
        return
    world = devices(cfg)
    micro = task["micro_batch_size"]
    unit = world * micro if isinstance(micro, int) else world
    if task["batch_size"] % unit:
        what = f"{world} device{'s' * (world > 1)}"
        if isinstance(micro, int):
            what += f" x task.micro_batch_size={micro}"
        near = nearest_multiples(task["batch_size"], unit)
        yield f"task.batch_size={task['batch_size']} does not divide by {what}: the nearest that do: {near}."
    repeats = cfg["data"].get("repeats", 1)
    for key in ("batch_size", "micro_batch_size"):
        if isinstance(task[key], int) and task[key] % repeats:
            yield f"task.{key}={task[key]} is not a multiple of data.repeats={repeats}."
            return
    share = task["batch_size"] / world
    if share % repeats and repeats > 1:
        yield (
            f"task.batch_size={task['batch_size']} is {share:g} images for each of {world} devices, which is no "
            f"multiple of data.repeats={repeats}."
        )


def _statistics(cfg: Mapping[str, Any]) -> Iterator[str]:
    data = cfg["data"]
    for key in ("mean", "std") if cfg["task"]["name"] != "stats" else ():  # which is there to find them
        count = len(data[key])
        if count not in (1, data["in_chans"]):
            yield f"data.{key} has {count} values for data.in_chans={data['in_chans']}: give one, or one a channel."
    for key in ("scale", "ratio"):
        values = cfg["augmentation"].get(key)
        if isinstance(values, list) and (len(values) != 2 or values[0] > values[1]):
            yield f"augmentation.{key} must be [low, high] with low <= high, got {values}."


def _devices(cfg: Mapping[str, Any]) -> Iterator[str]:
    launcher = cfg["launcher"]
    if cfg["device"] == "mps" and launcher.get("processes", 1) > 1:
        yield "device=mps is one device: launcher.processes must be 1."
    if cfg["task"].get("compile") == "graphs" and cfg["device"] in ("cpu", "mps"):
        yield f"task.compile=graphs needs a GPU: use off, blocks or model with device={cfg['device']}."
    if cfg["data"].get("decode_device") == "cuda" and cfg["device"] in ("cpu", "mps"):
        yield f"data.decode_device=cuda needs a GPU: use data.decode_device=cpu with device={cfg['device']}."
    yield from _graphs(cfg["task"], devices(cfg))
    level = cfg["task"].get("compile")
    if level in ("model", "graphs") and launcher["sharding"] != "none":
        sharded = f"launcher.sharding={launcher['sharding']}"
        yield f"task.compile={level} wants weights that stay where they are: use blocks with {sharded}."
    if launcher["name"] == "slurm" and launcher["signal_delay_s"] >= launcher["timeout_min"] * 60:
        yield (
            f"launcher.signal_delay_s={launcher['signal_delay_s']} is no shorter than launcher.timeout_min="
            f"{launcher['timeout_min']}: the job would be asked to save as soon as it begins."
        )
    precision = cfg["task"].get("precision")
    if cfg["task"].get("residual_dtype") == "bf16" and precision not in ("auto", "bf16"):
        yield f"task.residual_dtype=bf16 needs task.precision=bf16 or auto: use float32 with {precision}."
    if precision == "fp16" and cfg["device"] == "cpu":
        yield "task.precision=fp16 needs a GPU: use bf16 or fp32 with device=cpu."


def _graphs(task: Mapping[str, Any], world: int) -> Iterator[str]:
    """A graph's next replay overwrites the gradients of the last, so that they cannot accumulate."""
    micro, share = task.get("micro_batch_size"), task.get("batch_size", 0) // world
    if task.get("compile") == "graphs" and (micro == "auto" or isinstance(micro, int) and micro < share):
        yield (
            f"task.compile=graphs takes the {share} images of a device's share at a time, and task.micro_batch_size="
            f"{micro} may take fewer: set it to null, or task.compile=model."
        )


def reads_data(cfg: Mapping[str, Any]) -> bool:
    """Whether a task reads the images of the data, and not their settings alone."""
    return TASKS[cfg["task"]["name"]].reads_images and not cfg["task"].get("files")


def _root(cfg: Mapping[str, Any]) -> Iterator[str]:
    root, name = cfg["data"]["root"], cfg["data"]["name"]
    embedded = "root" not in signature(table("data:SOURCES")[name])  # comes with a package
    if embedded or not reads_data(cfg) or (cfg["dry_run"] and cfg["data"].get("train_images")):
        return
    if root is None:
        yield "data.root is not set: give the directory of the images, as data.root=DIR."
    elif "://" not in root and not cfg["data"].get("download") and not os.path.exists(root):
        fetch = ", or set data.download=true" if "download" in cfg["data"] else ""
        yield f"data.root={root} does not exist: give the directory of the images{fetch}."


def _colours(cfg: Mapping[str, Any]) -> Iterator[str]:
    name, count = cfg["augmentation"]["name"], cfg["data"]["in_chans"]
    if name in COLOURED and count != 3:
        yield f"augmentation.name={name} needs 3 channels, and data.in_chans={count}: choose augmentation=linprobe."


def _mixing(cfg: Mapping[str, Any]) -> Iterator[str]:
    task = cfg["task"]
    if not mixes(task):
        return
    micro = task["micro_batch_size"]
    held = micro if isinstance(micro, int) else task["batch_size"] // devices(cfg)
    if held % 2:
        yield (
            f"task.mixup and task.cutmix mix images in pairs, and a device holds {held} at a time: choose an even "
            "task.batch_size and task.micro_batch_size, or set task.mixup=0 task.cutmix=0."
        )
    if task["cutmix"] and min(pair(cfg["model"]["img_size"])) < SMALLEST_CUTMIX:
        yield (
            f"task.cutmix={task['cutmix']:g} pastes a box of one image into another, and images of "
            f"model.img_size={cfg['model']['img_size']} are too small for that (below {SMALLEST_CUTMIX} pixels): set "
            "task.cutmix=0."
        )


def _partial(cfg: Mapping[str, Any]) -> Iterator[str]:
    blocks, depth = cfg["task"].get("finetune_blocks"), cfg["model"]["depth"]
    if blocks is not None and (blocks % 0.5 or blocks > depth):
        yield f"task.finetune_blocks must be a multiple of 0.5 and at most model.depth={depth}, got {blocks:g}."


def _hub(cfg: Mapping[str, Any]) -> Iterator[str]:
    name = cfg["task"].get("push_to_hub")
    if name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        yield f"task.push_to_hub={name} must be USER/NAME, a model of the Hugging Face Hub."


def _segment(cfg: Mapping[str, Any]) -> Iterator[str]:
    if cfg["task"].get("frozen") and cfg["init"] is None:
        yield (
            "task.frozen=true trains a head on an encoder that init= gives: set init, or task.frozen=false to train "
            "from scratch."
        )


RULES: list[Callable[[Mapping[str, Any]], Iterator[str]]] = [
    _model,
    _lists,
    _schedule,
    _batch,
    _statistics,
    _devices,
    _root,
    _colours,
    _mixing,
    _hub,
    _partial,
    *pretraining_rules.RULES,
    probe_contradictions,
    _segment,
]


def missing_init(task: str, init: str | None) -> str | None:
    """A sentence where a task has nothing to start from."""
    if init is not None or not TASKS[task].needs_init:
        return None
    return f"task={task} needs init=: name a run's directory, one of its checkpoints, or a file of another library."


def devices(cfg: Mapping[str, Any]) -> int:
    """Devices that take part: as torchrun says where it started us, else as the launcher is set."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    launcher = cfg["launcher"]
    if launcher["name"] == "slurm":
        return launcher["nodes"] * (launcher["tasks_per_node"] or launcher["gpus_per_node"] or 1)
    return launcher.get("processes", 1)
