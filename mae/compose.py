"""A command line to its config, inside of Hydra's main or out of it."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

CONF = Path(__file__).parent.parent / "conf"


def composed(overrides: list[str]) -> DictConfig:
    """What a command line composes to; not resolved yet."""
    if GlobalHydra.instance().is_initialized():
        return compose("config", overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides)
