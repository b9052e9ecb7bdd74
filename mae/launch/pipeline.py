"""Several tasks as one command: each stage is a run of its own, in a folder of the pipeline's run.

A stage that is finished is not done again; one that was interrupted goes on. Runs where the command was
typed, and hands each stage to the launcher: it imports no torch.
"""

import json
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from mae.config.build import call
from mae.config.check import check_config, resolve, with_values
from mae.config.compose import chosen_groups
from mae.config.from_run import FOLLOWS
from mae.config.identity import run_directory
from mae.config.overrides import key_of
from mae.config.saved import read_config
from mae.errors import UserError
from mae.runs.files import write_text
from mae.tasks.registry import METRICS, TASKS, names

log = logging.getLogger(__name__)

SHARED = ("model", "data", "launcher", "wandb")  # the same in every stage; the rest hangs on the task
GROUPS = ("model", "data", "launcher")  # of these, that are chosen
SET = ("task", "output_dir", "init", "resume")
OWN = ("optimizer", "augmentation", "checkpoint", "recipe", "experiment")
EMPTY: Mapping[str, str] = {}
Compose = Callable[[list[str]], DictConfig]  # a command line -> its config, not yet resolved
Start = Callable[[DictConfig, list[str]], int]  # launches a checked config; gives the exit code


def pipeline(
    run: Path,
    cfg: DictConfig,
    compose: Compose,
    start: Start,
    choices: Mapping[str, str],
    *,
    stages: list[str],
    mask_ratio: Annotated[float, "(0, 1)"] | None,
    overrides: dict,
) -> tuple[int, dict[str, Any] | None]:
    """Runs the stages in order; returns the exit code, and the summary once all are finished.

    `choices` are the files of groups that the command line chose. `overrides` holds, for a stage, what it alone
    changes, as on a command line. `mask_ratio` is that of stage pretrain, where a number is given.

    Raises UserError before the first stage starts where one of them is not possible.
    """
    if strange := [name for name, given in overrides.items() if given and name not in stages]:
        raise UserError(f"task.overrides names {strange[0]}, which is not among task.stages={list(stages)}.")
    if len(set(stages)) < len(stages) or not stages:
        raise UserError(f"task.stages must name each stage once, got {list(stages)}.")
    if mask_ratio is not None:
        if "pretrain" not in stages:
            raise UserError("task.mask_ratio is of stage pretrain, which is not among task.stages.")
        given = overrides.get("pretrain") or []
        overrides = overrides | {"pretrain": [f"task.mask_ratio={mask_ratio}", *given]}
    made = {name: stage_config(run, cfg, compose, name, stages, overrides.get(name) or [], choices) for name in stages}
    summaries: dict[str, Any] = {}
    jobs: dict[str, str] = {}
    for number, (name, stage) in enumerate(made.items(), start=1):
        log.info("stage %d of %d: %s", number, len(made), name)
        if job := jobs.get(parent_of(name, stages) or ""):
            stage = OmegaConf.merge(stage, {"launcher": {"dependency": f"afterok:{job}"}})
            assert isinstance(stage, DictConfig)
        if code := start(stage, [f"task={name}", *own_names(cfg, choices), *(overrides.get(name) or [])]):
            return code, None
        summary = run / name / "summary.json"
        if summary.exists():
            summaries[name] = json.loads(summary.read_text())
        else:  # it waits in a queue, and so will those that start from it
            jobs[name] = json.loads((run / name / "slurm" / "job.json").read_text())["job"]
    return 0, None if jobs else together(summaries)


def write_summary(run: str) -> None:
    """Writes the summary of a pipeline whose stages are finished."""
    stages = read_config(Path(run)).task.stages
    summaries = {name: json.loads((Path(run) / name / "summary.json").read_text()) for name in stages}
    write_text(Path(run) / "summary.json", json.dumps(together(summaries), indent=1) + "\n")


def stage_config(
    run: Path,
    cfg: DictConfig,
    compose: Compose,
    name: str,
    stages: Sequence[str],
    given: list[str],
    choices: Mapping[str, str] = EMPTY,
) -> DictConfig:
    """The checked config of a stage: its own recipe, on the pipeline's model and data."""
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise UserError(f"task.overrides.{name} must be a list of overrides such as [task.epochs=5], got {given}.")
    if fixed := [key for key in map(key_of, given) if key in (*GROUPS, *SET)]:
        raise UserError(f"task.overrides.{name}: {fixed[0]} is the pipeline's to set.")
    stage = alike(cfg, compose, name, given, choices)
    stage.seed = cfg.seed
    stage.output_dir = str(run / name)
    parent = parent_of(name, stages)
    stage.init = cfg.init if parent is None else str(run / parent)
    if stage.init is None and TASKS[name].needs_init:
        raise UserError(f"stage {name} has nothing to start from: let a stage pretrain come before, or give init=.")
    if name == "evaluate" and parent == "pretrain":
        raise UserError("stage evaluate needs a classifier: let a stage finetune or linprobe come before it.")
    try:
        return check_config(resolve(stage))
    except UserError as error:
        raise UserError("\n".join(f"stage {name}: {line}" for line in str(error).splitlines())) from error


def own_names(cfg: DictConfig, choices: Mapping[str, str]) -> list[str]:
    """The choices of groups whose files bear another name than `name:` in them, as overrides."""
    return [f"{group}={choices[group]}" for group in GROUPS if choices.get(group, cfg[group].name) != cfg[group].name]


def alike(
    cfg: DictConfig, compose: Compose, name: str, given: list[str], choices: Mapping[str, str] = EMPTY
) -> DictConfig:
    """Another task on the model, data, launcher and device of a config; not resolved yet."""
    same = [f"{group}={choices.get(group, cfg[group].name)}" for group in GROUPS]
    stage = compose([f"task={name}", *same, *given])
    OmegaConf.set_struct(stage, False)
    changed = set(map(key_of, given))
    for section in SHARED:
        for key, value in cfg[section].items():
            follows = section == "model" and key in FOLLOWS and f"data.{key}" in changed and value == cfg.data[key]
            if f"{section}.{key}" not in changed and not follows:
                stage[section][key] = value
    if cfg.wandb.job_type == cfg.task.name:
        stage.wandb.job_type = name
    stage.device, stage.tensorboard = cfg.device, cfg.tensorboard
    return stage


def pretraining(cfg: DictConfig, compose: Compose, choices: Mapping[str, str] = EMPTY) -> DictConfig:
    """The run that `init=auto` stands for: task=pretrain with the same model and data, whatever the seed."""
    checked = check_config(resolve(alike(cfg, compose, "pretrain", [], choices)))
    return with_values(checked, output_dir=str(run_directory(checked)))


def parent_of(name: str, stages: Sequence[str]) -> str | None:
    """The earlier stage whose weights a stage starts from, or None."""
    earlier = stages[: stages.index(name)]
    classifier = next((stage for stage in names(classifier=True) if stage in earlier), None)
    if name in ("evaluate", "export") and classifier is not None:
        return classifier
    return "pretrain" if "pretrain" in earlier and name != "pretrain" else None


def together(summaries: dict[str, Any]) -> dict[str, Any]:
    """One summary: sums, and the main result of each stage; top1 and the like are those of the last that has them."""
    total: dict[str, Any] = {"task": "pipeline"}
    for key in ("steps", "epochs", "images_seen", "seconds"):
        total[key] = sum(summary.get(key) or 0 for summary in summaries.values())
    seconds = total["seconds"]
    total["images_per_second"] = round(total["images_seen"] / seconds, 1) if seconds else None
    for name, summary in summaries.items():
        total |= {key: summary[key] for key in (*METRICS, "top5", "loss") if key in summary}
        if TASKS[name].trains:
            total["checkpoint"] = f"{name}/{summary['checkpoint']}"
    return total | {"stages": summaries}


def run_pipeline(run: Path, cfg: DictConfig, overrides: list[str], compose: Compose, start: Start, main: bool) -> int:
    """The pipeline of a config, with its summary written by the main process. Returns the exit code."""
    for override in overrides:
        if key_of(override).split(".")[0] in OWN:
            typed = shlex.quote(f"task.overrides.pretrain=[{QuotedString(override, Quote.double).with_quotes()}]")
            raise UserError(f"{override} belongs to a stage: give it to one, as in {typed}.")
    code, summary = call(pipeline, cfg.task, run, cfg, compose, start, chosen_groups(overrides))
    if summary is not None and main:
        write_text(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    return code
