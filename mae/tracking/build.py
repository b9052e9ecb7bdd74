"""The trackers that a config asks for: metrics.jsonl, the console, W&B, TensorBoard. The train loop knows none."""

import importlib.util
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mae.config.build import call
from mae.errors import UserError
from mae.tracking.base import NonFatal, Tracker, Trackers
from mae.tracking.console import Terminal
from mae.tracking.jsonl import JsonLines
from mae.tracking.tensorboard import TensorBoard
from mae.tracking.wandb import wandb_tracker


def build_trackers(run: Path, cfg: DictConfig) -> Tracker:
    """All trackers as one. Raises UserError where `tensorboard=true` and the package is not installed."""
    members = [JsonLines(run), Terminal(), call(wandb_tracker, cfg.wandb, run, OmegaConf.to_container(cfg))]
    if cfg.tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "tensorboard=true needs the package tensorboard: pip install 'mae-experiments[tensorboard]', or leave "
                "it out."
            )
        members.append(NonFatal(lambda: TensorBoard(run), "TensorBoard"))
    return Trackers(members)
