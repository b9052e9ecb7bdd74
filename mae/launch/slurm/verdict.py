"""How an attempt of a job ended, and what becomes of the job."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mae.runs.checkpoints import MANIFEST, checkpoints_of, step_of
from mae.runs.failure import RunFailure
from mae.runs.files import write_json

INTERRUPTED = 130  # exit code of a process that was asked to stop
STOP_CAUSES = ("Terminated", "User defined signal 2", f"Exited with exit code {INTERRUPTED}")  # in srun's words


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job: 'finished', 'failed', or 'requeue'; and why."""

    action: str
    reason: str = ""


@dataclass(frozen=True)
class Ending:
    """What is known when all tasks of an attempt have ended."""

    finished: bool  # there is a summary
    failure: RunFailure | None
    stopped: bool  # a rank was asked to stop and has saved
    causes: Sequence[str]  # how tasks ended, in srun's words and order; 'CANCELLED' for the whole step
    left_first: bool  # a rank was asked to stop, and left, before the first error of another
    code: int  # srun's exit code
    advanced: bool  # the attempt wrote a checkpoint
    lost_node: str  # a node of the job that does not answer, or empty


def judge(end: Ending, requeues_left: int) -> Verdict:
    """An error of the run's own fails the job. An interruption requeues it, and so does a crash after progress."""
    if end.finished:
        return Verdict("finished")
    error = end.failure["error"] if end.failure is not None else None
    if end.failure is not None and not end.failure["lost_peer"]:
        return Verdict("failed", end.failure["error"])
    cause = [*end.causes, error or f"srun ended with exit code {end.code}"][0]
    if was_interrupted(end):
        reason = "it was asked to stop"
    elif end.lost_node:
        reason = f"node {end.lost_node} does not answer"
    elif end.advanced:
        reason = f"a task crashed ({cause}) after it had made progress"
    else:
        reason = error if error and "never came" in error else f"a task crashed: {cause}"
        return Verdict("failed", f"{reason} (no checkpoint was written since the job began, so it is not tried again)")
    if requeues_left <= 0:
        return Verdict("failed", f"{reason}, and launcher.max_requeues is used up")
    return Verdict("requeue", reason)


def was_interrupted(end: Ending) -> bool:
    """Whether the attempt ended because it was asked to stop.

    After a crash srun sends TERM to the other ranks too, so the first end decides. A rank that leaves before the others
    have begun to train is one that they lose as a peer.
    """
    crashes = [cause for cause in end.causes if cause not in ("CANCELLED", *STOP_CAUSES)]
    if not crashes:
        return end.stopped or bool(end.causes)
    left = end.left_first and all(cause.startswith("Exited") for cause in crashes)
    return left or end.causes[0] not in crashes


def newest_step(run: Path) -> int:
    """Step of the newest whole checkpoint; -1 where there is none."""
    return max((step_of(path) for path in checkpoints_of(run) if (path / MANIFEST).exists()), default=-1)


def cause_in(line: str) -> str:
    """How a task ended, from a line of srun; 'CANCELLED' where the whole step was; empty where it says neither."""
    if ended := re.search(r"\btasks? [\d,-]+: (.+?)(?: \(core dumped\))?\s*$", line):
        return ended[1]
    cancelled = r"\*\*\* (STEP|JOB) .*CANCELLED|Force Terminated|forcing job termination"
    return "CANCELLED" if re.search(cancelled, line) else ""


def write_verdict(run: Path, job: str, number: int, verdict: Verdict) -> None:
    """Leaves the verdict on attempt `number` of a job in the run's directory."""
    row = {"job": job, "attempt": number, "action": verdict.action, "reason": verdict.reason, "time": time.time()}
    write_json(run / "slurm" / "verdict.json", row)
