"""What a command takes over from the run that its `init` names: the model and the data, where it says neither itself.

So `python run.py task=evaluate init=RUN` evaluates the run's network on the run's data. Imports no torch.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from mae.config import overrides
from mae.config.check import to_dict
from mae.config.compose import chosen_groups
from mae.config.identity import NEUTRAL
from mae.config.paths import data_root
from mae.config.rules import reads_data
from mae.config.saved import stored_config, stored_overrides
from mae.runs.checkpoints import newest_complete

SECTIONS = ("model", "data")
MARK = "from_init"  # a key that lives until the values are taken over: the sections whose group the run chose
FOLLOWS = ("img_size", "in_chans")  # of a model: those of the data, unless the run said otherwise
# How much of the data is learned from, and how and where they are loaded: not what they are
OWN = {"fraction", "per_class", "repeats", "unlabelled", *(path[-1] for path in NEUTRAL if path[0] == "data")}
OWN -= {"root"}


def run_of(init: str) -> Path | None:
    """The directory of the run that `init` names, or of whose checkpoints it names one; None for other files."""
    try:
        place = Path(init).expanduser().absolute()
        for one in (place, place.resolve()):
            # RUN, RUN/checkpoints/STEP, RUN/checkpoints/STEP/FILE
            for run in (one, *(folder.parent for folder in one.parents[:2] if folder.name == "checkpoints")):
                if (run / "config.yaml").is_file() and (run / "checkpoints").is_dir():
                    return run
    except (OSError, RuntimeError):  # a name that is too long, a home that is not there
        pass
    return None


def stands_for(init: str) -> Path | None:
    """The checkpoint that a run's directory or a link, which name others as the run goes on, stand for now."""
    place = Path(init).expanduser()
    if run_of(init) == place.absolute():
        return newest_complete(place)
    return place.resolve() if place.is_symlink() else None


def with_groups(arguments: Sequence[str]) -> list[str]:
    """A command line with the groups `model` and `data` of the run that `init=` names, where it chooses none itself.
    An experiment chooses both. Raises UserError where the run's own config cannot be read."""
    typed = {key: one for key, one in overrides.by_key(arguments).items() if not one.is_delete()}
    sections = [name for name in SECTIONS if name not in typed]
    if "init" not in typed or "experiment" in typed or not sections:
        return list(arguments)
    inits = overrides.values_of(typed["init"])  # several in a sweep
    choices = {tuple(_groups(run_of(str(init)), sections)) for init in inits}
    groups = choices.pop()
    init = typed["init"].input_line
    assert init is not None
    main = os.environ.get("RANK", "0") == "0"
    if choices and main:
        sys.stderr.write(
            f"{init}: these runs differ in {' or '.join(sections)}, so that no run's is taken: "
            f"{' and '.join(f'{name}=...' for name in sections)} choose{'s' * (len(sections) == 1)} for all.\n"
        )
    if choices or not groups:
        return list(arguments)
    if main:
        sys.stderr.write(f"{init}: {' and '.join(groups)} {'are' if len(groups) > 1 else 'is'} that run's\n")
    at = list(arguments).index(init) + 1
    mark = "-".join(group.partition("=")[0] for group in groups)
    return [*arguments[:at], *groups, f"+{MARK}={mark}", *arguments[at:]]


def _groups(run: Path | None, sections: list[str]) -> Iterator[str]:
    """The choices of groups that a run makes, as overrides."""
    if run is None:
        return
    stored = _stored(run)
    choices = chosen_groups(stored_overrides(run))
    for name in sections:
        choice = choices.get(name, stored.get(name, {}).get("name"))
        if isinstance(choice, str) and re.fullmatch(r"[\w.-]+", choice):
            yield f"{name}={choice}"


def _stored(run: Path) -> dict[str, dict[Any, Any]]:
    """The sections of a run's config as they were written."""
    found = to_dict(stored_config(run))
    return {name: section for name, section in found.items() if isinstance(section, dict)}


def inherited(cfg: DictConfig, arguments: Sequence[str]) -> DictConfig:
    """The composed config with the run's own values in the sections whose group `with_groups` took over, but for single
    keys of the command line. Of the data it takes what they are, not how much of them is learned from, nor how they are
    loaded."""
    if MARK not in cfg:
        return cfg
    with open_dict(cfg):
        sections = cfg.pop(MARK).split("-")
    given = [overrides.key_of(argument) for argument in arguments]
    run = run_of(cfg.init)
    assert run is not None
    stored = _stored(run)
    for name in sections:
        for key, value in stored[name].items():
            if key not in cfg[name] or any(one == f"{name}.{key}" or one.startswith(f"{name}.{key}.") for one in given):
                continue
            new = "data" not in sections or f"data.{key}" in given
            follows = name == "model" and key in FOLLOWS and new and value == stored.get("data", {}).get(key)
            if not follows and not (name == "data" and key in OWN):
                root = (name, key) == ("data", "root") and isinstance(value, str)
                cfg[name][key] = data_root(run, value, must_exist=reads_data(cfg)) if root else value
    return cfg
