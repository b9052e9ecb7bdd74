"""Which attempt may write into a run: the newest one alone.

A job that SLURM starts again may run beside its own older attempt, where only the daemon of a node died. Each
attempt writes its name into the run as it begins; what commits something asks first, and an attempt that
finds another name there stops.
"""

import os
import threading
import time
from pathlib import Path

from mae.runs.files import replacing

NAME = "MAE_ATTEMPT"  # environment: the attempt of this process; absent where nothing starts a run again by itself


class Superseded(RuntimeError):
    """A newer attempt has taken over the run: this one writes nothing any more."""


def claim(run: Path, attempt: str) -> None:
    """From now on this attempt alone may write into the run."""
    path = run / "slurm" / "attempt"
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(attempt)


def holds(run: Path) -> bool:
    """Whether this process belongs to the run's newest attempt. Opens the file, so that NFS gives no old copy."""
    mine = os.environ.get(NAME)
    if mine is None:
        return True
    try:
        return (run / "slurm" / "attempt").read_text() == mine
    except OSError:  # storage that is away for a moment
        return True


def check(run: Path) -> None:
    """Raises Superseded where another attempt has taken over."""
    if not holds(run):
        raise Superseded(f"A newer attempt has taken over {run}; this one ({os.environ.get(NAME)}) stops.")


def watch(run: Path, every_s: float = 1.0) -> None:
    """Ends this process, whatever it is blocked in, once another attempt has taken over."""

    def look() -> None:
        while holds(run):
            time.sleep(every_s)
        os._exit(1)

    threading.Thread(target=look, daemon=True, name="fence").start()
