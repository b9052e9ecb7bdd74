"""Configs and checkpoints of other versions of this code, read with today's keys. Imports no torch.

A config carries the number of its format (`format:` in config.yaml, `format` in a checkpoint's manifest; without one it
is 0). A released change of keys gets the next number and a `Migration`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mae.config.compose import CONF, chosen_groups, composed
from mae.config.schema import SCHEMA, TOP, schema, signature, table
from mae.runs.layout import FORMAT, FORMAT_KEY

GROUPS = ("task", "model", "data", "masking", "target", "launcher")  # whose choice decides the defaults of the others
CHOSEN = (*SCHEMA, "recipe", "experiment")

Config = dict[str, Any]  # top-level key -> value, group -> its keys


@dataclass(frozen=True)
class Migration:
    """How configs of an earlier format are read."""

    format: int  # the first one that is not migrated
    renamed: Mapping[str, str] = field(default_factory=dict)  # group or dotted key -> today's
    # group, group=name, or "" for the top -> the keys that came with this format, and what was done before
    added: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


SHARDS = {"image_key": None, "label_key": None, "sample_key": "first_dot", "follow_links": False, "splits": "auto"}
OF_TRAINING = {"residual_dtype": "float32"}
PROBE = {"probe": "linear", "probe_queries": 32, "probe_projection": True, "layer": None}
MIGRATIONS = (
    Migration(
        format=1,
        added={
            "data=shards": SHARDS,
            "data=hf": {"follow_links": False},
            "data=folder": {"splits": "auto"},
            "data=cifar10_folder": {"splits": "auto"},
            "data=scientific": {"splits": "auto"},
            "": {"replay": None},
            "data": {"decode_device": "cpu"},
            "masking": {"name": "random"},
            "task=export": {"push_to_hub": None},
            "target": {"name": "pixels"},
            "target=pca": {"fitted": None},
            "model": {"decoder": "self", "mask_tokens": "decoder"},
            "task=pretrain": {
                **OF_TRAINING,
                "predict_ratio": None,
                "rankme": None,
                "online_probe": False,
                "online_probe_lr": 1.0e-3,
                "img_size_schedule": None,
                "init_channels": None,
                "init_patch_size": None,
            },
            "task=pipeline": {"norm_pix_loss": None, "epochs": None, "augmentation": None},
            "task=finetune": OF_TRAINING,
            "task=linprobe": OF_TRAINING | PROBE,
        },
    ),
)


@dataclass
class Changes:
    """What reading a config of another version changed in it: names of keys and groups."""

    format: int = FORMAT
    earlier: list[str] = field(default_factory=list)  # filled with what earlier versions did
    defaults: list[str] = field(default_factory=list)  # filled with today's defaults
    unknown: list[str] = field(default_factory=list)

    def sentences(self) -> Iterator[str]:
        """What a log says of them, without the file that it is about."""
        if self.format > FORMAT:
            yield f"is of format {self.format}, from a newer version of this program; this one reads up to {FORMAT}."
        if self.earlier:
            yield f"lacks {', '.join(self.earlier)}: read as earlier versions did."
        if self.defaults:
            yield f"lacks {', '.join(self.defaults)}: today's defaults are taken."
        if self.unknown:
            yield f"holds {', '.join(self.unknown)}, which this version does not know and passes over."


def as_of_today(stored: Mapping[str, Any], overrides: Iterable[str]) -> tuple[Config, Changes]:
    """A saved config with today's keys, and what that changed in it."""
    config = {str(key): dict(value) if isinstance(value, Mapping) else value for key, value in stored.items()}
    number = config.pop(FORMAT_KEY, 0)
    changes = Changes(number if isinstance(number, int) else 0)
    for migration in MIGRATIONS:
        if migration.format > changes.format:
            changes.earlier += _migrate(config, migration)
    absent = [group for group in SCHEMA if group not in config]
    known = known_keys(config)
    missing = [*absent, *sorted(key for key in known if not _holds(config, key))]
    if missing:
        defaults = _defaults(config, overrides)
        changes.defaults = [key for key in missing if defaults is not None and _fill(config, key, defaults)]
    known |= known_keys({group: config.get(group) for group in absent})
    changes.unknown = list(_drop(config, known))
    return config, changes


def earlier_values(config: Mapping[str, Any]) -> dict[tuple[str, str], object]:
    """(group, key) -> what versions without that key did, for the choices of a config."""
    return {
        (choice.partition("=")[0], key): value
        for migration in MIGRATIONS
        for choice, keys in migration.added.items()
        if _chosen(config, choice)
        for key, value in keys.items()
    }


# ---------------------------------------------------------------- migrations


def _chosen(config: Mapping[str, Any], choice: str) -> bool:
    """Whether a config has made a choice such as `data=folder`, or has the group `data`; every one has a top."""
    group, _, name = choice.partition("=")
    section = config.get(group) if group else config
    return isinstance(section, Mapping) and name in ("", section.get("name"))


def _migrate(config: Config, migration: Migration) -> Iterator[str]:
    """Renames what a migration renames, fills what it adds, and yields the keys that it filled."""
    for old, new in migration.renamed.items():
        _rename(config, old, new)
    for choice, keys in migration.added.items():
        group = choice.partition("=")[0]
        section = config.get(group, config)
        for key in keys if _chosen(config, choice) else ():
            if key not in section:
                section[key] = keys[key]
                yield f"{group}.{key}" if group else key


def _rename(config: Config, old: str, new: str) -> None:
    """Moves a group or a dotted key; one that has today's name too stays as it is."""
    *parents, name = old.split(".")
    section = config.get(parents[0]) if parents else config
    if not isinstance(section, dict) or name not in section or _holds(config, new):
        return
    value = section.pop(name)
    *parents, name = new.split(".")
    (config.setdefault(parents[0], {}) if parents else config)[name] = value


# ---------------------------------------------------------------- today's keys and defaults


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


def _holds(config: Mapping[str, Any], key: str) -> bool:
    group, _, name = key.rpartition(".")
    return name in (config.get(group, {}) if group else config)


def _fill(config: Config, key: str, defaults: DictConfig) -> bool:
    """Whether today's configuration has a default for a key, which the config then holds."""
    group, _, name = key.rpartition(".")
    if name not in (defaults.get(group, {}) if group else defaults):
        return False
    value = OmegaConf.select(defaults, key)
    (config[group] if group else config)[name] = (
        OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    )
    return True


def _drop(config: Config, known: set[str]) -> Iterator[str]:
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


def _defaults(config: Mapping[str, Any], overrides: Iterable[str]) -> DictConfig | None:
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
    merged = OmegaConf.merge(defaults, OmegaConf.create(dict(config)))
    assert isinstance(merged, DictConfig)
    return merged
