"""Between what bounds a number of the config may lie."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

# Interval of each number, in mathematical notation; `a|b` is the same rule for several keys.
INTERVALS = {
    "seed": "[0, 4294967295]",
    "task.mask_ratio": "(0, 1)",
    "task.epochs": "(0, inf)",
    "task.max_steps": "[1, inf)",
    "task.warmup_epochs": "[0, inf)",
    "task.batch_size": "[1, inf)",
    "task.micro_batch_size": "[1, inf)",
    "task.clip_grad": "(0, inf)",
    "task.log_every_steps": "[1, inf)",
    "task.eval_every_epochs": "(0, inf)",
    "task.max_bad_steps": "[1, inf)",
    "task.num_images": "[1, inf)",
    "task.label_smoothing": "[0, 1)",
    "task.drop_path": "[0, 1)",
    "task.patch_drop": "[0, 1)",
    "task.mixup": "[0, inf)",
    "task.cutmix": "[0, inf)",
    "task.mixup_prob": "[0, 1]",
    "task.mixup_switch_prob": "[0, 1]",
    "task.ema_decay": "(0, 1)",
    "task.temperature": "(0, inf)",
    "task.finetune_blocks": "[0, inf)",
    "task.learning_rates": "(0, inf)",
    "task.k": "[1, inf)",
    "task.knn_every_epochs": "(0, inf)",
    "task.knn_images": "[1, inf)",
    "task.knn_k": "[1, inf)",
    "task.mask_ratios": "(0, 1)",
    "task.eval_mask_ratios": "(0, 1)",
    "task.measured_images": "[1, inf)",
    "task.max_workers": "[1, inf)",
    "task.batches": "[1, inf)",
    "task.calibration_bins": "[1, inf)",
    "model.patch_size": "[1, inf)",
    "model.img_size": "[1, inf)",
    "model.in_chans": "[1, inf)",
    "model.embed_dim": "[1, inf)",
    "model.depth": "[1, inf)",
    "model.num_heads": "[1, inf)",
    "model.mlp_ratio": "(0, inf)",
    "model.decoder_embed_dim": "[1, inf)",
    "model.decoder_depth": "[1, inf)",
    "model.decoder_num_heads": "[1, inf)",
    "optimizer.base_lr": "(0, inf)",
    "optimizer.min_lr": "[0, inf)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.layer_decay": "(0, 1]",
    "optimizer.betas": "[0, 1)",
    "optimizer.momentum": "[0, 1)",
    "optimizer.eps": "(0, inf)",
    "optimizer.trust_coefficient": "(0, inf)",
    "data.num_workers": "[0, inf)",
    "data.val_fraction": "[0, 1]",
    "data.fraction": "(0, 1]",
    "data.per_class": "[1, inf)",
    "data.repeats": "[1, inf)",
    "data.max_bad_fraction": "[0, 1]",
    "data.std": "(0, inf)",
    "data.min_crop": "[0, 1]",
    "data.crop_fraction": "(0, 1]",
    "data.img_size": "[1, inf)",
    "data.in_chans": "[1, inf)",
    "data.num_classes": "[1, inf)",
    "data.train_images": "[1, inf)",
    "data.max_pixels": "[1, inf)",
    "data.prefetch": "[1, inf)",
    "data.timeout_s": "(0, inf)",
    "data.lanes": "[1, inf)",
    "data.window": "[1, inf)",
    "data.cache_gb": "(0, inf)",
    "data.retry_s": "[0, inf)",
    "augmentation.erase_prob": "[0, 1]",
    "augmentation.brightness": "[0, inf)",
    "augmentation.contrast": "[0, inf)",
    "augmentation.saturation": "[0, inf)",
    "augmentation.hue": "[0, 0.5]",  # of a turn
    "augmentation.scale": "(0, 1]",
    "augmentation.ratio": "(0, inf)",
    "checkpoint.every_epochs": "(0, inf)",
    "checkpoint.every_minutes": "(0, inf)",
    "checkpoint.keep": "[1, inf)",
    "checkpoint.keep_every_epochs": "(0, inf)",
    "launcher.processes": "[1, inf)",
    "launcher.timeout_s": "(0, inf)",
    "estimate.tflops": "(0, inf)",
    "estimate.utilisation": "(0, 1]",
    "estimate.loader_images_per_second": "(0, inf)",
    "estimate.cost_per_hour": "[0, inf)",
    "launcher.nodes": "[1, inf)",
    "launcher.gpus_per_node": "[0, inf)",
    "launcher.tasks_per_node": "[1, inf)",
    "launcher.cpus_per_task": "[1, inf)",
    "launcher.mem_gb": "[0, inf)",
    "launcher.timeout_min": "[1, inf)",
    "launcher.array_parallelism": "[1, inf)",
    "launcher.max_requeues": "[0, inf)",
    "launcher.signal_delay_s": "[1, 65535]",  # sbatch's own bounds
    "launcher.rendezvous_timeout_s": "[1, inf)",
    "launcher.probe_s": "[0, inf)",
    "launcher.poll_s": "(0, inf)",
    "wandb.timeout_s": "(0, inf)",
}


def _inside(value: float, interval: str) -> bool:
    low, high = (float(part) for part in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return above and below and not math.isnan(value)


def in_words(interval: str) -> str:
    """'(0, inf)' -> 'be greater than 0'; bounded intervals stay as they are."""
    low, high = (part.strip() for part in interval[1:-1].split(","))
    if high == "inf":
        return f"be greater than {low}" if interval[0] == "(" else f"be {low} or more"
    return f"lie in {interval}"


def not_finite(key: str, value: Any) -> Iterator[str]:
    """A sentence for each NaN or infinite number without an interval, in any list or mapping."""
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from not_finite(f"{key}.{name}" if key else str(name), below)
    elif isinstance(value, list):
        for below in value:
            yield from not_finite(key, below)
    elif isinstance(value, float) and not math.isfinite(value) and key not in INTERVALS:
        yield f"{key} must be a finite number, got {value}."


def ranges(cfg: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each number that is not finite, or outside its interval."""
    yield from not_finite("", cfg)
    for key, interval in INTERVALS.items():
        value: Any = cfg
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not _inside(number, interval):
                yield f"{key} must {in_words(interval)}, got {number}."
