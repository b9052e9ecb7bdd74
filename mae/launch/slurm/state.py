"""What runs are at: by what SLURM says of their jobs, and by what their directories hold."""

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mae.launch.slurm import queue
from mae.launch.slurm.queue import Job
from mae.launch.slurm.verdict import read

SETTLE_S = 30  # a state that SLURM may still turn into a requeue is believed after so long
MAIN = ("top1", "knn", "val_loss", "loss")


def shown(path: Path) -> str:
    """A path as short as it can be typed."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def metric(run: Path) -> str:
    """The last number that a run is judged by."""
    summary = read(run / "summary.json")
    if summary is not None:
        name = next((name for name in MAIN if name in summary), None)
        return f"{name} {_number(summary[name])}" if name else ""
    path = run / "metrics.jsonl"
    for line in reversed(path.read_text(errors="replace").splitlines() if path.exists() else []):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut short
            continue
        name = next((k for k in row if k in ("loss", *(f"val/{m}" for m in MAIN))), None)
        if name:
            return f"{name} {_number(row[name])} at step {row['step']}"
    return ""


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else json.dumps(value)


def reason(run: Path) -> str:
    """Why a run failed, in a line, or nothing."""
    verdict, failure = read(run / "slurm" / "verdict.json"), read(run / "failure.json")
    if failure is not None and not failure["lost_peer"]:
        return f"rank {failure['rank']}: {failure['error']}"
    if verdict is not None and verdict["action"] in ("failed", "stopped"):
        return verdict["reason"]
    return failure["error"] if failure is not None else ""


def state(run: Path, job: Job | None) -> str:
    """A run's state in one word: what SLURM says while it says something, else what the run's files say."""
    if (run / "summary.json").exists():
        return "FINISHED"
    if job is not None and (job.alive or job.state in queue.PASSING):
        return job.state
    if reason(run) and (job is None or job.state in ("FAILED", "COMPLETED")):
        return "FAILED"
    if job is not None:
        return "FAILED" if job.state == "COMPLETED" else job.state  # completed without a summary is no success
    return "ENDED" if (run / "slurm" / "job.json").exists() else "UNFINISHED"


def asked(runs: Iterable[Path]) -> dict[Path, tuple[str, Job | None]]:
    """(job id, what SLURM says of it) of each run."""
    ids = {run: (read(run / "slurm" / "job.json") or {}).get("job", "") for run in runs}
    known = queue.jobs(name for name in ids.values() if name)
    return {run: (name, known.get(name)) for run, name in ids.items()}


def follow(runs: list[Path], poll_s: float) -> int:
    """Waits until all have ended, and says each change of state; 0 where all are finished.

    An end is believed once SLURM keeps saying it: a node's failure shows for a moment before the job is requeued.
    """
    said: dict[Path, str] = {}
    passing: dict[Path, float] = {}
    while True:
        going = False
        for run, (name, job) in asked(runs).items():
            now = state(run, job)
            if now != said.get(run):
                sys.stderr.write(f"{time.strftime('%H:%M:%S')} job {name} {shown(run)}: {now}\n")
                said[run] = now
                passing[run] = time.monotonic()
            unsure = job is None or job.state in (*queue.PASSING, "COMPLETED")  # whose summary may be slow to show
            settled = time.monotonic() - passing[run] > (SETTLE_S if unsure else 0)
            going |= now != "FINISHED" and ((job is not None and job.alive) or not settled)
        if not going:
            break
        time.sleep(poll_s)
    for run in runs:
        if said[run] != "FINISHED":
            sys.stderr.write(f"{shown(run)}: {said[run]}: {reason(run) or 'no reason is known'}\n")
    return 0 if set(said.values()) == {"FINISHED"} else 1
