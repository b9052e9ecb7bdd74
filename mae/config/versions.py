"""Saved configs of other versions of this code, with today's keys. Imports no torch."""

from collections.abc import Iterable, Mapping
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mae.config.compose import CONF, chosen_groups, composed
from mae.config.schema import SCHEMA, TOP, schema, signature, table

GROUPS = ("task", "model", "data", "launcher")  # whose choice decides the defaults of the others
CHOSEN = (*SCHEMA, "recipe", "experiment")


def known_keys(config: Mapping[str, Any]) -> set[str]:
    """All keys of today, as `group.key`, for the choices of a config. A group with an unknown choice is left out."""
    keys = set(signature(TOP))
    for group in SCHEMA:
        section = config.get(group)
        name = section.get("name") if isinstance(section, Mapping) else None
        tables = [entry.removesuffix("[name]") for entry in SCHEMA[group] if entry.endswith("[name]")]
        if isinstance(section, Mapping) and (not tables or name in table(tables[0])):
            keys |= {f"{group}.{key}" for key in schema(group, name)}
    return keys


def completed(stored: Mapping[str, Any], overrides: Iterable[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """A saved config with today's keys; the keys filled from today's defaults; the keys that no longer exist."""
    config = {str(key): dict(value) if isinstance(value, Mapping) else value for key, value in stored.items()}
    absent = [group for group in SCHEMA if group not in config]
    known = known_keys(config)
    missing = sorted(key for key in known if not _holds(config, key))
    filled = [*absent, *missing]
    if filled:
        defaults = _defaults(config, overrides)
        filled = [key for key in filled if _fill(config, key, defaults)]
    known |= known_keys({group: config.get(group) for group in absent})
    return config, filled, list(_drop(config, known))


def _holds(config: Mapping[str, Any], key: str) -> bool:
    group, _, name = key.rpartition(".")
    return name in (config[group] if group else config)


def _fill(config: dict[str, Any], key: str, defaults: Any) -> bool:
    """Whether today's configuration has a default for a key, which the config then holds."""
    value = OmegaConf.select(defaults, key) if defaults is not None else None
    group, _, name = key.rpartition(".")
    if value is None and (defaults is None or name not in (defaults.get(group, {}) if group else defaults)):
        return False
    (config[group] if group else config)[name] = (
        OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    )
    return True


def _drop(config: dict[str, Any], known: set[str]) -> Iterable[str]:
    """Removes the keys that today's schema lacks, and yields their names."""
    for key in list(config):
        section = config[key]
        if key not in SCHEMA and key not in known:
            del config[key]
            yield key
        elif key in SCHEMA and isinstance(section, dict) and any(name.startswith(f"{key}.") for name in known):
            for name in [name for name in section if f"{key}.{name}" not in known]:
                del section[name]
                yield f"{key}.{name}"


def _defaults(config: Mapping[str, Any], overrides: Iterable[str]) -> Any:
    """Today's configuration for the same choices of groups, with the saved values over it, so that a default such as
    ${data.img_size} follows them. None where it does not compose."""
    choices = {group: choice for group, choice in chosen_groups(overrides).items() if group in CHOSEN}
    for group in GROUPS:
        section = config.get(group)
        if isinstance(section, Mapping) and group not in choices:
            choices[group] = str(section.get("name"))
    shipped = [f"{group}={choice}" for group, choice in choices.items() if (CONF / group / f"{choice}.yaml").is_file()]
    try:
        defaults = composed(shipped)
    except (HydraException, OmegaConfBaseException):
        return None
    OmegaConf.set_struct(defaults, False)
    return OmegaConf.merge(defaults, OmegaConf.create(dict(config)))
