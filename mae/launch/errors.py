"""What a command prints for an error: a sentence or two for a user's mistake, and where to look for a bug."""

import re
import shlex
import signal
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from mae import limits
from mae.config.overrides import assignment, parsed
from mae.config.values import near
from mae.errors import DEBUG, UserError, bug_report, explain_bug, is_bug
from mae.runs.file_system import full_disk
from mae.runs.layout import LOG

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


class RankFailed(RuntimeError):
    """One of several processes of a run failed: which, and why."""

    def __init__(self, rank: int, failure: "ProcessFailure", run: Path):
        message, trace = failure.message, ""
        if isinstance(message, dict):
            trace = str(message.get("extraInfo", {}).get("py_callstack", ""))
            message = message.get("message", "")
        name = str(message).strip()  # as `TypeError: text`
        mistakes = ("UserError", *(kind.__name__ for kind in UserError.__subclasses__()))
        if name.startswith(tuple(f"{kind}: " for kind in mistakes)):
            super().__init__(name.split(": ", 1)[1])
            return
        if failure.exitcode < 0:
            name = f"it was killed by {signal.Signals(-failure.exitcode).name}"
        elif not trace:  # it left no error behind
            name = f"it exited with code {failure.exitcode}; its last output stands above or in its log"
        elif is_bug(name):
            name = trace if DEBUG else bug_report(name, trace, run / LOG)
        super().__init__(f"Process {rank} of the run failed: {name}")


def explain(error: BaseException) -> str:
    """An error in a plain sentence or two; that of a bug says where its traceback is."""
    text = str(error)
    if not isinstance(error, UserError) and (limit := limits.limit_reached(error)):
        return limit
    if full := full_disk(error):
        return text if isinstance(error, UserError) else full
    if isinstance(error, MissingConfigException):
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        known = [str(option) for option in error.options or []]
        listed = f" Choose one of {', '.join(sorted(known))}." if known else ""
        return f"{group}={choice} does not exist.{near(choice, known)}{listed}"
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override))
    if isinstance(error, ConfigCompositionException | OmegaConfBaseException):
        return _composition(text, error)
    if isinstance(error, UserError | RankFailed) or _raised_by_hydra(error):
        return text
    if isinstance(error, OSError):
        return f"{error.filename or 'A file'}: {error.strerror or error}."
    if getattr(error, "lost_peer", False):
        return f"Another process of the run is gone, or never came: {text.splitlines()[0]}"
    return explain_bug(error)


def _raised_by_hydra(error: BaseException) -> bool:
    """Whether Hydra itself refused the command line, such as two of its flags that exclude each other."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, ValueError) and bool(frames) and frames[-1].f_globals["__name__"].startswith("hydra.")


def _unreadable(override: str) -> str:
    """A sentence for an override that Hydra cannot read, with the right spelling where it has a key and a value."""
    advice = f"The override {override!r} cannot be read: write key=value, with quotes around spaces or = signs"
    key, _, value = override.partition("=")
    quotable = bool(value) and parsed(f"{key}=0") is not None and value[0] not in "[{('\""
    return f"{advice}, as {shlex.quote(assignment(key, value))}." if quotable else f"{advice}."


def _composition(text: str, error: BaseException) -> str:
    """One sentence for an error of Hydra or OmegaConf about a key that does not exist or cannot be set."""
    cause = error.__cause__ if error.__cause__ is not None else error
    override = re.search(r"[Cc]ould not override '([^']+)'", text)
    if override and "No match in the defaults list" in text:
        return f"{override[1]} is not a group of the configuration, or must be added as +{override[1]}=..."
    key = override[1] if override else str(getattr(cause, "full_key", "") or "")
    if key and "is not in struct" in text + str(cause):
        parent, _, name = key.rpartition(".")
        node = getattr(cause, "parent_node", None)
        known = [str(k) for k in node] if node is not None and hasattr(node, "keys") else []
        return f"{parent + '.' if parent else ''}{name} is not a key of the configuration.{near(name, known)}"
    if multiple := re.search(r"Multiple values for (\w+)\.", text):
        return f"{multiple[1]} is chosen already: write {multiple[1]}=... without the plus sign."
    return " ".join(line.strip() for line in text.splitlines() if line.strip())[:300]
