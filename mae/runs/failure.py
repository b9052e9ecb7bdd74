"""`failure.json`: the first error of the newest attempt of a run. Imports no torch."""

import contextlib
import json
import logging
import os
import time
import traceback
from pathlib import Path
from typing import TypedDict

from mae.errors import bug_report, error_name, is_bug
from mae.runs import attempt
from mae.runs.files import read_json
from mae.runs.layout import FAILURE, LOG

log = logging.getLogger(__name__)


class RunFailure(TypedDict):
    """What the file holds."""

    rank: int
    error: str  # type and message
    lost_peer: bool  # it only says that another rank was gone, whose own error takes its place
    time: float
    attempt: str | None
    traceback: str


def read_failure(run: Path) -> RunFailure | None:
    """The first error, or None where there is none or its file is cut short."""
    values = read_json(run / FAILURE)
    return RunFailure(**values) if values else None


def failure_report(run: Path, failure: RunFailure) -> str:
    """What a user reads of a failure: the sentence of a user's error, a report on a bug."""
    error = failure["error"]
    if is_bug(error) and not failure["lost_peer"]:
        return bug_report(error, failure["traceback"], run / LOG)
    return error.removeprefix("UserError: ")


def write_failure(run: Path, rank: int, error: BaseException, lost_peer: bool = False) -> None:
    """Adds the error being handled to the run's log.txt, and leaves it as `failure.json` where it is the first.

    Never raises: a full disk must not hide the error itself. An attempt that a newer one has replaced writes nothing.
    """
    if not attempt.holds(run):
        return
    failure = RunFailure(
        rank=rank,
        error=error_name(error),
        lost_peer=lost_peer,
        time=time.time(),
        attempt=os.environ.get(attempt.NAME),
        traceback=traceback.format_exc(),
    )
    try:
        with (run / LOG).open("a") as file:
            file.write(f"rank {rank} failed\n{failure['traceback']}")
        error.__dict__.update(traceback_file=run / LOG, lost_peer=lost_peer)  # for what the command prints
        first = read_failure(run)
        if not lost_peer and first is not None and first["lost_peer"]:
            (run / FAILURE).unlink()
        with contextlib.suppress(FileExistsError), (run / FAILURE).open("x") as file:
            json.dump(failure, file)
    except OSError:
        log.warning("log.txt cannot be written to")
