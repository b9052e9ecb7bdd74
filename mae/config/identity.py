"""What makes two configs the same run, and the directory that follows from it. Imports no torch."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mae.config.check import to_dict
from mae.config.paths import comparable
from mae.config.saved import stored_config, stored_overrides
from mae.config.versions import as_of_today, earlier_values
from mae.errors import UserError
from mae.runs.layout import CONFIG, FORMAT_KEY

# Keys and groups that may change between two starts of a run: where and how it runs, not what it computes
NEUTRAL = (
    ("output_dir",),
    ("resume",),
    ("replay",),
    ("dry_run",),
    ("tensorboard",),
    ("launcher",),
    ("wandb",),
    ("checkpoint",),
    ("estimate",),
    ("task", "micro_batch_size"),  # the same sums in another order, but for batch norms, mixup and maps
    ("task", "checkpointing"),  # the same numbers, computed again
    ("task", "attention_kernel"),  # another rounding, as another device has
    ("task", "profile"),
    ("task", "log_every_steps"),
    *(
        ("data", key)
        for key in ("num_workers", "workers", "prefetch", "timeout_s", "cache_dir", "cache_gb", "retry_s", "root")
    ),
)
# Keys that an unfinished run may change by resume=RUN or output_dir=RUN; they are part of its directory's name
CHANGEABLE = (
    *("data.splits", "data.follow_links", "data.image_key", "data.label_key", "data.sample_key"),  # images are compared
    *("device", "task.compile"),  # another rounding
)


def flatten(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Leaves of a nested mapping as (path, value)."""
    if isinstance(tree, Mapping) and tree:
        for key in tree:
            yield from flatten(tree[key], (*path, str(key)))
    else:
        yield path, tree


def leaves(cfg: DictConfig) -> dict[str, Any]:
    """All values of a config: dotted key -> value."""
    return {".".join(path): value for path, value in flatten(to_dict(cfg))}


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The leaves that decide what a run computes: dotted key -> value.

    A key that earlier versions lacked counts only with another value than theirs: a command comes back to the
    directory that it made with them.
    """
    values = to_dict(cfg)
    earlier = earlier_values(values)
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
    """`output_dir`, or a name made from the config: the same command comes back to the same directory.

    The name ends in a hash of what the run computes, in the order of the keys' names. Earlier versions hashed the keys
    in the order of the code; a directory of theirs with the same values is recognised by its config.
    """
    if cfg.output_dir:
        return Path(cfg.output_dir)
    values = identity(cfg) | {"data.root": cfg.data.get("root")}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    name = f"{cfg.task.name}-{cfg.model.name}-{cfg.data.name}"
    directory = Path("runs") / f"{name}-{digest[:8]}"
    return directory if directory.exists() else _earlier_directory(name, cfg) or directory


def _earlier_directory(name: str, cfg: DictConfig) -> Path | None:
    """The directory of an earlier version (format 0) whose run computes the same."""
    wanted = _with_root(cfg)
    for path in sorted(Path("runs").glob(f"{name}-*/{CONFIG}")):
        try:
            stored = to_dict(stored_config(path.parent))
            if FORMAT_KEY not in stored:
                saved = OmegaConf.create(as_of_today(stored, stored_overrides(path.parent))[0])
                if _with_root(saved) == wanted:
                    return path.parent
        except (UserError, OmegaConfBaseException, AttributeError, KeyError):  # no config of this program
            continue
    return None


def _with_root(cfg: DictConfig) -> dict[str, Any]:
    """The identity of a config, with the root of its data and with absolute paths."""
    alike = comparable(cfg)
    return identity(alike) | {"data.root": alike.data.get("root")}
