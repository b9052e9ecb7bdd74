"""One trial of a search: a run in a process of its own, watched, and ended early where it is not worth its time."""

import ctypes
import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, Timeout

from mae.config.overrides import assignment
from mae.runs.files import read_json_lines
from mae.runs.locks import RUN as RUN_LOCK
from mae.runs.locks import file_lock, is_free
from mae.tracking.jsonl import JsonLines

log = logging.getLogger(__name__)

RUN = Path(__file__).parents[2] / "run.py"
LOOK_S = 0.5  # between two looks at a running trial's metrics
PR_SET_PDEATHSIG = 1  # Linux: a signal for the child when its parent is gone


def folder(directory: Path, number: int) -> Path:
    """The run of a trial."""
    return directory / f"trial_{number:04d}"


def try_lock(run: Path) -> BaseFileLock | None:
    """The acquired lock of a trial, or None where another worker holds it, or a run that one left behind goes on."""
    lock = file_lock(run / ".lock", 0)
    try:
        lock.acquire()
    except Timeout:
        return None
    if is_free(run / RUN_LOCK):
        return lock
    lock.release()
    return None


def run(study: Any, trial: Any, directory: Path, overrides: list[str], metric: str, prune: bool) -> None:
    """Runs a trial to its end, or goes on with it, and tells the study how it went."""
    import optuna

    place = folder(directory, trial.number)
    log.info("trial %d: %s", trial.number, " ".join(overrides))
    pruned = watch(place, trial, overrides, metric, prune)
    summary = json.loads((place / "summary.json").read_text()) if (place / "summary.json").exists() else {}
    if pruned:
        JsonLines(place).event("pruned: other trials were better at this point", None)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    elif isinstance(summary.get(metric), int | float):
        study.tell(trial, summary[metric])
        log.info("trial %d: %s %.4f", trial.number, metric, summary[metric])
    else:
        log.warning("trial %d failed: see %s", trial.number, place / "log.txt")
        study.tell(trial, state=optuna.trial.TrialState.FAIL)


def watch(place: Path, trial: Any, overrides: list[str], metric: str, prune: bool) -> bool:
    """Starts the run and reports its validations until it ends; whether it was pruned.

    Raises KeyboardInterrupt where we are asked to stop; the run has saved a checkpoint by then.
    """
    command = [sys.executable, str(RUN), *overrides, assignment("output_dir", str(place))]
    with (place / "output.txt").open("a") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, preexec_fn=end_with_parent
        )
    key, told, pruned = f"val/{metric.removeprefix('val_')}", set(trial_steps(trial)), False
    try:
        while process.poll() is None:
            time.sleep(LOOK_S)
            for row in read_json_lines(place / "metrics.jsonl"):
                if row.get(key) is not None and row["step"] not in told:
                    told.add(row["step"])
                    trial.report(row[key], row["step"])
                    if prune and not pruned and trial.should_prune():
                        pruned = True
                        process.terminate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode == 130 and not pruned:
        raise KeyboardInterrupt
    return pruned and not (place / "summary.json").exists()


def trial_steps(trial: Any) -> list[int]:
    """Steps that an earlier worker has reported already."""
    frozen = trial.study.get_trials(deepcopy=False)[trial.number]
    return list(frozen.intermediate_values)


def end_with_parent() -> None:
    """Asks for SIGTERM when the search is killed, so that no trial goes on without its worker."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
