"""What a config takes over from another one. Imports no torch.

- `init=RUN`: the model and the data of that run, where the command line says neither.
- A stage of a pipeline, and the run that `init=auto` stands for: model, data, launcher and device of the command.
- `resume=RUN` and `replay=RUN`: all of that run, but for what may change between two starts.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from mae.config import overrides
from mae.config.check import check_config, to_dict, with_values
from mae.config.compose import CONF, chosen_groups, composed, is_group
from mae.config.identity import CHANGEABLE, NEUTRAL
from mae.config.paths import data_root
from mae.config.rules import reads_data
from mae.config.saved import read_config, stored_config, stored_overrides
from mae.errors import UserError
from mae.runs.bad_step import bad_step_dir, read_bad_step
from mae.runs.checkpoints import describes_itself, newest_complete
from mae.runs.layout import BAD_STEP, CHECKPOINTS, CONFIG

AUTO = "auto"  # as init: the pre-trained weights that this program makes itself
SECTIONS = ("model", "data")
MARK = "from_init"  # a key that lives until the values are taken over: the sections whose group a run chose
FOLLOWS = ("img_size", "in_chans")  # of a model: those of the data, unless the run said otherwise
# How much of the data is learned from, and how and where they are loaded: not what they are
OWN = {"fraction", "per_class", "repeats", "unlabelled", *(path[-1] for path in NEUTRAL if path[0] == "data")}
OWN -= {"root"}
CHOICES = ("model", "data", "masking", "target", "launcher")  # groups of which stages of a pipeline take the same file
SHARED = (*CHOICES, "wandb", "estimate")  # sections that are the same in every stage
NO_CHOICES: Mapping[str, str] = {}


def run_of(init: str) -> Path | None:
    """The directory of the run that `init` names, or of whose checkpoints it names one; None for other files."""
    try:
        path = Path(init).expanduser().absolute()
        for named in (path, path.resolve()):
            # RUN, RUN/checkpoints/STEP, RUN/checkpoints/STEP/FILE
            for run in (named, *(folder.parent for folder in named.parents[:2] if folder.name == CHECKPOINTS)):
                if (run / CONFIG).is_file() and (run / CHECKPOINTS).is_dir():
                    return run
    except (OSError, RuntimeError):  # a name that is too long, a home that is not there
        pass
    return None


def settings_of(init: str) -> Path | None:
    """The directory of the run that `init` names, or a checkpoint outside of its run whose manifest holds the config;
    None for other files."""
    if (run := run_of(init)) is not None:
        return run
    path = Path(os.path.expanduser(init))  # as it is where there is no such home
    return next((folder for folder in (path, path.parent) if describes_itself(folder)), None)


def stands_for(init: str) -> Path | None:
    """The checkpoint that `init` means now, where it is a run's directory or a link: later it may mean another."""
    path = Path(init).expanduser()
    if run_of(init) == path.absolute():
        return newest_complete(path)
    return path.resolve() if path.is_symlink() else None


def with_groups(arguments: Sequence[str]) -> list[str]:
    """A command line with the groups `model` and `data` of the run that `init=` names, where it chooses none itself.
    An experiment chooses both. With `resume=` or `replay=`, those of the run that goes on. Raises UserError where the
    run's own config cannot be read."""
    typed = {key: override for key, override in overrides.by_key(arguments).items() if not override.is_delete()}
    if goes_on := typed.get("resume") or typed.get("replay"):
        return _with_groups_of_resumed(arguments, goes_on, set(typed))
    sections = [name for name in SECTIONS if name not in typed]
    if "init" not in typed or "experiment" in typed or not sections:
        return list(arguments)
    inits = overrides.values_of(typed["init"])  # several in a sweep
    choices = {tuple(_groups(settings_of(str(init)), sections)) for init in inits}
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
        whose = "those runs'" if len(inits) > 1 else "that run's"
        sys.stderr.write(f"{init}: {' and '.join(groups)} {'are' if len(groups) > 1 else 'is'} {whose}\n")
    at = list(arguments).index(init) + 1
    mark = "-".join(group.partition("=")[0] for group in groups)
    return [*arguments[:at], *groups, f"+{MARK}={mark}", *arguments[at:]]


def _with_groups_of_resumed(arguments: Sequence[str], goes_on: Override, typed: set[str]) -> list[str]:
    """A command line `resume=RUN` with the groups of that run, so that their own keys can be typed."""
    run, *others = overrides.values_of(goes_on)
    folder = Path(str(run)).expanduser()
    if others or not (folder / CONFIG).is_file():  # which `resumed` says
        return list(arguments)
    groups = list(_groups(folder, [name for name in ("task", *SECTIONS, "launcher") if name not in typed]))
    groups = [group for group in groups if (CONF / f"{group.replace('=', '/', 1)}.yaml").is_file()]
    if not groups:
        return list(arguments)
    return [*arguments, *groups, f"+{MARK}={'-'.join(group.partition('=')[0] for group in groups)}"]


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
    return {name: section for name, section in to_dict(stored_config(run)).items() if isinstance(section, dict)}


def with_run_values(cfg: DictConfig, arguments: Sequence[str]) -> DictConfig:
    """The composed config with the run's own values in the sections whose group `with_groups` took from it.

    Keys of the command line stay. Of the data it takes what they are, not how much of them is learned from, nor how
    they are loaded.
    """
    if MARK not in cfg:
        return cfg
    with open_dict(cfg):
        sections = cfg.pop(MARK).split("-")
    if cfg.resume or cfg.replay:  # see `resumed`
        return cfg
    typed = [overrides.key_of(argument) for argument in arguments]
    run = settings_of(cfg.init)
    assert run is not None
    stored = _stored(run)
    for name in sections:
        for key, value in stored[name].items():
            if key not in cfg[name] or any(f"{other}.".startswith(f"{name}.{key}.") for other in typed):
                continue
            new_data = "data" not in sections or f"data.{key}" in typed
            follows = _follows_data(name, key, value, stored.get("data", {})) and new_data
            if not follows and not (name == "data" and key in OWN):
                root = (name, key) == ("data", "root") and isinstance(value, str)
                cfg[name][key] = data_root(run, value, must_exist=reads_data(cfg)) if root else value
    return cfg


def chosen_by_member(arguments: Sequence[str], keys: set[str]) -> list[str]:
    """A command line in which the sections among `keys`, that a member of a sweep chooses, are not the run's."""
    sections = [name for name in _taken_sections(arguments) if name not in keys]
    mark = [f"+{MARK}={'-'.join(sections)}"] if sections else []
    return [*(word for word in arguments if overrides.key_of(word) != MARK), *mark]


def without_taken(arguments: Sequence[str]) -> list[str]:
    """A command line without what `with_groups` put into it, so that it takes the run's values again."""
    taken = {MARK, *_taken_sections(arguments)}
    return [word for word in arguments if overrides.key_of(word) not in taken]


def _taken_sections(arguments: Sequence[str]) -> list[str]:
    """The sections whose group `with_groups` has put into a command line."""
    marks = [word.partition("=")[2] for word in arguments if overrides.key_of(word) == MARK]
    return [section for mark in marks for section in mark.split("-")]


def _follows_data(section: str, key: str, value: object, data: Mapping[str, object]) -> bool:
    """Whether a value is one that a model has from its data, so that it follows other data."""
    return section == "model" and key in FOLLOWS and value == data.get(key)


# ---------------------------------------------------------------- a pipeline's stage, init=auto


def other_task(cfg: DictConfig, name: str, arguments: list[str], choices: Mapping[str, str] = NO_CHOICES) -> DictConfig:
    """Another task on the model, data, launcher and device of a config; not resolved yet."""
    same = [f"{group}={choices.get(group, cfg[group].name)}" for group in CHOICES]
    stage = composed([f"task={name}", *same, *arguments])
    OmegaConf.set_struct(stage, False)
    changed = set(map(overrides.key_of, arguments))
    for section in SHARED:
        for key, value in cfg[section].items():
            follows = f"data.{key}" in changed and _follows_data(section, key, value, cfg.data)
            if section not in changed and f"{section}.{key}" not in changed and not follows:
                stage[section][key] = value
    if cfg.wandb.job_type == cfg.task.name:
        stage.wandb.job_type = name
    stage.device, stage.tensorboard = cfg.device, cfg.tensorboard
    return stage


def own_names(cfg: DictConfig, choices: Mapping[str, str]) -> list[str]:
    """Overrides that choose the same files, for groups whose file has another name than its `name:`."""
    return [f"{group}={choices[group]}" for group in CHOICES if choices.get(group, cfg[group].name) != cfg[group].name]


def stage_command(name: str, cfg: DictConfig, typed: Sequence[str], own: Sequence[str], *more: str) -> list[str]:
    """The command line that makes a stage by itself: what the command line `typed` says of the sections that all stages
    share (and of the keys `more`), then what is the stage's own."""
    shared = {*SHARED, "device", "tensorboard", *more}
    choices = [*own_names(cfg, chosen_groups(typed)), *typed]
    of_all = {key: word for word in choices if (key := overrides.key_of(word)).partition(".")[0] in shared}
    replaced = set(map(overrides.key_of, own))
    return [f"task={name}", *(word for key, word in of_all.items() if key not in replaced), *own]


# ---------------------------------------------------------------- resume=RUN


def resumed(cfg: DictConfig, arguments: Sequence[str], verb: str = "resume") -> tuple[DictConfig, list[str]]:
    """The saved config of `resume=RUN` and its command line, with the changes of this command line.

    Raises UserError for a key that may not change between two starts.
    """
    run = Path(cfg[verb])
    stored = read_config(run)
    typed = {overrides.key_of(override): override for override in arguments}
    typed.pop(verb)
    free = {".".join(path) for path in NEUTRAL} - {"resume", "replay"} | set(CHANGEABLE)
    for key in sorted(typed):
        if not any(key == name or key.startswith(f"{name}.") for name in free):
            raise UserError(
                f"{key} cannot be changed together with {verb}={cfg[verb]}: a run keeps its own config. "
                "Leave it out, or start a new run with init=RUN."
            )
    if "output_dir" in typed and (cfg.output_dir is None or Path(cfg.output_dir).absolute() != run.absolute()):
        raise UserError(
            f"output_dir={cfg.output_dir} cannot be set together with resume={cfg.resume}: a run stays in its own "
            "directory. Leave it out; for a copy, copy the directory first and resume the copy."
        )
    merged = OmegaConf.create(OmegaConf.to_container(stored))
    assert isinstance(merged, DictConfig)
    typed.pop("output_dir", None)
    for key in typed:
        # another launcher has other keys
        OmegaConf.update(merged, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    merged.output_dir, merged.resume = str(run), None
    if "dependency" in merged.launcher and not {"launcher", "launcher.dependency"} & set(typed):
        merged.launcher.dependency = None  # a job of the first start
    if "data.root" not in typed and merged.data.root is not None:
        merged.data.root = data_root(run, merged.data.root, must_exist=reads_data(merged))
    return check_config(merged), _replaced(stored_overrides(run), typed)


def replayed(cfg: DictConfig, arguments: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """As `resumed`, for `replay=RUN`, whose own directory lies in that of the run.

    Raises UserError where the run has left no bad step.
    """
    run = Path(cfg.replay)
    if any(overrides.key_of(argument) == "output_dir" for argument in arguments):
        raise UserError(f"output_dir cannot be set together with replay={cfg.replay}: it reports in {run / BAD_STEP}.")
    config, typed = resumed(cfg, arguments, "replay")
    read_bad_step(run)
    return with_values(config, output_dir=str(bad_step_dir(run)), replay=str(run.absolute())), typed


def _replaced(stored: Sequence[str], typed: dict[str, str]) -> list[str]:
    """A run's command line with some of its values replaced."""
    groups = tuple(f"{key}." for key in typed if is_group(key))
    same = [
        override
        for override in stored
        if overrides.key_of(override) not in typed and not overrides.key_of(override).startswith(groups)
    ]
    return [*same, *typed.values()]
