"""How an attempt of a job ended, and what becomes of the job."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae.config.check import write_text

ASKED = 130  # exit code of a process that was asked to stop
STOPPED = ("Terminated", "User defined signal 2", f"Exited with exit code {ASKED}")  # srun's words for such ends


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job: 'finished', 'failed', or 'requeue'; and why."""

    action: str
    reason: str = ""


@dataclass(frozen=True)
class Ending:
    """What is known when all tasks of an attempt have ended."""

    finished: bool  # there is a summary
    failure: Mapping[str, Any] | None  # the first error that a rank wrote down
    stopped: bool  # a rank was asked to stop and has saved
    causes: Sequence[str]  # srun's words for ends, in their order: 'Killed' for a task, 'CANCELLED' for the whole step
    left_first: bool  # a rank was asked to stop, and left, before the first error of another
    code: int  # srun's exit code
    advanced: bool  # a newer checkpoint than at the attempt's beginning
    lost_node: str  # a node of the job that does not answer, or nothing


def judge(end: Ending, requeues_left: int) -> Verdict:
    """Own faults fail at once; an interruption goes on; a crash goes on where it had made progress."""
    if end.finished:
        return Verdict("finished")
    if end.failure is not None and not end.failure["lost_peer"]:
        return Verdict("failed", end.failure["error"])
    if was_asked(end):
        verdict = Verdict("requeue", "it was asked to stop")
    else:
        told = [*end.causes, end.failure["error"] if end.failure else f"srun ended with exit code {end.code}"][0]
        if end.lost_node:
            verdict = Verdict("requeue", f"node {end.lost_node} does not answer")
        elif end.advanced:
            verdict = Verdict("requeue", f"a task crashed ({told}) after it had made progress")
        else:
            why = (
                end.failure["error"]
                if end.failure and "never came" in end.failure["error"]
                else f"a task crashed: {told}"
            )
            return Verdict("failed", f"{why} (no checkpoint was written since the job began, so it is not tried again)")
    if verdict.action == "requeue" and requeues_left <= 0:
        return Verdict("failed", f"{verdict.reason}, and launcher.max_requeues is used up")
    return verdict


def was_asked(end: Ending) -> bool:
    """Whether the attempt ended because it was told to. After a crash srun sends TERM to the other ranks too: what was
    first decides. A rank that left before the others had begun to train is one that they lose as a peer."""
    deaths = [cause for cause in end.causes if cause not in ("CANCELLED", *STOPPED)]
    if not deaths:
        return end.stopped or bool(end.causes)
    left = end.left_first and all(cause.startswith("Exited") for cause in deaths)
    return left or end.causes[0] not in deaths


def newest_step(run: Path) -> int:
    """Step of the newest whole checkpoint; -1 where there is none."""
    found = (run / "checkpoints").glob("step_*/manifest.json")
    return max((int(path.parent.name.removeprefix("step_")) for path in found), default=-1)


def read(path: Path) -> dict[str, Any] | None:
    """A file of JSON, or None where there is none or it is cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def cause_in(line: str) -> str:
    """How a task ended, in srun's words; 'CANCELLED' where the whole step was; nothing where a line says neither."""
    if ended := re.search(r"\btasks? [\d,-]+: (.+?)(?: \(core dumped\))?\s*$", line):
        return ended[1]
    return (
        "CANCELLED"
        if re.search(r"\*\*\* (STEP|JOB) .*CANCELLED|Force Terminated|forcing job termination", line)
        else ""
    )


def write_verdict(run: Path, job: str, number: int, action: str, reason: str) -> None:
    told = {"job": job, "attempt": number, "action": action, "reason": reason, "time": time.time()}
    write_text(run / "slurm" / "verdict.json", json.dumps(told))
