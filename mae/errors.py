"""Errors of a user, and what a user reads of the others, which are bugs. Imports no torch."""

import builtins
import os
import re
import tempfile
import traceback
from pathlib import Path

DEBUG = os.environ.get("MAE_DEBUG") == "1"  # tracebacks are printed, for errors of users too
CODE = Path(__file__).parents[1]


class UserError(ValueError):
    """A mistake that a user can mend, in a sentence or two: what is wrong with its full key or file, then what to type.

    Every other exception is a bug of this program, or an error of the system (OSError).
    """


class Diverged(Exception):
    """Too many non-finite steps in a row, or a validation loss at the end that is not finite."""


def error_name(error: BaseException) -> str:
    """`TypeError: text`; the name of UserError for each class that derives from it."""
    return f"{'UserError' if isinstance(error, UserError) else type(error).__name__}: {error}"


def is_bug(name: str) -> bool:
    """Whether an error with such a name (`TypeError: text`), perhaps of another process, is a bug.

    Errors of the system are none, and torch's DistBackendError and the like are of networks and peers.
    """
    kind = getattr(builtins, name.partition(":")[0], None)
    return not name.startswith(("UserError:", "Dist")) and not (isinstance(kind, type) and issubclass(kind, OSError))


def bug_report(name: str, trace: str, path: Path) -> str:
    """What a user reads of a bug: the error, its last frame, and the file that holds its traceback."""
    frames = re.findall(r'^  File "(.+?)", line (\d+), in (\S+)', trace, re.MULTILINE)
    location = ""
    if frames:
        file, line, function = frames[-1]
        location = f" ({os.path.relpath(file, CODE) if file.startswith(f'{CODE}/') else file}:{line}, in {function})"
    return f"This is a bug: {name.splitlines()[0]}{location}. The traceback is in {path}; MAE_DEBUG=1 prints it."


def explain_bug(error: BaseException) -> str:
    """The report on a bug of this process, whose traceback it writes down where no run's log.txt holds it."""
    trace = "".join(traceback.format_exception(error))
    path = getattr(error, "traceback_file", None)
    if path is None:
        with tempfile.NamedTemporaryFile("w", prefix="mae-", suffix=".txt", delete=False) as file:
            file.write(trace)
        path = Path(file.name)
    return bug_report(error_name(error), trace, path)
