"""What SLURM says of jobs, and what it is asked to do with them."""

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

ALIVE = (
    "PENDING",
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "STOPPED",
    "RESIZING",
)
# A user's wishes for what these commands show and ask, where we read their words
SHOWN = ("SINFO_", "SQUEUE_", "SACCT_", "SCONTROL_", "SCANCEL_", "SLURM_TIME_FORMAT")
# SLURM shows these for a moment before it requeues the job by itself
PASSING = ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED")
COLUMNS = {"JobArrayID": 40, "State": 20, "RestartCnt": 12, "Reason": 80}


@dataclass(frozen=True)
class Job:
    """A job, or a member of an array, as SLURM sees it now."""

    state: str
    restarts: int = 0
    reason: str = ""

    @property
    def alive(self) -> bool:
        return self.state in ALIVE


def command(*words: str, seconds: float = 60) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a SLURM command; 124 where it does not answer, 127 where there is none."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(SHOWN)}
    try:
        told = subprocess.run(
            words, text=True, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL, env=environment
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"{words[0]} did not answer within {seconds:g} s"
    except FileNotFoundError:
        return 127, "", f"there is no {words[0]} on the PATH"
    return told.returncode, told.stdout, told.stderr.strip()


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """Those of the jobs (12, or 12_3 of an array) that SLURM still knows: the queue first, then accounting."""
    wanted = set(ids)
    whole = ",".join(sorted({one.split("_")[0] for one in wanted}))
    if not wanted:
        return {}
    found: dict[str, Job] = {}
    columns = ",".join(f"{name}:{width}" for name, width in COLUMNS.items())
    code, told, _ = command("sacct", "--noheader", "--parsable2", "--allocations", "--jobs", whole, "-o", "JobID,State")
    for line in told.splitlines() if code == 0 else []:
        name, _, state = line.partition("|")
        found[name] = Job(state.split()[0])  # "CANCELLED by 0"
    code, told, _ = command("squeue", "--noheader", "--array", "--states=all", f"--jobs={whole}", "-O", columns)
    for line in told.splitlines() if code == 0 else []:
        cells, begin = [], 0
        for width in COLUMNS.values():
            cells.append(line[begin : begin + width].strip())
            begin += width
        found[cells[0]] = Job(cells[1], int(cells[2] or 0), "" if cells[3] == "None" else cells[3])
    return {name: job for name, job in found.items() if name in wanted}


def field(job: str, name: str) -> str:
    """A field of `scontrol show job`, or nothing."""
    _, told, _ = command("scontrol", "show", "job", "--oneliner", job)
    return next((word.split("=", 1)[1] for word in told.split() if word.startswith(f"{name}=")), "")


def requeue(job: str) -> str:
    """Puts a job back into the queue; returns why it could not be, or nothing. One that waits already is fine."""
    code, _, error = command("scontrol", "requeue", job)
    return "" if code == 0 or "pending" in error.lower() else error


def cancel(ids: Iterable[str]) -> str:
    """Cancels jobs; returns why it could not be, or nothing."""
    code, _, error = command("scancel", *ids)
    return "" if code == 0 else error
