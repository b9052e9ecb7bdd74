"""`status=DIR`, `cancel=DIR`, `retry_failed=DIR`: what the runs under a directory are at, and what to do about it."""

import re
import sys
from pathlib import Path

from omegaconf import OmegaConf

from mae.config import check
from mae.config.check import ConfigError
from mae.config.overrides import by_key, parsed, pasted, values_of
from mae.launch.slurm import queue, submit
from mae.launch.slurm.state import asked, metric, reason, shown, state
from mae.launch.slurm.verdict import read

VERBS = ("status", "cancel", "retry_failed")


def is_asked(words: list[str]) -> bool:
    """Whether a command line is `VERB=DIR ...` and no run."""
    verb, _, directory = (words[0] if words else "").partition("=")
    return verb in VERBS and bool(directory)


def directory_of(word: str) -> Path:
    """The directory of `VERB=DIR`, typed as it is or quoted for Hydra as everywhere else."""
    typed, override = word.partition("=")[2], parsed(word)
    if override is None or override.is_sweep_override() or Path(typed).exists():
        return Path(typed).absolute()
    return Path(str(values_of(override)[0])).absolute()


def answer(words: list[str]) -> int:
    """Does what `VERB=DIR ...` asks for; returns the exit code. Raises ConfigError."""
    verb, folder = words[0].partition("=")[0], directory_of(words[0])
    if verb == "retry_failed":
        return retry_failed(folder, words[1:])
    if len(words) > 1:
        raise ConfigError(f"{words[0]} stands alone, but {' '.join(words[1:])} follows it.")
    sys.stdout.write(report(folder) if verb == "status" else cancel(folder))
    return 0


def runs_under(folder: Path) -> list[Path]:
    """The runs of a directory: itself, or the members of a sweep, or the stages of a pipeline. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a directory.")
    members = [path.parent for path in folder.glob("*/config.yaml")]
    own = [folder] if (folder / "config.yaml").exists() and not members else []
    found = own or [run for member in sorted(members, key=_in_order) for run in runs_under(member)]
    if not found:
        raise ConfigError(f"{folder} holds no runs: no config.yaml lies in it or one folder below.")
    return found


def _in_order(path: Path) -> list:
    """2 before 10, in names such as task.mask_ratio=0.5 too."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]


def report(folder: Path) -> str:
    """A line a run: state, restarts, last metric, and why it failed; the traceback of the first failure below."""
    rows, tracebacks = [("run", "job", "state", "restarts", "last metric", "reason")], ""
    for run, (name, job) in asked(runs_under(folder)).items():
        verdict = read(run / "slurm" / "verdict.json") or {}
        restarts = max(job.restarts if job else 0, verdict.get("attempt", 0))
        now = state(run, job)
        why = reason(run) if now not in ("FINISHED", "RUNNING") else ""
        if now == "PENDING" and job is not None:
            why = why or job.reason
        rows.append((shown(run), name or "-", now, str(restarts), metric(run), why.splitlines()[0] if why else ""))
        failure = read(run / "failure.json")
        if failure is not None and now == "FAILED":
            tracebacks += f"\n{shown(run)}: rank {failure['rank']} failed first\n{failure['traceback']}"
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return (
        "".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() + "\n" for r in rows)
        + tracebacks
    )


def cancel(folder: Path) -> str:
    """Takes what is queued or running out of the queue; returns what was done. Raises ConfigError."""
    alive = [name for name, job in asked(runs_under(folder)).values() if job is not None and job.alive]
    if not alive:
        return f"Nothing under {folder} is queued or running.\n"
    if refused := queue.cancel(alive):
        raise ConfigError(f"SLURM does not cancel {', '.join(alive)}: {refused}")
    return f"Cancelled {', '.join(alive)}. The same command goes on from the last checkpoint.\n"


def retry_failed(folder: Path, overrides: list[str]) -> int:
    """Submits again what is neither finished nor in the queue, from its own config, with `launcher.*` of the overrides
    changed. Returns the exit code. Raises ConfigError."""
    changes = by_key(overrides)
    unread = [word for word in overrides if parsed(word) is None]
    strange = [str(change.input_line) for key, change in changes.items() if not key.startswith("launcher.")]
    if unread or strange:
        raise ConfigError(f"{(unread + strange)[0]} cannot be changed with retry_failed={folder}: only launcher.* can.")
    failed = [
        run
        for run, (_, job) in asked(runs_under(folder)).items()
        if not (run / "summary.json").exists() and not (job is not None and job.alive)
    ]
    if not failed:
        sys.stdout.write(f"Nothing under {folder} has failed.\n")
        return 0
    again = []
    for run in failed:
        changed = OmegaConf.create(check.plain(check.read(run)))
        for key, change in changes.items():
            OmegaConf.update(changed, key, values_of(change)[0], force_add=True)
        changed.launcher.dependency = None
        settings = check.check(changed).launcher
        if settings.name != "slurm":
            raise ConfigError(
                f"{run} did not run on SLURM: python run.py {pasted('resume', str(run))} goes on with it."
            )
        again.append((run, settings))
    return submit.submit(again, folder)
