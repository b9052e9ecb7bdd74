"""What a run has left in its directory, read back: state, metrics, events, and how its config was made."""

import json
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mae.config.check import resolve
from mae.config.compose import CONF, composed, is_group
from mae.config.identity import leaves
from mae.config.overrides import key_of
from mae.config.saved import stored_overrides
from mae.program import program
from mae.runs.failure import FAILURE
from mae.runs.files import read_json, read_json_lines
from mae.runs.layout import ENVIRONMENT

log = logging.getLogger(__name__)

GROUPS = ("task", "model", "data")


@dataclass
class Record:
    """The files of a run, as they are at this moment."""

    state: str  # finished, interrupted, diverged, failed, unfinished
    summary: dict[str, Any]  # empty until the run is finished
    overrides: list[str]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @property
    def command(self) -> str:
        """What makes the same run again."""
        return command_of(self.overrides)


def command_of(overrides: list[str]) -> str:
    """Overrides as a command for a shell."""
    return shlex.join([*program().split(), *(override for override in overrides if key_of(override) != "output_dir")])


def read_record(run: Path) -> Record:
    """Reads a run's directory; a file that is not there yet is empty."""
    events = read_json_lines(run / "events.jsonl")
    summary = read_json(run / "summary.json")
    failure = (run / FAILURE).exists()  # of the last start, which may have left no event
    state = "finished" if summary else "failed" if failure else "unfinished"
    if not summary and events:
        first = str(events[-1].get("event", "")).split(":", 1)[0]
        state = first if first in ("interrupted", "diverged", "failed", "pruned") else state
    return Record(state, summary, stored_overrides(run), read_json_lines(run / "metrics.jsonl"), events)


def starts(run: Path) -> list[dict[str, Any]]:
    """Where and when the run was started, each time."""
    return read_json_lines(run / ENVIRONMENT)


def compared(cfg: DictConfig, overrides: list[str]) -> list[list[str]]:
    """Each leaf of a config as (key, value), with the default as a third where it differs from that."""
    standard = defaults(cfg, overrides)
    rows = []
    for key, value in leaves(cfg).items():
        row = [key, json.dumps(value)]
        if standard is not None and row[0] != "output_dir":
            known = standard.get(row[0])
            if known != value:
                row.append(json.dumps(known))
        rows.append(row)
    return rows


def defaults(cfg: DictConfig, overrides: list[str]) -> dict[str, Any] | None:
    """The leaves of the same choice of groups with nothing else changed, or None where that does not compose."""
    chosen = [override for override in overrides if is_group(key_of(override))]
    named = {key_of(override) for override in chosen}
    chosen += [
        f"{group}={cfg[group].name}"
        for group in GROUPS
        if group not in named and "experiment" not in named and (CONF / group / f"{cfg[group].name}.yaml").exists()
    ]
    try:
        return leaves(resolve(composed(chosen)))
    except Exception as error:  # a group of another version of this code
        log.debug("the defaults of %s do not compose: %s", chosen, error)
        return None
