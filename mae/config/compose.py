"""A command line to its config, inside of Hydra's main or out of it."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from mae.config import overrides

PACKAGE = Path(__file__).parents[1]
# Inside the package where it is installed from a wheel, beside it in a checkout
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if (folder / "config.yaml").is_file())


def register_resolvers() -> None:
    """Makes the functions known that values in conf/ call, such as ${equal:a,b}; again and again does no harm."""
    for resolver in (equal, at_most, largest_divisor, patch_values, share):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def equal(first: object, second: object) -> bool:
    """Whether two values are the same."""
    return first == second


# The functions below let values of a wrong type pass: the check of the config names the key that has one.


def share(fraction: float, whole: float) -> float:
    """${share:0.5,${model.embed_dim}} is half the encoder's width, for tables whose widths are shares of it."""
    return round(fraction * whole) if isinstance(whole, int | float) else whole


def at_most(limit: int, value: int) -> int:
    """The smaller of two numbers."""
    return min([limit, *whole_numbers(value)])


def largest_divisor(limit: int, value: int | Sequence[int]) -> int:
    """The largest number up to `limit` that divides a number, or all of a list."""
    values = whole_numbers(value)
    return next(number for number in range(limit, 0, -1) if not any(value % number for value in values))


def patch_values(patch_size: int | Sequence[int], in_chans: int) -> int:
    """Values of a patch: of a side or [height, width]."""
    sides = whole_numbers(patch_size)
    return math.prod([*(sides if len(sides) == 2 else 2 * sides), *whole_numbers(in_chans)])


def whole_numbers(value: object) -> list[int]:
    """Those that a value is or holds."""
    values = value if isinstance(value, Sequence) else [value]
    return [number for number in values if isinstance(number, int)]


def composed(arguments: list[str]) -> DictConfig:
    """What a command line composes to; not resolved yet."""
    register_resolvers()
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
