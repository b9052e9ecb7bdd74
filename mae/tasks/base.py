"""What a trained task is made of."""

from typing import Any

from omegaconf import DictConfig

from mae.config.build import call
from mae.data.source import Source
from mae.tasks.registry import load_task


def build_task(cfg: DictConfig, val_set: Source) -> Any:
    """The trained task that a config names, with initial weights."""
    return call(load_task(cfg.task.name), cfg.task, cfg, val_set)
