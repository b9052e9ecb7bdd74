"""From a checked config to objects: `build` an entry of a table, or `call` a function or settings dataclass."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from omegaconf import OmegaConf

Built = TypeVar("Built")


def build(table: Mapping[str, Callable[..., Built]], cfg: Mapping, *args: Any, **runtime: Any) -> Built:
    """`table[cfg.name]` called with the runtime objects and those of the config's keys that it takes."""
    return call(table[cfg["name"]], cfg, *args, **runtime)


def call(function: Callable[..., Built], cfg: Mapping, *args: Any, **runtime: Any) -> Built:
    """A function called with the runtime objects and those of the config's keys that it takes.

    A keyword-only parameter whose annotation is a dataclass gets one, built from the config's keys.
    """
    keys = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else cfg
    assert isinstance(keys, dict)
    values: dict[str, object] = {}
    for name, annotation in _annotations(function).items():
        if name in runtime:
            continue
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            values[name] = call(annotation, keys)
        elif name in keys:
            values[name] = keys[name]
    return function(*args, **values, **runtime)


def _annotations(function: Callable[..., object]) -> dict[str, object]:
    """Keyword-only parameter, or field of a dataclass -> annotation."""
    if dataclasses.is_dataclass(function):
        return {field.name: field.type for field in dataclasses.fields(function)}
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
