"""From the login node into the queue: one job with a task a GPU, or one array of such jobs for a sweep."""

import contextlib
import dataclasses
import hashlib
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mae.config.compose import CONF
from mae.config.overrides import pasted
from mae.errors import UserError
from mae.launch.slurm.check import check_cluster
from mae.launch.slurm.environment import outside_of_jobs
from mae.launch.slurm.job import SUPERVISE
from mae.launch.slurm.settings import SlurmSettings
from mae.launch.slurm.state import follow, live_jobs, typed_path
from mae.program import program
from mae.runs.failure import FAILURE
from mae.runs.files import write_json
from mae.runs.locks import held_run
from mae.runs.summary import is_finished

ROOT = Path(__file__).parents[3]  # the checkout, or where packages are installed
AFTER = "import sys; sys.path[0] = {code!r}; "
END = "slurm/end.json"  # of a pipeline: its last job
REPORT = "import runpy; sys.argv[1:] = [{folder!r}]; runpy.run_module('mae.sweep', run_name='__main__')"
LAST = "from mae.launch.pipeline import write_summary; from mae.report.run import write_report; "
LAST += "write_summary({run!r}); import pathlib; write_report(pathlib.Path({run!r}))"
CODE = ("mae", "conf", "sweeps", "run.py") if CONF.parent == ROOT else ("mae",)  # what a job runs

Submission = tuple[Path, SlurmSettings]  # a prepared run and how its job is submitted


def slurm(run: Path, *, settings: SlurmSettings) -> int:
    """Submits a run and prints how to follow it; the exit code is 0 once it is queued, with `wait` once it is finished.

    Raises UserError where the cluster cannot run it.
    """
    return submit([(run, settings)], run)


def submit(submissions: Sequence[Submission], folder: Path) -> int:
    """Queues prepared runs, those of the same settings as one array; returns the exit code.

    The jobs' own files lie under `folder/slurm`.
    """
    waiting = [run for run, _ in submissions if not is_finished(run)]
    with contextlib.ExitStack() as lock:
        if len(live_jobs(waiting)) < len(waiting):  # two commands at once would queue the rest twice
            lock.enter_context(held_run(folder))
        _enqueue_all(submissions, waiting, folder)
    settings = submissions[0][1]
    return follow([run for run, _ in submissions], settings.poll_s) if settings.wait else 0


def _enqueue_all(submissions: Sequence[Submission], waiting: list[Path], folder: Path) -> None:
    """Queues those of the runs that are neither finished nor in the queue."""
    queued = live_jobs(waiting)
    for run in queued:
        command = f"{program()} {pasted('cancel', typed_path(run))}"
        sys.stdout.write(f"{typed_path(run)} is in the queue already; {command} takes it out.\n")
    arrays: list[tuple[SlurmSettings, list[Path]]] = []
    for run, settings in submissions:
        if run in waiting and run not in queued:
            if all(settings != other for other, _ in arrays):
                arrays.append((settings, []))
            next(members for other, members in arrays if other == settings).append(run)
    for settings, members in arrays:
        check_cluster(settings, folder, members)
    jobs = []
    for settings, members in arrays:
        jobs.append(enqueue(members, folder, settings))
        sys.stdout.write(submission_message(jobs[-1], members, folder, settings))
    if jobs and folder not in waiting:
        report_after(jobs, folder, submissions[0][1])


def report_after(jobs: Sequence[str], folder: Path, settings: SlurmSettings) -> None:
    """Queues the job that makes table, figure and page of a sweep once all others have ended."""
    submit_after(f"afterany:{':'.join(jobs)}", REPORT.format(folder=str(folder)), folder, settings)


def submit_after(dependency: str, statement: str, folder: Path, settings: SlurmSettings) -> str:
    """Queues a small job that runs a statement, from the same code, once others have ended; returns its id."""
    code = snapshot(folder / "slurm" / "code")
    command = f"{_python(settings)} -c {shlex.quote(AFTER.format(code=str(code)) + statement)}"
    flags = {"nodes": 1, "ntasks_per_node": 1, "time": 60, "dependency": dependency, "kill-on-invalid-dep": "yes"}
    options = {"job_name": f"{folder.name}-end", "setup": settings.setup}
    return sbatch(command, folder / "slurm", flags | settings.placement(), options)


def submit_last(run: Path, stages: Sequence[Path], settings: SlurmSettings) -> None:
    """Queues the job that writes a pipeline's summary once its stages, which are queued, are finished."""
    if jobs := live_jobs(stages):
        job = submit_after(f"afterok:{':'.join(jobs.values())}", LAST.format(run=str(run)), run, settings)
        write_json(run / END, {"job": job})


def enqueue(runs: list[Path], folder: Path, settings: SlurmSettings) -> str:
    """Writes down what the job shall do and hands it to sbatch through submitit; returns its id."""
    code, array = snapshot(folder / "slurm" / "code"), len(runs) > 1
    submission = folder / "slurm" / f"submission_{secrets.token_hex(4)}.json"
    configs = {str(run): (run / "config.yaml").read_text() for run in runs}
    values = {"members": configs, "launcher": dataclasses.asdict(settings), "code": str(code)}
    write_json(submission, values)
    script = SUPERVISE.format(code=str(code), submission=str(submission))
    for run in runs:
        (run / "slurm").mkdir(exist_ok=True)
        for name in (FAILURE, "slurm/verdict.json"):  # of an earlier job
            (run / name).unlink(missing_ok=True)
    options = {"job_name": folder.name, "setup": settings.setup, "signal_delay_s": settings.signal_delay_s}
    if array:
        options |= {"map_count": len(runs), "array_parallelism": settings.array_parallelism}
    command = f"{_python(settings)} -u -c {shlex.quote(script)}"
    job = sbatch(command, folder / "slurm", settings.flags(), options)
    for index, run in enumerate(runs):
        entry = {"job": f"{job}_{index}" if array else job, "submitted": time.time(), "submission": str(submission)}
        write_json(run / "slurm" / "job.json", entry)
    return job


def _python(settings: SlurmSettings) -> str:
    """The interpreter of a job, as it is written in a shell."""
    return settings.python or shlex.quote(sys.executable)


def sbatch(command: str, folder: Path, flags: Mapping[str, object], options: Mapping[str, object]) -> str:
    """Submits a command with sbatch's flags and submitit's own options; returns the job's id.

    Raises UserError with SLURM's refusal.
    """
    import io

    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder)
    executor.parameters |= {"use_srun": False, "stderr_to_stdout": True, "additional_parameters": flags, **options}
    try:
        with outside_of_jobs(), contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return executor._submit_command(command).job_id  # without its worker: see mae/launch/slurm/job.py
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).splitlines() if line]
        raise UserError(f"SLURM refuses the job: {lines[-1] if lines else 'it gives no reason'}.") from error


def snapshot(folder: Path) -> Path:
    """A copy of the code as it is now, named by a digest of its contents: the code of a job never changes."""
    files = sorted(
        path
        for name in CODE
        for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    copy = folder / digest.hexdigest()[:12]
    if not copy.exists():
        temporary = folder / f".{copy.name}.{os.getpid()}"
        for path in files:
            target = temporary / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        temporary.rename(copy)
    return copy


def submission_message(job: str, runs: list[Path], folder: Path, settings: SlurmSettings) -> str:
    """What was submitted, and how to follow it."""
    nodes, tasks = settings.nodes, settings.tasks
    count = f"{len(runs)} jobs, {settings.array_parallelism} at a time, of " if len(runs) > 1 else ""
    size = f"{count}{nodes} node{'s' * (nodes > 1)} x {tasks} task{'s' * (tasks > 1)}"
    name, log = typed_path(folder), typed_path(runs[0] / "log.txt")
    lines = [f"Submitted job {job}: {size}"]
    if len(runs) == 1:
        logs = typed_path(runs[0] / "logs")
        lines += [f"  log      {log}, one a rank in {logs}/", f"  follow   tail -F {shlex.quote(log)}"]
    else:
        lines += [f"  log      log.txt of each member, as {log}"]
    lines += [
        f"  {verb:8} {program()} {pasted(key, name)}" for verb, key in (("state", "status"), ("cancel", "cancel"))
    ]
    return "\n".join(lines) + "\n"
