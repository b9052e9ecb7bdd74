"""Prepares a run's directory for a command: new, resumed, or after a failed start. Imports no torch."""

import os
import sys
import tempfile
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mae.config.identity import CHANGEABLE, difference, run_directory
from mae.config.paths import comparable, with_absolute_paths, write_typed
from mae.config.saved import read_config, write_config
from mae.errors import UserError
from mae.launch.slurm.state import live_jobs
from mae.runs.checkpoints import checkpoints_of
from mae.runs.file_system import full_disk
from mae.runs.files import read_json_lines, write_text
from mae.runs.layout import BAD_STEP
from mae.runs.summary import is_finished

FAILED = "failed"  # folder of a run for the files of starts that failed before the first checkpoint
FILES_OF_START = ("config.yaml", "overrides.yaml", "paths.yaml", "failure.json", "*.jsonl", "log*.txt", "report.html")


def make_directory(cfg: DictConfig) -> Path:
    """The run's directory, made where it is not there. Raises UserError where it cannot be written to."""
    run = run_directory(cfg).absolute()
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run) as probe:
            probe.write(b"a full disk shows here")
    except OSError as error:
        raise UserError(full_disk(error) or f"output_dir: {run} cannot be written to ({error.strerror}).") from error
    return run


def prepare(cfg: DictConfig, overrides: list[str]) -> Path:
    """Makes the run's directory, or enters it again, and writes `config.yaml` and `overrides.yaml` there.

    Raises UserError where it cannot be written to, or holds a run of another config.
    """
    run = make_directory(cfg)
    stored = run / "config.yaml"
    if stored.exists():
        changes = difference(comparable(read_config(run)), comparable(cfg))
        if not is_finished(run):
            changes = [line for line in changes if line.partition(":")[0] not in CHANGEABLE]
        if changes and failed_early(run):
            set_aside(run)
        elif changes:
            listed = "".join(f"\n  {line}" for line in changes)
            raise UserError(
                f"{run} holds a run of another config, which differs in:{listed}\n"
                "Choose another output_dir (for a sweep hydra.sweep.dir), or take these overrides back."
            )
    if is_finished(run):  # a finished run stays as it is
        return run
    cfg, typed = with_absolute_paths(cfg)
    write_typed(run, cfg, typed)
    write_config(run, cfg)
    write_text(run / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))
    if cfg.launcher.name != "slurm":  # where each attempt does so when it starts
        (run / "failure.json").unlink(missing_ok=True)
    return run


def failed_early(run: Path) -> bool:
    """Whether a run failed before its first checkpoint or result, and no job works on it."""
    stages = [path.parent for path in run.glob("*/config.yaml") if path.parent.name != BAD_STEP]
    failed = all(map(failed_early, stages)) if stages else (run / "failure.json").exists()
    if not failed or is_finished(run) or checkpoints_of(run):
        return False
    if any("loss" in row for row in read_json_lines(run / "metrics.jsonl")):
        return False
    return not live_jobs([run])


def set_aside(run: Path) -> None:
    """Moves the files of a failed start into a folder of the run, so that the corrected command starts afresh."""
    if os.environ.get("RANK", "0") != "0":  # torchrun's other ranks: the main one does it
        return
    number = 1 + sum(1 for _ in run.glob(f"{FAILED}/*"))
    folder = run / FAILED / str(number)
    folder.mkdir(parents=True)
    for pattern in FILES_OF_START:
        for path in run.glob(pattern):
            path.rename(folder / path.name)
    sys.stderr.write(f"{run} holds a start that failed before its first checkpoint: it is now in {folder}.\n")
