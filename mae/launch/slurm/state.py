"""The state of runs, from what SLURM says of their jobs and from the files in their directories."""

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from mae.launch.slurm import queue
from mae.launch.slurm.queue import Job
from mae.runs.failure import failure_report, read_failure
from mae.runs.files import read_json, read_json_lines
from mae.runs.summary import is_finished
from mae.tasks.registry import METRICS

SETTLE_S = 30  # a state that SLURM may still turn into a requeue counts after this time
RESULTS = (*METRICS, "loss")  # of which the first one present is shown


def typed_path(path: Path) -> str:
    """A path as short as it can be typed."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def last_metric(run: Path) -> str:
    """The main result of a finished run, or the last loss or main metric of another."""
    if summary := read_json(run / "summary.json"):
        name = next((name for name in RESULTS if name in summary), None)
        return f"{name} {_rounded(summary[name])}" if name else ""
    for row in reversed(read_json_lines(run / "metrics.jsonl")):
        name = next((k for k in row if k in ("loss", *(f"val/{m}" for m in RESULTS))), None)
        if name:
            return f"{name} {_rounded(row[name])} at step {row['step']}"
    return ""


def _rounded(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else json.dumps(value)


def failure_reason(run: Path) -> str:
    """Why a run failed, in a line, or empty."""
    verdict, failure = read_json(run / "slurm" / "verdict.json"), read_failure(run)
    if failure is not None and not failure["lost_peer"]:
        return f"rank {failure['rank']}: {failure_report(run, failure)}"
    if verdict and verdict["action"] in ("failed", "stopped"):
        return verdict["reason"]
    return failure["error"] if failure is not None else ""


def run_state(run: Path, job: Job | None) -> str:
    """A run's state in one word: SLURM's while it knows the job, else by the run's files."""
    if is_finished(run):
        return "FINISHED"
    if job is not None and (job.alive or job.state in queue.PASSING):
        return job.state
    if failure_reason(run) and (job is None or job.state in ("FAILED", "COMPLETED")):
        return "FAILED"
    if job is not None:
        return "FAILED" if job.state == "COMPLETED" else job.state  # completed without a summary is no success
    return "ENDED" if (run / "slurm" / "job.json").exists() else "UNFINISHED"


def job_id(run: Path) -> str:
    """The id of a run's job; empty where it was never submitted."""
    return read_json(run / "slurm" / "job.json").get("job", "")


def jobs_of(runs: Iterable[Path]) -> dict[Path, tuple[str, Job | None]]:
    """(job id, its state on SLURM) of each run."""
    ids = {run: job_id(run) for run in runs}
    known = queue.jobs(name for name in ids.values() if name)
    return {run: (name, known.get(name)) for run, name in ids.items()}


def live_jobs(runs: Iterable[Path]) -> dict[Path, str]:
    """Those of the runs whose job is queued or running, with its id."""
    return {run: name for run, (name, job) in jobs_of(runs).items() if job is not None and job.alive}


def follow(runs: list[Path], poll_s: float) -> int:
    """Waits until all runs have ended and prints each change of state; 0 where all are finished.

    An end counts once SLURM keeps showing it: a node's failure shows for a moment before the job is requeued.
    """
    states: dict[Path, str] = {}
    since: dict[Path, float] = {}
    waiting = True
    while waiting:
        waiting = False
        for run, (name, job) in jobs_of(runs).items():
            state = run_state(run, job)
            if state != states.get(run):
                sys.stderr.write(f"{time.strftime('%H:%M:%S')} job {name} {typed_path(run)}: {state}\n")
                states[run], since[run] = state, time.monotonic()
            unsure = job is None or job.state in (*queue.PASSING, "COMPLETED")  # whose summary may be slow to show
            settled = time.monotonic() - since[run] > (SETTLE_S if unsure else 0)
            waiting |= state != "FINISHED" and ((job is not None and job.alive) or not settled)
        if waiting:
            time.sleep(poll_s)
    for run, state in states.items():
        if state != "FINISHED":
            sys.stderr.write(f"{typed_path(run)}: {state}: {failure_reason(run) or 'no reason is known'}\n")
    return 0 if set(states.values()) == {"FINISHED"} else 1
