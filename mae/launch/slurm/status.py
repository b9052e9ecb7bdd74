"""`status=DIR`, `cancel=DIR`, `retry_failed=DIR`: the status of the runs of a directory, and their jobs."""

import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from mae.config.build import call
from mae.config.check import check_config, to_dict
from mae.config.overrides import by_key, parsed, pasted, values_of
from mae.config.saved import read_config, write_config
from mae.errors import UserError, is_bug
from mae.launch.slurm import queue, submit
from mae.launch.slurm.settings import SlurmSettings
from mae.launch.slurm.state import failure_reason, jobs_of, last_metric, live_jobs, run_state, typed_path
from mae.program import program
from mae.runs.failure import read_failure
from mae.runs.files import read_json
from mae.runs.layout import BAD_STEP, CONFIG
from mae.runs.summary import is_finished

VERBS = ("status", "cancel", "retry_failed")


def is_status_command(words: list[str]) -> bool:
    """Whether a command line is `VERB=DIR ...` and no run."""
    verb, _, directory = (words[0] if words else "").partition("=")
    return verb in VERBS and bool(directory)


def status_command(words: list[str]) -> int:
    """Runs `VERB=DIR ...`; returns the exit code. Raises UserError."""
    verb, folder = words[0].partition("=")[0], directory_of(words[0])
    if verb == "retry_failed":
        return retry_failed(folder, words[1:])
    if len(words) > 1:
        raise UserError(f"{words[0]} stands alone, but {' '.join(words[1:])} follows it.")
    sys.stdout.write(status_table(folder) if verb == "status" else cancel(folder))
    return 0


def directory_of(word: str) -> Path:
    """The directory of `VERB=DIR`, typed as it is or quoted for Hydra as everywhere else."""
    typed, override = word.partition("=")[2], parsed(word)
    if override is None or override.is_sweep_override() or Path(typed).exists():
        return Path(typed).absolute()
    return Path(str(values_of(override)[0])).absolute()


def runs_under(folder: Path) -> list[Path]:
    """The runs of a directory: itself, or the members of a sweep, or the stages of a pipeline. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory.")
    members = [path.parent for path in folder.glob("*/config.yaml") if path.parent.name != BAD_STEP]
    own = [folder] if (folder / "config.yaml").exists() and not members else []
    runs = own or [run for member in sorted(members, key=_in_order) for run in runs_under(member)]
    if not runs:
        raise UserError(f"{folder} holds no runs: no config.yaml lies in it or one folder below.")
    return runs


def _in_order(path: Path) -> list[tuple[int, int, str]]:
    """2 before 10, in names such as task.mask_ratio=0.5 too."""
    return [(0, int(text), "") if text.isdigit() else (1, 0, text) for text in re.split(r"(\d+)", path.name)]


def status_table(folder: Path) -> str:
    """A line a run: state, restarts, last metric, reason of a failure. Tracebacks of bugs follow."""
    rows, tracebacks = [("run", "job", "state", "restarts", "last metric", "reason")], ""
    for run, (name, job) in jobs_of(runs_under(folder)).items():
        verdict = read_json(run / "slurm" / "verdict.json")
        restarts = max(job.restarts if job else 0, verdict.get("attempt", 0))
        state = run_state(run, job)
        reason = failure_reason(run) if state not in ("FINISHED", "RUNNING") else ""
        if state == "PENDING" and job is not None:
            reason = reason or job.reason
        rows.append((typed_path(run), name or "-", state, str(restarts), last_metric(run), reason.partition("\n")[0]))
        failure = read_failure(run)
        if failure is not None and state == "FAILED" and is_bug(failure["error"]):  # else the reason says it all
            tracebacks += f"\n{typed_path(run)}: rank {failure['rank']} failed first\n{failure['traceback']}"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines) + tracebacks


def cancel(folder: Path) -> str:
    """Cancels the jobs that are queued or running; returns a message. Raises UserError."""
    alive = list(live_jobs(runs_under(folder)).values())
    if not alive:
        return f"Nothing under {folder} is queued or running.\n"
    if refusal := queue.cancel_jobs(alive):
        raise UserError(f"SLURM does not cancel {', '.join(alive)}: {refusal}")
    return f"Cancelled {', '.join(alive)}. The same command continues from the last checkpoint.\n"


def retry_failed(folder: Path, overrides: list[str]) -> int:
    """Submits again each run that is neither finished nor in the queue; returns the exit code.

    A stage of a pipeline waits for the one that it starts from. Runs keep their own config but for `launcher.*` of the
    overrides. Raises UserError.
    """
    changes = by_key(overrides)
    unread = [word for word in overrides if parsed(word) is None]
    refused = [str(change.input_line) for key, change in changes.items() if not key.startswith("launcher.")]
    if unread or refused:
        raise UserError(f"{(unread + refused)[0]} cannot be changed with retry_failed={folder}: only launcher.* can.")
    runs = runs_under(folder)
    alive = live_jobs(runs)
    failed = [run for run in runs if run not in alive and not is_finished(run)]
    if not failed:
        sys.stdout.write(f"Nothing under {folder} has failed.\n")
        return 0
    configs = {run: _changed(run, changes) for run in failed}
    jobs = dict(alive)
    for run, cfg in configs.items():
        write_config(run, cfg)  # where its ranks read what they do
    while failed:
        ready = [run for run in failed if Path(str(configs[run].init)) not in failed]
        if code := submit.submit([(run, _settings(configs[run], jobs)) for run in ready], folder):
            return code
        jobs |= live_jobs(ready)
        failed = [run for run in failed if run not in ready]
    for pipeline in sorted({run.parent for run in configs if (run.parent / CONFIG).is_file()}):
        stages = [run for run in runs if run.parent == pipeline]
        submit.submit_last(pipeline, stages, _settings(configs[next(run for run in stages if run in configs)], {}))
    return 0


def _changed(run: Path, changes: Mapping[str, Override]) -> DictConfig:
    """A run's config with other values of its launcher. Raises UserError where it did not run on SLURM."""
    changed = OmegaConf.create(to_dict(read_config(run)))
    for key, change in changes.items():
        OmegaConf.update(changed, key, values_of(change)[0], force_add=True)
    changed.launcher.dependency = None
    checked = check_config(changed)
    if checked.launcher.name != "slurm":
        command = f"{program()} {pasted('resume', str(run))}"
        raise UserError(f"{run} did not run on SLURM: {command} continues it.")
    return checked


def _settings(cfg: DictConfig, jobs: Mapping[Path, str]) -> SlurmSettings:
    """How a run is submitted: after the job of the run that it starts from, where that is one of `jobs`."""
    job = jobs.get(Path(str(cfg.init)))
    return dataclasses.replace(call(SlurmSettings, cfg.launcher), dependency=f"afterok:{job}" if job else None)
