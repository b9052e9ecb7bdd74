"""From YAML and command line to objects: `resolve`, `check`, `build`. Imports no torch.

A value stands once, in YAML. A type stands once, in the keyword-only signature of what is built
from it (see `mae.config.schema`).
"""

import hashlib
import json
import logging
import os
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mae.config import rules
from mae.config.schema import SCHEMA, TOP, schema, signature, table
from mae.config.values import conform, describe, interval_of, near, out_of_range
from mae.config.versions import completed
from mae.errors import UserError

log = logging.getLogger(__name__)

NEUTRAL = (
    ("output_dir",),
    ("resume",),
    ("dry_run",),
    ("tensorboard",),
    ("launcher",),
    ("wandb",),
    ("checkpoint",),
    ("estimate",),
    ("task", "micro_batch_size"),  # the same sums in another order
    ("task", "checkpointing"),  # the same numbers, computed again
    ("task", "attention_kernel"),  # another rounding, as another device has
    ("task", "profile"),
    ("task", "log_every_steps"),
    *(
        ("data", key)
        for key in ("num_workers", "workers", "prefetch", "timeout_s", "cache_dir", "cache_gb", "retry_s", "root")
    ),
)

# Keys that came after runs had been made, and what these runs did
ADDED: dict[str, dict[str, Any]] = {
    "shards": {
        "image_key": None,
        "label_key": None,
        "sample_key": "first_dot",
        "follow_links": False,
        "splits": "auto",
    },
    "hf": {"follow_links": False},
    **{name: {"splits": "auto"} for name in ("folder", "cifar10_folder", "scientific")},
}
# How the root's files are read: an unfinished run may go on with another reading, since its images are compared
READING = ("data.splits", "data.follow_links", "data.image_key", "data.label_key", "data.sample_key")


# ---------------------------------------------------------------- resolve


def resolve(cfg: DictConfig) -> DictConfig:
    """All interpolations replaced by values; the result is read-only. Raises UserError."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError("\n".join(f"{key} has no value: give it one, as {key}=..." for key in missing))
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        raise UserError(f"{key} cannot be resolved: {str(error).splitlines()[0].rstrip('.')}.") from error
    assert isinstance(plain, dict)
    made = OmegaConf.create(plain)
    OmegaConf.set_struct(made, True)
    return made


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


def check(cfg: DictConfig, values: bool = True) -> DictConfig:
    """The same config with every value of its type. Raises UserError listing all that is wrong: unknown, misspelt,
    missing and mistyped keys; then, unless `values` is false, values out of range, then contradictions."""
    tree = plain(cfg)
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


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A config as plain dicts and lists."""
    found = OmegaConf.to_container(cfg)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def changed(cfg: DictConfig, **values: Any) -> DictConfig:
    """A checked config with other values at its top."""
    made = OmegaConf.create(plain(cfg) | values)
    OmegaConf.set_readonly(made, True)
    return made


def stored(run: Path) -> DictConfig:
    """The saved config of a run, as it is. Raises UserError where there is none."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not the directory of a run: it holds no config.yaml.")
    try:
        found = OmegaConf.load(path)
    except Exception as error:
        raise UserError(f"{path} cannot be read as YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(found, DictConfig):
        raise UserError(f"{path} does not hold a configuration.")
    return found


def stored_overrides(run: Path) -> list[str]:
    """The command line of a run; empty where there is none."""
    path = run / "overrides.yaml"
    overrides = OmegaConf.load(path) if path.is_file() else None
    return [str(override) for override in overrides] if isinstance(overrides, ListConfig) else []


def read(run: Path) -> DictConfig:
    """The saved config of a run: keys and types checked, ranges and rules not, nor whether its data are still there.

    A key that it lacks is filled from today's default; a key that no longer exists is passed over; a warning names
    them. Raises UserError where there is no config.
    """
    values = plain(stored(run))
    if isinstance(values.get("data"), dict):
        values["data"] = added(values) | values["data"]
    values, filled, dropped = completed(values, stored_overrides(run))
    _say_once(run, filled, dropped)
    return check(OmegaConf.create(values), values=False)


SAID: set[Path] = set()  # runs of other versions that a warning of this process has named


def _say_once(run: Path, filled: list[str], dropped: list[str]) -> None:
    if not (filled or dropped) or run.absolute() in SAID or os.environ.get("RANK", "0") != "0":
        return
    SAID.add(run.absolute())
    if filled:
        log.warning("%s lacks %s: today's defaults are taken.", run / "config.yaml", ", ".join(filled))
    if dropped:
        log.warning("%s: %s no longer exist and are passed over.", run / "config.yaml", ", ".join(dropped))


def added(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `data` that configs of earlier versions lack, and what these did."""
    data = cfg.get("data")
    return ADDED.get(str(data.get("name")), {}) if isinstance(data, Mapping) else {}


# ---------------------------------------------------------------- identity of a run


def flatten(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Leaves of a nested mapping as (path, value)."""
    if isinstance(tree, Mapping) and tree:
        for key in tree:
            yield from flatten(tree[key], (*path, str(key)))
    else:
        yield path, tree


def leaves(cfg: DictConfig) -> dict[str, Any]:
    """All values of a config: dotted key -> value."""
    return {".".join(path): value for path, value in flatten(plain(cfg))}


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The leaves that decide what a run computes: dotted key -> value. Of a key that configs of earlier versions lack
    only another value than theirs counts, so that a command comes back to the directory that it has made."""
    values = plain(cfg)
    earlier = {("data", key): value for key, value in added(values).items()}
    return {
        ".".join(path): value
        for path, value in flatten(values)
        if not any(path[: len(neutral)] == neutral for neutral in NEUTRAL)
        and not (path in earlier and earlier[path] == value)
    }


def difference(old: DictConfig, new: DictConfig) -> list[str]:
    """'key: old -> new' for each leaf in which two runs' identities differ."""
    a, b = identity(old), identity(new)
    return [
        f"{k}: {json.dumps(a.get(k))} -> {json.dumps(b.get(k))}"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]


def run_directory(cfg: DictConfig) -> Path:
    """`output_dir`, or a name made from the config: the same command comes back to the same directory."""
    if cfg.output_dir:
        return Path(cfg.output_dir)
    digest = hashlib.sha256(json.dumps(identity(cfg) | {"data.root": cfg.data.get("root")}).encode()).hexdigest()
    return Path("runs") / f"{cfg.task.name}-{cfg.model.name}-{cfg.data.name}-{digest[:8]}"
