"""One trial of a search: a run in a process of its own, watched, and pruned where others are better."""

import ctypes
import logging
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import BaseFileLock, Timeout

from mae.config.overrides import assignment
from mae.distributed.signals import Interruption
from mae.errors import UserError
from mae.report.members import best_number, results_of
from mae.runs.files import read_json, read_json_lines
from mae.runs.locks import RUN as RUN_LOCK
from mae.runs.locks import file_lock, is_free
from mae.runs.summary import is_finished
from mae.tracking.jsonl import JsonLines

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

log = logging.getLogger(__name__)

POLL_S = 0.5  # between two reads of a running trial's metrics
PR_SET_PDEATHSIG = 1  # Linux: a signal for the child when its parent is gone


@dataclass(frozen=True)
class SearchSettings:
    """How a search runs."""

    trials: int  # that there are at the end, over all starts
    metric: str  # a key of summary.json; empty: the task's own
    seed: int  # of the sampler
    prune: bool
    first: tuple[str, ...] = ()  # values of the first trials, each as `KEY=VALUE KEY=VALUE`


def folder(directory: Path, number: int) -> Path:
    """The run of a trial."""
    return directory / f"trial_{number:04d}"


def try_lock(run: Path) -> BaseFileLock | None:
    """The acquired lock of a trial, or None where another worker holds it or its run still writes."""
    lock = file_lock(run / ".lock", 0)
    try:
        lock.acquire()
    except Timeout:
        return None
    if is_free(run / RUN_LOCK):
        return lock
    lock.release()
    return None


def run_trial(study: "Study", trial: "Trial", directory: Path, overrides: list[str], settings: SearchSettings) -> None:
    """Runs a trial to its end, or resumes it, and tells the study the result."""
    import optuna

    run = folder(directory, trial.number)
    log.info("trial %d: %s", trial.number, " ".join(overrides))
    pruned = watch_trial(run, trial, overrides, settings)
    summary = read_json(run / "summary.json")
    results = results_of(summary)
    value = best_number(results.get(settings.metric, summary.get(settings.metric)))
    if pruned:
        JsonLines(run).event("pruned: other trials were better at this point", None)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    elif value is not None:
        study.tell(trial, value)
        log.info("trial %d: %s %.4f", trial.number, settings.metric, value)
    else:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        if summary:
            numbers = {key for key, result in summary.items() if isinstance(result, int | float)}
            known = ", ".join(sorted(numbers | set(results)))
            raise UserError(f"trial {trial.number} has no {settings.metric}. --metric can be {known}.")
        log.warning("trial %d failed: see %s", trial.number, run / "log.txt")


def watch_trial(run: Path, trial: "Trial", overrides: list[str], settings: SearchSettings) -> bool:
    """Starts the run and reports its validations until it ends; returns whether it was pruned.

    Raises KeyboardInterrupt where the run was asked to stop; it has saved a checkpoint by then.
    """
    command = [sys.executable, "-m", "mae.cli", *overrides, assignment("output_dir", str(run))]
    with (run / "output.txt").open("a") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, preexec_fn=end_with_parent
        )
    key, reported, pruned = f"val/{settings.metric.removeprefix('val_')}", set(trial_steps(trial)), False
    with Interruption() as interruption:  # an exception could be lost in a callback of the database's client
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                if interruption.received:
                    process.terminate()
                    process.wait()
                    break
                for row in read_json_lines(run / "metrics.jsonl"):
                    if row.get(key) is not None and row["step"] not in reported:
                        reported.add(row["step"])
                        trial.report(row[key], row["step"])
                        if settings.prune and not pruned and trial.should_prune():
                            pruned = True
                            process.terminate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if interruption.received or process.returncode == 130 and not pruned:
        raise KeyboardInterrupt
    return pruned and not is_finished(run)


def trial_steps(trial: "Trial") -> list[int]:
    """Steps that an earlier worker has reported already."""
    frozen = trial.study.get_trials(deepcopy=False)[trial.number]
    return list(frozen.intermediate_values)


def end_with_parent() -> None:
    """Asks for SIGTERM when the search is killed, so that no trial continues without its worker."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
