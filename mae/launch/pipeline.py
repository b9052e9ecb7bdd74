"""Several tasks as one command: each stage is a run of its own, in a folder of the pipeline's run.

A finished stage is not run again; an interrupted one resumes. The pipeline runs where the command was typed, and hands
each stage to the launcher. It imports no torch.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from omegaconf import DictConfig

from mae.config.build import call
from mae.config.check import check_config, resolve, with_values
from mae.config.compose import chosen_groups
from mae.config.from_run import other_task, stage_command
from mae.config.identity import run_directory
from mae.config.overrides import assignment, key_of
from mae.config.saved import read_config
from mae.errors import UserError
from mae.launch.slurm.state import job_id
from mae.runs.summary import Summary, rate
from mae.tasks.registry import METRICS, TASKS, names
from mae.tracking.jsonl import JsonLines

FIXED = ("model", "data", "launcher", "task", "output_dir", "init", "resume")  # keys that a stage cannot override
EMPTY: Mapping[str, str] = {}
ENDS = {3: "diverged", 130: "interrupted"}  # exit code of a stage -> how it ended


@dataclass(frozen=True)
class PretrainKeys:
    """Keys of stage pretrain that stand in the pipeline, so that a sweep can name them. None: the stage's own."""

    mask_ratio: Annotated[float, "(0, 1)"] | list[Annotated[float, "(0, 1)"]] | None
    norm_pix_loss: bool | None
    epochs: Annotated[float, "(0, inf)"] | None
    augmentation: str | None

    def overrides(self) -> list[str]:
        """Those that are set, as overrides of the stage."""
        keys = {key: value for key, value in vars(self).items() if value is not None}
        return [f"{'' if key == 'augmentation' else 'task.'}{key}={value}" for key, value in keys.items()]


def run_pipeline(
    run: Path, cfg: DictConfig, overrides: list[str], launch: Callable[[DictConfig, list[str]], int], main: bool
) -> int:
    """Runs the pipeline of a config; the main process writes its summary. Returns the exit code."""
    code, summary = call(pipeline, cfg.task, run, cfg, launch, overrides)
    if summary is not None and main:
        summary.write(run)
    return code


def pipeline(
    run: Path,
    cfg: DictConfig,
    launch: Callable[[DictConfig, list[str]], int],
    typed: Sequence[str],
    *,
    stages: list[str],
    pretrain: PretrainKeys,
    overrides: dict,
) -> tuple[int, Summary | None]:
    """Runs the stages in order; returns the exit code, and the summary once all are finished.

    `launch` runs a checked config. `typed` is the command line, and `overrides` holds those of single stages.

    Raises UserError before the first stage starts where one of them is not possible.
    """
    choices = chosen_groups(typed)
    arguments = stage_arguments(stages=stages, pretrain=pretrain, overrides=overrides)
    configs = {name: stage_config(run, cfg, name, stages, arguments[name], choices) for name in stages}
    summaries: dict[str, Summary] = {}
    jobs: dict[str, str] = {}
    for number, (name, stage) in enumerate(configs.items(), start=1):
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"stage {number} of {len(configs)}: {name}\n")
        if job := jobs.get(parent_of(name, stages) or ""):
            stage = with_values(stage, launcher={**stage.launcher, "dependency": f"afterok:{job}"})
        with noting_failure(run, name):
            start = [] if stage.init is None else [assignment("init", stage.init)]
            code = launch(stage, stage_command(name, cfg, typed, [*start, *arguments[name]], "seed"))
        if code:
            note(run, f"{ENDS.get(code, 'failed')}: stage {name} ended with exit code {code}")
            return code, None
        if summary := Summary.read(run / name):
            summaries[name] = summary
        else:  # it waits in a queue, and so will the stages that start from it
            jobs[name] = job_id(run / name)
    return 0, None if jobs else combined(summaries)


@contextmanager
def noting_failure(run: Path, stage: str) -> Iterator[None]:
    """Notes in the pipeline's directory that a stage raised an error."""
    try:
        yield
    except Exception as error:
        note(run, f"failed: stage {stage}: {error}")
        raise


def note(run: Path, event: str) -> None:
    """An event of the pipeline itself: its state in tables follows from the last one."""
    if os.environ.get("RANK", "0") == "0":
        JsonLines(run).event(event, None)


def write_summary(run: str) -> None:
    """Writes the summary of a pipeline whose stages are finished: the program of its last job."""
    stages = {name: Summary.read(Path(run) / name) for name in read_config(Path(run)).task.stages}
    combined({name: summary for name, summary in stages.items() if summary is not None}).write(Path(run))


def combined(summaries: Mapping[str, Summary]) -> Summary:
    """One summary of all stages: sums, and each result of the last stage that has it."""
    images, seconds = (sum(getattr(s, key) or 0 for s in summaries.values()) for key in ("images_seen", "seconds"))
    results: dict[str, object] = {}
    for summary in summaries.values():
        results |= {key: summary.results[key] for key in (*METRICS, "top5", "loss") if key in summary.results}
    trained = [name for name in summaries if TASKS[name].trains]
    return Summary(
        task="pipeline",
        seconds=seconds,
        steps=sum(summary.steps for summary in summaries.values()),
        epochs=sum(summary.epochs for summary in summaries.values()),
        images_seen=images,
        images_per_second=rate(images, seconds),
        checkpoint=f"{trained[-1]}/{summaries[trained[-1]].checkpoint}" if trained else None,
        results=results | {"stages": {name: summary.to_json() for name, summary in summaries.items()}},
    )


# ---------------------------------------------------------------- configs of stages


def stage_arguments(*, stages: list[str], pretrain: PretrainKeys, overrides: dict) -> dict[str, list[str]]:
    """Stage -> its command line. Raises UserError where a key is of no stage, or no list."""
    if unknown := [name for name, arguments in overrides.items() if arguments and name not in stages]:
        raise UserError(f"task.overrides names {unknown[0]}, which is not among task.stages={list(stages)}.")
    if len(set(stages)) < len(stages) or not stages:
        raise UserError(f"task.stages must name each stage once, got {list(stages)}.")
    arguments = {name: overrides.get(name) or [] for name in stages}
    for name, words in arguments.items():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f'task.overrides.{name} must be a list of overrides as ["task.epochs=5"], got {words}.')
    if first := pretrain.overrides():
        if "pretrain" not in stages:
            key = first[0].partition("=")[0].removeprefix("task.")
            raise UserError(f"task.{key} is of stage pretrain, which is not among task.stages.")
        arguments["pretrain"] = [*first, *arguments["pretrain"]]
    return arguments


def stage_configs(cfg: DictConfig, choices: Mapping[str, str] = EMPTY) -> dict[str, DictConfig]:
    """Stage -> its config. Raises UserError where a stage of a pipeline's config is not possible."""
    stages, arguments = cfg.task.stages, call(stage_arguments, cfg.task)
    return {name: stage_config(run_directory(cfg), cfg, name, stages, arguments[name], choices) for name in stages}


def stage_config(
    run: Path,
    cfg: DictConfig,
    name: str,
    stages: Sequence[str],
    overrides: list[str],
    choices: Mapping[str, str] = EMPTY,
) -> DictConfig:
    """The checked config of a stage: its own recipe, on the pipeline's model and data."""
    if fixed := [key for key in map(key_of, overrides) if key in FIXED]:
        raise UserError(f"task.overrides.{name}: {fixed[0]} is the pipeline's to set.")
    stage = other_task(cfg, name, overrides, choices)
    stage.seed, stage.dry_run = cfg.seed, cfg.dry_run
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


def pretraining(cfg: DictConfig, choices: Mapping[str, str] = EMPTY) -> DictConfig:
    """The run that `init=auto` stands for: task=pretrain with the same model and data, whatever the seed."""
    checked = check_config(resolve(other_task(cfg, "pretrain", [], choices)))
    return with_values(checked, output_dir=str(run_directory(checked)))


def parent_of(name: str, stages: Sequence[str]) -> str | None:
    """The earlier stage whose weights a stage starts from, or None."""
    earlier = stages[: stages.index(name)]
    classifier = next((stage for stage in names(classifier=True) if stage in earlier), None)
    if name in ("evaluate", "export") and classifier is not None:
        return classifier
    return "pretrain" if "pretrain" in earlier and name != "pretrain" else None
