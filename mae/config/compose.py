"""A command line to its config, inside of Hydra's main or out of it."""

from collections.abc import Iterable
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from mae.config import overrides

PACKAGE = Path(__file__).parents[1]
# Inside the package where it is installed from a wheel, beside it in a checkout
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if (folder / "config.yaml").is_file())


def composed(arguments: list[str]) -> DictConfig:
    """What a command line composes to; not resolved yet."""
    if GlobalHydra.instance().is_initialized():
        return compose("config", arguments)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", arguments)


def is_group(key: str) -> bool:
    """Whether a key is that of a folder of conf/, so that it chooses a file rather than a value."""
    return "." not in key and (CONF / key).is_dir()


def chosen_groups(arguments: Iterable[str]) -> dict[str, str]:
    """Group -> the file that a command line chooses for it."""
    return {
        key: str(value)
        for key, override in overrides.by_key(arguments).items()
        if is_group(key) and not override.is_delete() and not override.is_sweep_override()
        for value in overrides.values_of(override)
        if isinstance(value, str | int)
    }
