"""SLURM's commands: the state of jobs, and how to requeue or cancel them."""

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

# A job whose program runs: SLURM shows the last two for a moment while it sends a signal or changes the size
RUNNING = ("RUNNING", "SIGNALING", "RESIZING")
ALIVE = (*RUNNING, "PENDING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "STAGE_OUT")
ALIVE += ("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
# A user's variables that change what these commands print or ask
USER_VARIABLES = ("SINFO_", "SQUEUE_", "SACCT_", "SCONTROL_", "SCANCEL_", "SLURM_TIME_FORMAT")
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
    """(exit code, stdout, stderr) of a SLURM command; 124 after a timeout, 127 where there is no such command."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(USER_VARIABLES)}
    try:
        done = subprocess.run(
            words, text=True, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL, env=environment
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"{words[0]} did not answer within {seconds:g} s"
    except FileNotFoundError:
        return 127, "", f"there is no {words[0]} on the PATH"
    return done.returncode, done.stdout, done.stderr.strip()


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """Those of the jobs (12, or 12_3 of an array) that SLURM still knows: from accounting, then from the queue."""
    wanted = set(ids)
    if not wanted:
        return {}
    whole = ",".join(sorted({name.split("_")[0] for name in wanted}))
    known: dict[str, Job] = {}
    columns = ",".join(f"{name}:{width}" for name, width in COLUMNS.items())
    code, table, _ = command(
        "sacct", "--noheader", "--parsable2", "--allocations", "--jobs", whole, "-o", "JobID,State"
    )
    for line in table.splitlines() if code == 0 else []:
        name, _, state = line.partition("|")
        known[name] = Job(state.split()[0])  # "CANCELLED by 0"
    code, table, _ = command("squeue", "--noheader", "--array", "--states=all", f"--jobs={whole}", "-O", columns)
    for line in table.splitlines() if code == 0 else []:
        cells, start = [], 0
        for width in COLUMNS.values():
            cells.append(line[start : start + width].strip())
            start += width
        known[cells[0]] = Job(cells[1], int(cells[2] or 0), "" if cells[3] == "None" else cells[3])
    return {name: job for name, job in known.items() if name in wanted}


def field(job: str, name: str) -> str:
    """A field of `scontrol show job`, or empty."""
    _, text, _ = command("scontrol", "show", "job", "--oneliner", job)
    return next((word.split("=", 1)[1] for word in text.split() if word.startswith(f"{name}=")), "")


def requeue(job: str) -> str:
    """Requeues a job; returns SLURM's refusal, or empty. A job that waits already is no error."""
    code, _, error = command("scontrol", "requeue", job)
    return "" if code == 0 or "pending" in error.lower() else error


def cancel_jobs(ids: Iterable[str]) -> str:
    """Cancels jobs; returns SLURM's refusal, or empty."""
    code, _, error = command("scancel", *ids)
    return "" if code == 0 else error
