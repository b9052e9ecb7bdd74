"""Where a sweep's members lie: directories named by what is swept, the same each time a sweep is started."""

import hashlib
import re
import sys
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mae.config.overrides import by_key, key_of, written_value
from mae.config.sweep_members import MEMBER, MEMBERS

LONGEST = 120  # characters of a directory's name; file systems take 255 bytes


def swept(arguments: Iterable[str]) -> list[str]:
    """The keys that command-line arguments give several values each."""
    return [key for key, override in by_key(arguments).items() if override.is_sweep_override()]


def params(hydra: DictConfig) -> list[str]:
    """The keys that a sweep's file sweeps."""
    return [str(key) for key in hydra.sweeper.get("params") or {}]


def short(keys: list[str]) -> dict[str, str]:
    """Each key's last part, or the whole of it where two end alike."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def safe(name: str) -> str:
    """A name that any file system, shell and Hydra's own grammar (init=NAME) take as it is."""
    name = re.sub(r"[^\w.+-]+", "_", name)
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def values_of(overrides: Iterable[str]) -> dict[str, str]:
    """Key -> value, as written, of a member's overrides; the last one wins."""
    return {key_of(override): written_value(override) for override in overrides if "=" in override}


def member_name(keys: list[str], overrides: Iterable[str]) -> str:
    """`layer_decay_0.65-seed_1`: what is swept, with the values of one member. Named members keep their names."""
    values, names = values_of(overrides), short(keys)
    parts = [values[key] if key == MEMBER else f"{names[key]}_{values[key]}" for key in keys if key in values]
    return safe("-".join(parts)) or MEMBER


def register() -> None:
    """Makes `${sweep_dir:}`, `${member_dir:}` and `${all_members:}` known, for `hydra.sweep` and `hydra.sweeper`.

    The command line says what is swept.
    """
    typed = swept(sys.argv[1:])

    def member_dir(*, _root_: Any) -> str:
        return member_name(list(dict.fromkeys(params(_root_.hydra) + typed)), _root_.hydra.overrides.task)

    OmegaConf.register_new_resolver("sweep_dir", lambda: "runs/" + safe("sweep-" + "-".join(typed)), replace=True)
    OmegaConf.register_new_resolver("member_dir", member_dir, replace=True)
    OmegaConf.register_new_resolver("all_members", lambda *, _root_: ",".join(map(str, _root_[MEMBERS])), replace=True)
