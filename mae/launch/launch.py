"""Where a run runs: in this process, in several of this machine, or on a cluster."""

import contextlib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from mae.config.build import build, call
from mae.config.check import with_values
from mae.config.compose import chosen_groups
from mae.config.from_run import AUTO, stage_command, stands_for
from mae.config.overrides import pasted
from mae.config.paths import absolute
from mae.config.rules import missing_init
from mae.config.saved import read_config
from mae.errors import UserError
from mae.launch.local import inline, local
from mae.launch.pipeline import pretraining, run_pipeline, stage_configs
from mae.launch.prepare import make_directory, prepare
from mae.launch.slurm.settings import SlurmSettings
from mae.launch.slurm.state import job_id, typed_path
from mae.launch.slurm.submit import END, report_after, slurm, submit, submit_last
from mae.program import as_typed
from mae.runs.bad_step import read_replay
from mae.runs.files import read_json, read_json_lines
from mae.runs.layout import CONFIG, METRICS, SWEEP_RECORD
from mae.runs.locks import held_run
from mae.runs.summary import BEST_LAYER, LAYERS, Summary, is_finished
from mae.tasks import registry

log = logging.getLogger(__name__)

LAUNCHERS = {"local": local, "inline": inline, "slurm": slurm}


def check_init(cfg: DictConfig) -> None:
    """Raises UserError where a task has nothing to start from."""
    if problem := missing_init(cfg.task.name, cfg.init):
        raise UserError(problem)


def check_start(cfg: DictConfig, overrides: list[str]) -> None:
    """Raises UserError for what can be known before a run starts: an `init` that is missing, and a stage of a pipeline
    that is not possible."""
    check_init(cfg)
    if cfg.task.name == "pipeline":
        stage_configs(cfg, chosen_groups(overrides))


def launch(cfg: DictConfig, overrides: list[str]) -> int:
    """Runs the config with its launcher; returns the exit code."""
    check_init(cfg)
    if cfg.init == AUTO:
        cfg, code = after_pretraining(cfg, overrides)
        if code:
            return code
    main = os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as lock:
        if main and not queues(cfg):  # a job takes the lock when it starts
            lock.enter_context(held_run(make_directory(cfg)))
        run = prepare(cfg, overrides)
        if starts_processes(cfg):  # the first of which takes the lock
            lock.close()
        return run_prepared(run, cfg, overrides, main)


def starts_processes(cfg: DictConfig) -> bool:
    """Whether other processes than this one compute the run. A pipeline does not: each of its stages is launched."""
    several = cfg.launcher.name == "local" and cfg.launcher.processes > 1
    return several and "TORCHELASTIC_RUN_ID" not in os.environ and cfg.task.name != "pipeline"


def run_prepared(run: Path, cfg: DictConfig, overrides: list[str], main: bool) -> int:
    """Runs a prepared directory unless it is finished, and prints its closing lines; returns the exit code."""
    if is_finished(run):
        change = data_changed(run, cfg) or checkpoint_changed(run, cfg)
        another = "" if is_part(run) else "; another seed= or output_dir= starts a new one"
        sys.stderr.write(f"This run is finished already{another}.{change}\n")
    elif cfg.task.name == "pipeline":
        code = run_pipeline(run, cfg, overrides, launch, main)
        if not code and cfg.launcher.name == "slurm" and not is_finished(run):  # its stages are queued
            submit_last(run, [run / name for name in cfg.task.stages], call(SlurmSettings, cfg.launcher))
        if main:
            from mae.report.run import write_report

            write_report(run)
        if code:
            return code
    elif code := build(LAUNCHERS, cfg.launcher, run):
        return code
    if main and cfg.replay and cfg.launcher.name != "slurm":  # whose job has only been submitted
        sys.stdout.write(read_replay(run))
    summary = Summary.read(run)
    if main and summary is not None:
        sys.stdout.write(learning_line(run, summary) + closing_lines(run, summary))
    return 0


def is_part(run: Path) -> bool:
    """Whether a run is a stage of a pipeline or a member of a sweep, which end in closing lines of their own."""
    return any((run.parent / name).is_file() for name in (CONFIG, SWEEP_RECORD))


def data_changed(run: Path, cfg: DictConfig) -> str:
    """A sentence where a finished run read its images from another root than `data.root` names now."""
    before, now = read_config(run).data.root, cfg.data.root
    same = before == now or (before and now and absolute(before) == absolute(now))
    return "" if same else f" It read data.root={before}: for other images than those choose another output_dir."


def checkpoint_changed(run: Path, cfg: DictConfig) -> str:
    """A sentence where a finished run read another checkpoint than the one that `init` stands for now."""
    now = stands_for(cfg.init) if cfg.task.name in registry.names(needs_init=True, trains=False) else None
    summary = Summary.read(run)
    if now is None or summary is None:
        return ""
    read = Path(str(summary.checkpoint)).name
    if now.name == read or not read.startswith("step_"):
        return ""
    return f" It read {read}, and init={cfg.init} stands for {now.name} now: {pasted('init', str(now))} takes that."


def learning_line(run: Path, summary: Summary) -> str:
    """Whether a pre-training run is still learning, in a line; empty where that cannot be told, and of other tasks."""
    if registry.TASKS[summary.task].metric is not registry.VAL_LOSS:
        return ""
    from mae.report.trend import still_learning

    answer = still_learning(read_json_lines(run / METRICS))
    return f"Still learning? {answer}\n" if answer.startswith(("Yes", "No")) else ""


def closing_lines(run: Path, summary: Summary) -> str:
    """What to type next, and on the last line the main result and the run's directory."""
    keys = [key for key in registry.closing_keys() if key in summary.results]
    name, value = (keys[0], summary.results[keys[0]]) if keys else ("steps", summary.steps)
    if isinstance(value, dict):
        value = " ".join(f"{k}: {v:.2f}" for k, v in value.items())
    if isinstance(value, list):
        value = " ".join(value)
    result = f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
    if BEST_LAYER in summary.results:
        result += f" ({best_layer(summary.results)})"
    folder, commands = typed_path(run), registry.TASKS[summary.task].next_commands
    lines = [f"  {as_typed(command).replace('init=RUN', pasted('init', folder))}\n" for command in commands]
    return "".join(["Next:\n", *lines] if lines and not is_part(run) else [""]) + f"{result}  {folder}\n"


def best_layer(results: Mapping[str, object]) -> str:
    """Which layer's probe a run holds, as a fragment of a sentence."""
    layer, layers = results[BEST_LAYER], results[LAYERS]
    assert isinstance(layers, Mapping)
    return f"task.layer={'null' if layer is None else layer}, the best of {len(layers)} on the validation images"


def after_pretraining(cfg: DictConfig, overrides: list[str]) -> tuple[DictConfig, int]:
    """A config whose `init=auto` is replaced by its pre-training run; and the exit code of that run.

    The pre-training is launched where it is not finished. On a cluster the config waits for its job.
    """
    parent = pretraining(cfg, chosen_groups(overrides))
    run, cfg = Path(parent.output_dir), with_values(cfg, init=parent.output_dir)
    if is_finished(run):
        return cfg, 0
    sys.stderr.write(f"init=auto: pre-training comes first, in {run}\n")
    code = launch(parent, stage_command("pretrain", cfg, overrides, []))
    if not code and not is_finished(run):
        cfg = with_values(cfg, launcher={**cfg.launcher, "dependency": f"afterok:{job_id(run)}"})
    return cfg, code


# ---------------------------------------------------------------- sweeps on clusters


def queues(cfg: DictConfig) -> bool:
    """Whether a sweep submits a run together with its other members. A pipeline's stages are jobs of their own."""
    return cfg.launcher.name == "slurm" and cfg.task.name != "pipeline"


def report_pipelines(members: list[tuple[DictConfig, list[str]]]) -> None:
    """Queues the table of a sweep of pipelines on a cluster, for when the last job of each has ended."""
    queued = [(Path(cfg.output_dir).absolute(), cfg) for cfg, _ in members if cfg.launcher.name == "slurm"]
    ends = {run: read_json(run / END).get("job") for run, _ in queued if not is_finished(run)}
    jobs = [job for job in ends.values() if job]
    if jobs:
        folder = Path(os.path.commonpath(run.parent for run in ends))
        report_after(jobs, folder, call(SlurmSettings, queued[0][1].launcher))


def launch_sweep(members: list[tuple[DictConfig, list[str]]]) -> int:
    """Submits the members of a sweep, those of the same launcher settings as one job array; returns the exit code."""
    submissions = []
    for cfg, overrides in members:
        if cfg.init == AUTO:
            cfg, code = after_pretraining(cfg, overrides)
            if code:
                return code
        submissions.append((prepare(cfg, overrides), call(SlurmSettings, cfg.launcher)))
    return submit(submissions, Path(os.path.commonpath(run.parent for run, _ in submissions)))
