"""From YAML and command line to a config whose every value is checked: `resolve`, `check_config`. Imports no torch.

A value stands once, in YAML. A type and its range stand once, in the signature or dataclass of what is built from it
(see `mae.config.schema`).
"""

import typing
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mae.config import rules
from mae.config.compose import register_resolvers
from mae.config.schema import SCHEMA, TOP, schema, signature, table
from mae.config.values import conform, describe, interval_of, near, out_of_range
from mae.errors import UserError


def resolve(cfg: DictConfig) -> DictConfig:
    """All interpolations replaced by values; no key can be added to the result. Raises UserError."""
    register_resolvers()
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError("\n".join(f"{key} has no value: give it one, as {key}=..." for key in missing))
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        raise UserError(f"{key} cannot be resolved: {str(error).splitlines()[0].rstrip('.')}.") from error
    assert isinstance(container, dict)
    resolved = OmegaConf.create(container)
    OmegaConf.set_struct(resolved, True)
    return resolved


# ---------------------------------------------------------------- check


class _Checked:
    """Sections of a config with every value of its type, and what is wrong with them."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.problems: list[str] = []  # keys and types
        self.out_of_range: list[str] = []

    def add(self, group: str, section: Mapping[str, object], known: Mapping[str, Any]) -> None:
        """Checks a group, or with an empty name the keys that belong to none."""
        prefix = f"{group}." if group else ""
        values = self.config.setdefault(group, {}) if group else self.config
        for key in section:
            if key not in known:
                self.problems.append(f"{prefix}{key} is not a key of the configuration.{near(key, known)}")
        for key, hint in known.items():
            if key not in section:
                self.problems.append(f"{prefix}{key} is missing: add it, as {prefix}{key}=...")
                continue
            value = section[key]
            try:
                values[key] = conform(value, hint)
            except TypeError:
                choices = [c for c in typing.get_args(hint) if isinstance(c, str)]
                suggestion = near(str(value), choices) if choices else ""
                got = "null" if value is None else repr(value)
                self.problems.append(f"{prefix}{key} must be {describe(hint)}, got {got}.{suggestion}")
            else:
                self.out_of_range += out_of_range(f"{prefix}{key}", values[key], interval_of(hint))


def check_config(cfg: DictConfig, values: bool = True) -> DictConfig:
    """The same config with every value of its type. Raises UserError listing all that is wrong: unknown, misspelt,
    missing and mistyped keys; then, unless `values` is false, values out of range, then contradictions."""
    tree = to_dict(cfg)
    checked = _Checked()
    checked.add("", {key: value for key, value in tree.items() if key not in SCHEMA}, signature(TOP))
    for group, entries in SCHEMA.items():
        section = tree.get(group)
        if not isinstance(section, dict):
            checked.problems.append(f"{group} is missing: choose one, as {group}=...")
            continue
        name = section.get("name")
        tables = [entry.removesuffix("[name]") for entry in entries if entry.endswith("[name]")]
        if tables and name not in table(tables[0]):
            known = sorted(table(tables[0]))
            problem = f"{group}.name must be one of {', '.join(known)}, got {name!r}.{near(str(name), known)}"
            checked.problems.append(problem)
            continue
        checked.add(group, section, schema(group, name))
    problems = checked.problems
    if not problems and values:
        problems = checked.out_of_range or list(rules.contradictions(checked.config))
    if problems:
        raise UserError("\n".join(problems))
    config = OmegaConf.create(checked.config)
    OmegaConf.set_readonly(config, True)
    return config


def to_dict(cfg: DictConfig) -> dict[str, Any]:
    """A config as plain dicts and lists."""
    container = OmegaConf.to_container(cfg)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def with_values(cfg: DictConfig, **values: object) -> DictConfig:
    """A checked config with other values at its top."""
    config = OmegaConf.create(to_dict(cfg) | values)
    OmegaConf.set_readonly(config, True)
    return config
