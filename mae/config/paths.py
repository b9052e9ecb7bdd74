"""Paths in a run's config: stored absolute, with those that were typed otherwise in `paths.yaml`. Imports no torch."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mae.config.check import to_dict, with_values
from mae.config.saved import stored_config
from mae.errors import UserError
from mae.runs.files import write_text

KEYS = (
    "init",
    "data.root",
    "data.cache_dir",
    "data.classes",
    "data.file",
    "task.path",
    "task.files",
    "target.teacher",
    "target.file",
    "target.fitted",
)
TYPED = "paths.yaml"  # of a run: its relative paths as they were typed, and the directory in which they were
DIRECTORY = "working_directory"


def is_name(value: str) -> bool:
    """Whether a value is an address such as hf://NAME, which is no path."""
    return "://" in value


def absolute(path: str, directory: str | Path = ".") -> str:
    """A path as seen from a directory; an address stays as it is."""
    return path if is_name(path) else os.path.abspath(os.path.join(directory, os.path.expanduser(path)))


def with_absolute_paths(cfg: DictConfig) -> tuple[DictConfig, dict[str, Any]]:
    """The config with absolute paths, and those that were typed otherwise. As `init` a name such as timm:NAME, where no
    file lies, is no path."""
    values, typed = to_dict(cfg), {}
    for key, value in _paths(values):
        if key in ("init", "target.teacher") and not os.path.exists(os.path.expanduser(value)):
            continue
        stored = [absolute(path) for path in value] if isinstance(value, list) else absolute(value)
        if stored != value:
            typed[key] = value
            _set(values, key, stored)
    return with_values(cfg, **values), typed


def comparable(cfg: DictConfig) -> DictConfig:
    """The config with each path spelled alike, so that two spellings of one path are no difference."""
    values = to_dict(cfg)
    for key, value in _paths(values):
        _set(values, key, [absolute(path) for path in value] if isinstance(value, list) else absolute(value))
    return with_values(cfg, **values)


def _paths(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    paths = []
    for key in KEYS:
        group, _, name = key.rpartition(".")
        value = (values.get(group, {}) if group else values).get(name)
        if isinstance(value, str | list):
            paths.append((key, value))
    return paths


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    group, _, name = key.rpartition(".")
    (values[group] if group else values)[name] = value


def write_typed(run: Path, cfg: DictConfig, typed: Mapping[str, Any]) -> None:
    """Leaves the paths as they were typed beside a stored config."""
    directory, earlier = os.getcwd(), read_typed(run)
    if not typed:  # an earlier start's, as far as they still hold
        directory = str(earlier.pop(DIRECTORY, directory))
        leaves = dict(_paths(to_dict(cfg)))
        typed = {k: v for k, v in earlier.items() if isinstance(v, str) and leaves.get(k) == absolute(v, directory)}
    if typed:
        write_text(run / TYPED, OmegaConf.to_yaml(OmegaConf.create({DIRECTORY: directory, **typed})))
    else:
        (run / TYPED).unlink(missing_ok=True)


def read_typed(run: Path) -> dict[str, Any]:
    """The paths of a run as they were typed; empty where all were absolute."""
    path = run / TYPED
    values = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


# ---------------------------------------------------------------- roots of data that were stored relative


def data_root(run: Path, root: str, must_exist: bool) -> str:
    """The stored `data.root` of a run, as it is read from here: in the spelling that was typed where that means the
    same here, else absolute. Raises UserError where a relative one of an earlier version cannot be located."""
    if is_name(root):
        return root
    if os.path.isabs(root):
        typed = read_typed(run).get("data.root")
        return typed if isinstance(typed, str) and absolute(typed) == root else root
    directory = started_in(run)
    if directory is None or (must_exist and not (directory / root).exists()):
        reason = "nothing says in which directory" if directory is None else f"it is not in {directory} any more"
        if must_exist:
            raise UserError(
                f"{run} was started with the relative path data.root={root}, and {reason}: name it, as data.root=DIR."
            )
        return root
    return root if directory == Path.cwd() else str(directory / root)


def started_in(run: Path) -> Path | None:
    """The working directory in which a run with a relative `output_dir`, or none, was started."""
    run = run.absolute()
    if (run.parent / "config.yaml").is_file():  # the stage of a pipeline
        return started_in(run.parent)
    output = stored_config(run).get("output_dir")
    parts = Path(str(output)).parts if output else ("runs", run.name)
    if (output and os.path.isabs(str(output))) or ".." in parts or run.parts[-len(parts) :] != parts:
        return None
    return Path(*run.parts[: -len(parts)])
