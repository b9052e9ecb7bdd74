"""The masked autoencoder of a config, with what it predicts."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from mae.config.build import build, call
from mae.models.layers import patch_grid
from mae.models.mae import MaskedAutoencoder
from mae.models.targets import TARGETS, Patches


def build_autoencoder(cfg: DictConfig, target: Mapping[str, Any], norm_pix_loss: bool) -> MaskedAutoencoder:
    """An autoencoder with initial weights; `target` holds the settings of the group."""
    _, size, grid = patch_grid(*(cfg.model[key] for key in ("img_size", "patch_size")))
    patches = Patches(grid, size, cfg.model.in_chans, norm_pix_loss)
    return call(MaskedAutoencoder, cfg.model, build(TARGETS, target, patches), norm_pix_loss=norm_pix_loss)
