"""What a command line names and its task takes no notice of. Imports no torch."""

import shlex
from collections.abc import Iterable

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, ListConfig

from mae.config.from_run import AUTO, SHARED, settings_of
from mae.config.overrides import key_of
from mae.config.saved import stored_config
from mae.errors import UserError
from mae.tasks.registry import TASKS

# keys of training that probes of cached features have no part in
UNCACHED = (
    *("augmentation", "optimizer.layer_decay", "data.repeats", "data.decode_device", "launcher.sharding"),
    *("task.profile", "task.checkpointing", "task.residual_dtype", "task.max_bad_steps"),
)
OF_STAGES = ("optimizer", "augmentation", "checkpoint", "recipe", "experiment")  # sections that only stages have


def users_of(override: str) -> list[str]:
    """The tasks that use the override's group, where it is one that only some use."""
    group = _group(override)
    return [name for name, entry in TASKS.items() if group in entry.used_groups()]


def is_used(task: str, override: str) -> bool:
    """Whether a task takes notice of an override's group."""
    users = users_of(override)
    return not users or task in users


def refuse_unused(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Raises UserError for an override that would change nothing: of a group that neither the task nor a stage of the
    pipeline uses; of what only stages have; of the target beside a run that is drawn."""
    if cfg.task.name == "pipeline":
        _refuse_in_pipeline(cfg, overrides)
        return
    task = cfg.task.name
    for override in overrides:
        _refuse(f"task={task}", [task, *_made_first(cfg, override)], override)
        if task == "visualize" and _group(override) == "target" and cfg.init and _states_target(cfg.init):
            raise UserError(
                f"{override} does nothing with task={task} init={cfg.init}: what that run predicts is drawn. Leave it "
                "out."
            )
        if cfg.task.get("cached_features") and f"{key_of(override)}.".startswith(tuple(f"{key}." for key in UNCACHED)):
            raise UserError(
                f"{override} does nothing with task.cached_features=true, which trains on features of centre crops, "
                "computed once. Leave it out, or set task.cached_features=false."
            )
        if key_of(override) == "target.images" and cfg.target.get("fitted") is not None:
            raise UserError(
                f"{override} does nothing with target.fitted={cfg.target.fitted}, whose images are summed already. "
                "Leave it out."
            )


def refuse_unused_of_resumed(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Raises UserError for an override beside `resume=` of a pipeline that would reach none of its stages."""
    for override in overrides:
        if cfg.task.name == "pipeline" and _group(override) in OF_STAGES:
            raise UserError(f"{override} does nothing with resume={cfg.output_dir}: its stages keep their own.")


def _made_first(cfg: DictConfig, override: str) -> list[str]:
    """The task that `init=auto` runs before, where it takes the override's section over."""
    return ["pretrain"] if cfg.init == AUTO and _group(override) in SHARED else []


def _refuse_in_pipeline(cfg: DictConfig, overrides: Iterable[str]) -> None:
    stages = list(cfg.task.stages)
    for override in overrides:
        if _group(override) in OF_STAGES:
            typed = shlex.quote(f"task.overrides.pretrain=[{QuotedString(override, Quote.double).with_quotes()}]")
            raise UserError(f"{override} belongs to a stage: give it to one, as in {typed}.")
        _refuse(f"task.stages=[{','.join(stages)}]", [*stages, *_made_first(cfg, override)], override)
    for stage in stages:
        typed = cfg.task.overrides.get(stage)
        for override in typed if isinstance(typed, ListConfig) else []:
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
