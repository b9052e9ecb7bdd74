"""What a command line names and its task takes no notice of. Imports no torch."""

import shlex
from collections.abc import Iterable

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig

from mae.config.from_run import AUTO, settings_of
from mae.config.overrides import key_of
from mae.config.saved import stored_config
from mae.errors import UserError
from mae.tasks.registry import TASKS

OF_STAGES = ("optimizer", "augmentation", "checkpoint", "recipe", "experiment")  # sections that only stages have


def users_of(override: str) -> list[str]:
    """The tasks that use the override's group, where it is one that only some use."""
    group = _group(override)
    return [name for name, entry in TASKS.items() if group in entry.uses]


def is_used(task: str, override: str) -> bool:
    """Whether a task takes notice of an override's group."""
    users = users_of(override)
    return not users or task in users


def refuse_unused(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Raises UserError for an override that would change nothing: of masking or target, where neither the task nor a
    stage of the pipeline uses it; of what only stages have; of the target beside a run that is drawn."""
    made_first = ["pretrain"] if cfg.init == AUTO else []
    if cfg.task.name == "pipeline":
        _refuse_in_pipeline(cfg, made_first, overrides)
        return
    task = cfg.task.name
    for override in overrides:
        _refuse(f"task={task}", [task, *made_first], override)
        if task == "visualize" and _group(override) == "target" and cfg.init and _states_target(cfg.init):
            raise UserError(
                f"{override} does nothing with task={task} init={cfg.init}: what that run predicts is drawn. Leave it "
                "out."
            )


def _refuse_in_pipeline(cfg: DictConfig, made_first: list[str], overrides: Iterable[str]) -> None:
    stages = list(cfg.task.stages)
    for override in overrides:
        if _group(override) in OF_STAGES:
            typed = shlex.quote(f"task.overrides.pretrain=[{QuotedString(override, Quote.double).with_quotes()}]")
            raise UserError(f"{override} belongs to a stage: give it to one, as in {typed}.")
        _refuse(f"task.stages=[{','.join(stages)}]", [*stages, *made_first], override)
    for stage in stages:
        for override in cfg.task.overrides.get(stage) or []:
            if isinstance(override, str):
                _refuse(f"stage {stage}", [stage], override)


def _refuse(user: str, tasks: list[str], override: str) -> None:
    """Raises UserError where none of the tasks uses the override's group. `user` is what was named."""
    if not any(is_used(task, override) for task in tasks):
        *users, last = users_of(override)
        raise UserError(
            f"{override} does nothing with {user}: leave it out. "
            f"Of the tasks, {', '.join(users)} and {last} use {_group(override)}."
        )


def _group(override: str) -> str:
    return key_of(override).partition(".")[0]


def _states_target(init: str) -> bool:
    """Whether `init` names a run, or a checkpoint of one, whose config says what it predicts."""
    run = settings_of(init)
    return run is not None and "target" in stored_config(run)
