"""Locks between processes: of single files, and of a whole run. No torch.

flock, where the file system has it: the kernel frees it when its process dies. Elsewhere a file that names its
holder, which is taken over where that process is gone from the same machine.
"""

import fcntl
import functools
import json
import logging
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from mae.errors import UserError

log = logging.getLogger(__name__)

_WARNED: set[int] = set()  # disks

RUN = ".run.lock"
HOLDER = ".run.holder.json"  # who holds it
ATTEMPT = "MAE_ATTEMPT"  # environment: see `mae.runs.attempt`
NAMING_S = 2.0  # within which the holder of a lock has written its name
ENDING_S = 10.0  # an older attempt of the same job ends itself within this time


@functools.cache
def flock_error(folder: Path) -> OSError | None:
    """Why files in a folder cannot be locked, or None where they can."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error
    return None


def file_lock(path: Path, timeout_s: float = -1, shared: bool = False) -> filelock.BaseFileLock:
    """A lock file's lock, to be entered or acquired; waits for `timeout_s` at most, below 0 for ever.

    `shared` gives the same object for the same path, so that one process may enter it several times.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if (error := flock_error(path.parent)) is None:
        return filelock.UnixFileLock(path, timeout_s, is_singleton=shared)
    if not shared and multiprocessing.parent_process() is None:
        _warn(path.parent.stat().st_dev, path.parent, error.strerror)
    return filelock.SoftFileLock(path.with_name(f"{path.name}.soft"), timeout_s, is_singleton=shared)


def _warn(disk: int, folder: Path, reason: str | None) -> None:
    """Once for each disk."""
    if disk not in _WARNED:
        _WARNED.add(disk)
        log.warning("%s has no file locks (%s): lock files named *.soft stand in for them", folder, reason)


def is_free(path: Path) -> bool:
    """Whether nobody holds a lock at this moment."""
    try:
        with file_lock(path, 0):
            return True
    except filelock.Timeout:
        return False


# ---------------------------------------------------------------- runs


@contextmanager
def held_run(run: Path) -> Iterator[None]:
    """Within, this process alone writes into a run's directory; it may enter several times.

    Raises UserError that says which other process does. An attempt of a job waits for an older one to end, and goes
    on beside one that does not: `mae.runs.attempt` keeps that one from writing.
    """
    lock = file_lock(run / RUN, 0, shared=True)
    attempt = os.environ.get(ATTEMPT)
    try:
        lock.acquire(ENDING_S if attempt else 0)
    except filelock.Timeout:
        other = present_holder(run)
        if attempt is None or other.get("attempt") is None:
            raise UserError(in_use(run, other, lock)) from None
        log.warning("an older attempt of this job (%s) is still alive on %s", other["attempt"], other.get("host"))
        yield
        return
    try:
        if lock.lock_counter == 1:
            (run / HOLDER).write_text(json.dumps(this_process()))
        yield
    finally:
        if lock.lock_counter == 1:
            (run / HOLDER).unlink(missing_ok=True)
        lock.release()


def this_process() -> dict[str, Any]:
    """Who holds a lock, as others shall read it."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "attempt": os.environ.get(ATTEMPT)}
    return about | {"job": os.environ.get("SLURM_JOB_ID")}


def holder(run: Path) -> dict[str, Any]:
    """Who holds a run's lock; empty where that is not readable."""
    try:
        about = json.loads((run / HOLDER).read_text())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def present_holder(run: Path) -> dict[str, Any]:
    """Who holds a run's lock now: one that has only just taken it may not have written its name yet."""
    about = holder(run)
    end = time.monotonic() + NAMING_S
    while time.monotonic() < end and not (about and (about.get("host") != socket.gethostname() or _alive(about))):
        time.sleep(0.05)
        about = holder(run)
    return about


def _alive(about: dict[str, Any]) -> bool:
    try:
        os.kill(int(about.get("pid", 0)), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def in_use(run: Path, other: dict[str, Any], lock: filelock.BaseFileLock) -> str:
    """Says who holds a run's lock, and what can be done."""
    job = f" (job {other['job']})" if other.get("job") else ""
    who = (
        f"process {other.get('pid')} on {other.get('host')}{job} has been running there since {other.get('since')}"
        if other
        else "another process is running there"
    )
    gone = ""
    if isinstance(lock, filelock.SoftFileLock) and other.get("host") != socket.gethostname():
        gone = f" Where that process is gone, remove {lock.lock_file}."
    return f"{run} is in use: {who}. Wait until it ends, or stop it; another output_dir= starts a second run.{gone}"
