"""Where a run runs: in this process, in several of this machine, or on a cluster."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mae.config.build import build, call
from mae.config.check import with_values
from mae.config.compose import chosen_groups, composed
from mae.config.from_run import stands_for
from mae.config.overrides import pasted
from mae.config.paths import absolute
from mae.config.rules import missing_init
from mae.config.saved import read_config
from mae.errors import UserError
from mae.launch.local import inline, local
from mae.launch.pipeline import own_names, pretraining, run_pipeline
from mae.launch.prepare import make_directory, prepare
from mae.launch.slurm.settings import SlurmSettings
from mae.launch.slurm.submit import slurm, submit, submit_last
from mae.runs.locks import held_run
from mae.tasks import registry

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- launchers


AUTO = "auto"  # as init: the pretrained weights that this program makes itself


def launch(cfg: DictConfig, overrides: list[str]) -> int:
    """Runs the config where its launcher says; returns the exit code."""
    if problem := missing_init(cfg.task.name, cfg.init):
        raise UserError(problem)
    if cfg.init == AUTO:
        cfg, code = after_pretraining(cfg, overrides)
        if code:
            return code
    first = os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as lock:
        if first and not queues(cfg):  # whose jobs take it as they begin
            lock.enter_context(held_run(make_directory(cfg)))
        run = prepare(cfg, overrides)
        if starts_processes(cfg):  # the first of which takes it
            lock.close()
        return start(run, cfg, overrides, first)


def starts_processes(cfg: DictConfig) -> bool:
    """Whether a run is computed by other processes than this one. Those of a pipeline's stages come back here."""
    several = cfg.launcher.name == "local" and cfg.launcher.processes > 1
    return several and "TORCHELASTIC_RUN_ID" not in os.environ and cfg.task.name != "pipeline"


def start(run: Path, cfg: DictConfig, overrides: list[str], first: bool) -> int:
    """Runs what a prepared directory holds, unless it is finished; returns the exit code."""
    summary = run / "summary.json"
    if not summary.exists():
        if cfg.task.name == "pipeline":  # each of whose stages comes back here
            code = run_pipeline(run, cfg, overrides, composed, launch, first)
            if not code and not summary.exists():  # its stages are queued
                submit_last(run, [run / name for name in cfg.task.stages], call(SlurmSettings, cfg.launcher))
            if first:
                from mae.report import run as report

                report.write(run)
        else:
            code = build(LAUNCHERS, cfg.launcher, run)
        if code or not summary.exists():
            return code
        told = json.loads(summary.read_text())
    else:
        told = json.loads(summary.read_text())
        news = moved(run, cfg) or outdated(cfg, told)
        sys.stderr.write(f"This run is finished already; another seed= or output_dir= starts a new one.{news}\n")
    if first:
        sys.stdout.write(closing_lines(run, told))
    return 0


def moved(run: Path, cfg: DictConfig) -> str:
    """A sentence where a finished run read its images from another place than is named now, which may have moved."""
    before, now = read_config(run).data.root, cfg.data.root
    same = before == now or (before and now and absolute(before) == absolute(now))
    return "" if same else f" It read data.root={before}: for other images than those choose another output_dir."


def outdated(cfg: DictConfig, summary: Mapping[str, Any]) -> str:
    """A sentence where a finished run read another checkpoint than the one that `init` stands for now."""
    now = stands_for(cfg.init) if cfg.task.name in registry.names(needs_init=True, trains=False) else None
    read = Path(str(summary.get("checkpoint")))
    if now is None or now.name == read.name or not read.name.startswith("step_"):
        return ""
    return (
        f" It read {read.name}, and init={cfg.init} stands for {now.name} now: {pasted('init', str(now))} takes that."
    )


def after_pretraining(cfg: DictConfig, overrides: list[str]) -> tuple[DictConfig, int]:
    """A config whose `init=auto` names a finished pre-training, made first where there is none, or on a cluster one
    that is queued and waited for; and the exit code of that."""
    choices = chosen_groups(overrides)
    parent = pretraining(cfg, composed, choices)
    made, cfg = Path(parent.output_dir), with_values(cfg, init=parent.output_dir)
    if (made / "summary.json").exists():
        return cfg, 0
    sys.stderr.write(f"init=auto: pre-training comes first, in {made}\n")
    code = launch(parent, ["task=pretrain", *own_names(cfg, choices)])
    if not code and not (made / "summary.json").exists():
        job = json.loads((made / "slurm" / "job.json").read_text())["job"]
        cfg = with_values(cfg, launcher={**cfg.launcher, "dependency": f"afterok:{job}"})
    return cfg, code


# ---------------------------------------------------------------- clusters


def queues(cfg: DictConfig) -> bool:
    """Whether a run is one that a sweep submits together with its others."""
    return cfg.launcher.name == "slurm" and cfg.task.name != "pipeline"  # whose stages are jobs of their own


def launch_sweep(members: list[tuple[DictConfig, list[str]]]) -> int:
    """Submits the members of a sweep as one job array (one for each choice of launcher settings); the exit code."""
    submissions = []
    for cfg, overrides in members:
        if cfg.init == AUTO:
            cfg, code = after_pretraining(cfg, overrides)
            if code:
                return code
        submissions.append((prepare(cfg, overrides), call(SlurmSettings, cfg.launcher)))
    return submit(submissions, Path(os.path.commonpath(run.parent for run, _ in submissions)))


LAUNCHERS = {"local": local, "inline": inline, "slurm": slurm}


def closing_lines(run: Path, summary: Mapping[str, Any]) -> str:
    """What to do next, and on the last line the main result and the run's directory."""
    shown = os.path.relpath(run)
    shown = str(run) if shown.startswith("..") else shown
    name, value = next(
        ((key, summary[key]) for key in registry.closing_keys() if key in summary),
        ("steps", summary.get("steps")),
    )
    if isinstance(value, dict):
        value = " ".join(f"{k}: {v:.2f}" for k, v in value.items())
    if isinstance(value, list):
        value = " ".join(value)
    result = f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
    commands = registry.TASKS[summary["task"]].next_commands
    lines = [f"  {line.replace('init=RUN', pasted('init', shown))}" for line in commands]
    return "\n".join(["Next:", *lines] if lines else []) + f"\n{result}  {shown}\n"
