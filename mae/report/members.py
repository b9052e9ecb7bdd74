"""A sweep read back from its directory: its members, what was swept, and their results."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from mae.config import paths
from mae.config.identity import leaves
from mae.config.overrides import by_key, values_of
from mae.config.saved import read_config
from mae.config.sweep_members import MEMBER, listed_values, sweep_name
from mae.config.sweep_names import params, swept
from mae.errors import UserError
from mae.report.record import Record, read_record
from mae.runs.layout import SWEEP_RECORD
from mae.runs.summary import VAL_IMAGES
from mae.tasks.registry import METRICS, TASKS

LOSS_GROUPS = ("masking", "target")
LOSS_KEYS = ("task.mask_ratio", "task.norm_pix_loss", "task.predict_ratio", "model.patch_size", "model.img_size")
LOSS_KEYS += ("data", "data.name", "data.img_size")
LOWER = ("ece", "mce", "bad", "seconds")  # numbers of summaries that are better where they are lower

SEARCHED = "search.yaml"  # the keys of a search by Optuna
NEUTRAL = ("output_dir", "init")  # keys that differ between members and are not swept

Value = str | float | bool  # of a swept key, as tables and figures take it


@dataclass
class Member:
    """One run of a sweep."""

    path: Path
    cfg: DictConfig
    record: Record
    values: dict[str, Value | None] = field(default_factory=dict)  # swept key -> value
    results: dict[str, float] = field(default_factory=dict)  # e.g. `finetune top1`
    images: dict[str, int] = field(default_factory=dict)  # accuracy -> validation images that it is of

    @property
    def name(self) -> str:
        return self.path.name


@dataclass
class Sweep:
    """A sweep's members, what was swept, and what is measured."""

    directory: Path
    name: str
    keys: list[str]
    members: list[Member]
    not_started: list[str] = field(default_factory=list)  # names of members that have only an empty directory

    @property
    def metrics(self) -> list[str]:
        """All results that a member has, the main one first."""
        return list(dict.fromkeys(name for member in self.members for name in member.results))

    @property
    def metric(self) -> str | None:
        return self.metrics[0] if self.metrics else None

    @property
    def best(self) -> Member | None:
        """The finished member with the best main result, the first of equals."""
        return self.best_by(self.metric) if self.metric else None

    def best_by(self, metric: str) -> Member | None:
        """The finished member with the best result of a name, the first of equals."""
        finished = self.finished(metric)
        return (min if lower_is_better(metric) else max)(finished, key=lambda m: m.results[metric], default=None)

    def finished(self, metric: str) -> list[Member]:
        """The finished members that have a result of this name."""
        return [m for m in self.members if metric in m.results and m.record.state == "finished"]


def best_number(value: object) -> float | None:
    """A result as one number: of several, as k-NN has one for each k, the largest. None for what is no number."""
    if isinstance(value, dict) and value and all(isinstance(number, int | float) for number in value.values()):
        value = max(value.values())
    return value if isinstance(value, int | float) else None


def lower_is_better(metric: str) -> bool:
    """Whether a result such as `top1`, or `finetune top1` of a pipeline, is better where it is lower."""
    key = metric.split(" ")[-1]
    return METRICS[key].lower_is_better if key in METRICS else key in LOWER or key.endswith("loss")


def changes_loss(key: str) -> bool:
    """Whether a key decides what the validation loss of pre-training is of: losses of its values do not compare."""
    return key.split(".")[0] in LOSS_GROUPS or key in LOSS_KEYS


def results_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """The results of a run's summary by name; of a pipeline, each stage's."""
    results = {}
    for prefix, values in stages_of(summary):
        for key in METRICS:
            value = best_number(values.get(key))
            if value is not None and math.isfinite(value):
                results[f"{prefix}{key}"] = float(value)
    return results


def images_of(summary: Mapping[str, Any]) -> dict[str, int]:
    """Accuracy of a run's summary, by the names of `results_of` -> how many images it is of, where that is known."""
    return {
        f"{prefix}{key}": values[VAL_IMAGES]
        for prefix, values in stages_of(summary)
        for key in METRICS
        if values.get(key) is not None and isinstance(values.get(VAL_IMAGES), int)
    }


def stages_of(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(prefix of its results' names, its summary) of each stage of a pipeline, or of the run itself."""
    stages = summary.get("stages")
    if not isinstance(stages, dict):
        return [("", summary)]
    order = list(TASKS)
    names = sorted(stages, key=lambda name: order.index(name) if name in order else len(order))
    return [(f"{name} " if len(stages) > 1 else "", stages[name]) for name in names]


def members_of(directory: Path) -> list[Member]:
    """The runs in a sweep's directory. Raises UserError where there is no directory."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not the directory of a sweep: it does not exist.")
    members = []
    for path in sorted(config.parent for config in directory.glob("*/config.yaml")):
        record = read_record(path)
        results, images = results_of(record.summary), images_of(record.summary)
        members.append(Member(path, read_config(path), record, results=results, images=images))
    return members


def read_sweep(directory: Path) -> Sweep:
    """A sweep from its directory. The swept keys are those of Hydra's record, else those in which members differ.

    Raises UserError where no member has started.
    """
    members = members_of(directory)
    if not members:
        raise UserError(f"{directory} holds no run: a sweep's members lie in folders of it, each with a config.yaml.")
    configs = [leaves(member.cfg) for member in members]
    typed = [by_key(member.record.overrides) for member in members]
    keys = recorded_keys(directory) or named_keys(typed) or differing_keys(configs)
    axis = sweep_name(members[0].record.overrides)  # what a sweep over named members is called
    labels = {key: axis if key == MEMBER else key for key in keys}
    for member, config, overrides in zip(members, configs, typed, strict=True):
        for key, label in labels.items():
            if key in overrides and (key not in config or key in paths.KEYS):  # a group; a path, as it was typed
                member.values[label] = plain_value(values_of(overrides[key])[0])
            else:
                member.values[label] = plain_value(config[key]) if key in config else None
    order = {label: listed_values(axis, key) for key, label in labels.items()}
    members.sort(key=lambda member: [sort_key(value, order[label]) for label, value in member.values.items()])
    empty = sorted(path.name for path in directory.iterdir() if path.is_dir() and not any(path.iterdir()))
    return Sweep(directory, directory.absolute().name, [*labels.values()], members, empty)


def recorded_keys(directory: Path) -> list[str]:
    """The swept keys in the record of a search, or of Hydra's sweep; empty where there is no record."""
    if (directory / SEARCHED).exists():
        return [str(key) for key in OmegaConf.load(directory / SEARCHED)]
    path = directory / SWEEP_RECORD
    if not path.exists():
        return []
    record = OmegaConf.load(path)
    assert isinstance(record, DictConfig)
    return list(dict.fromkeys(params(record.hydra) + swept(str(task) for task in record.hydra.overrides.task)))


def named_keys(typed: Sequence[Mapping[str, Override]]) -> list[str]:
    """`member`, and `seed` where that differs too, if all members have a name; else empty."""
    if not all(MEMBER in overrides for overrides in typed):
        return []
    seeds = {str(overrides["seed"].value()) if "seed" in overrides else "" for overrides in typed}
    return [MEMBER, *["seed"] * (len(seeds) > 1)]


def differing_keys(configs: list[dict[str, Any]]) -> list[str]:
    """The keys whose values differ between members."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in NEUTRAL)
    return [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]


def plain_value(value: Any) -> Value:
    """A value as tables and figures take it: numbers, text and true or false as they are, all else as JSON."""
    return json.dumps(value) if value is None or isinstance(value, list | dict) else value


def sort_key(value: Value | None, order: Sequence[str] = ()) -> tuple[int, float, str]:
    """Numbers by size, then text in the order of the sweep's file, then other text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (0, float(value), "")
    return (1, order.index(str(value)), "") if str(value) in order else (2, 0.0, str(value))
