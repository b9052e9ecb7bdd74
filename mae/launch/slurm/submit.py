"""From the login node into the queue: one job with a task a GPU, or one array of such jobs for a sweep."""

import contextlib
import hashlib
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf

from mae.config.check import ConfigError
from mae.config.overrides import pasted
from mae.launch.slurm.check import check, tasks_per_node
from mae.launch.slurm.environment import outside_of_jobs
from mae.launch.slurm.job import SUPERVISE
from mae.launch.slurm.state import asked, follow, shown
from mae.runs.locks import held_run

ROOT = Path(__file__).parents[3]
AFTER = "import sys; sys.path[0] = {code!r}; "
REPORT = "import runpy; sys.argv[1:] = [{folder!r}]; runpy.run_module('mae.sweep', run_name='__main__')"
LAST = "from mae.launch.pipeline import write_summary; write_summary({run!r})"
CODE = ("mae", "conf", "sweeps", "run.py")  # what a job runs
OPTIONS = {  # ours -> sbatch's, as submitit names them
    "nodes": "nodes",
    "timeout_min": "time",
    "cpus_per_task": "cpus_per_task",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
    "dependency": "dependency",
    "signal_delay_s": "signal_delay_s",
    "setup": "setup",
    "array_parallelism": "array_parallelism",
}


def slurm(
    run: Path,
    *,
    nodes: Annotated[int, "[1, inf)"],
    gpus_per_node: Annotated[int, "[0, inf)"],
    tasks_per_node: Annotated[int, "[1, inf)"] | None,
    cpus_per_task: Annotated[int, "[1, inf)"],
    mem_gb: Annotated[float, "[0, inf)"] | None,
    timeout_min: Annotated[int, "[1, inf)"],
    partition: str | None,
    account: str | None,
    qos: str | None,
    constraint: str | None,
    exclude: str | None,
    reservation: str | None,
    dependency: str | None,
    additional_parameters: dict,
    srun_args: list[str],
    setup: list[str],
    python: str | None,
    array_parallelism: Annotated[int, "[1, inf)"],
    max_requeues: Annotated[int, "[0, inf)"],
    signal_delay_s: Annotated[int, "[1, 65535]"],
    nccl_interface: str | None,
    gloo_interface: str | None,
    probe_s: Annotated[int, "[0, inf)"],
    wait: bool,
    poll_s: Annotated[float, "(0, inf)"],
) -> int:
    """Submits a run to the queue and says how to follow it; the exit code is 0 once it is queued, or with `wait`
    once it is finished. Raises ConfigError where the cluster cannot run it."""
    settings = {key: value for key, value in locals().items() if key != "run"}
    return submit([(run, settings)], run)


def submit(runs: Sequence[tuple[Path, Mapping[str, Any]]], folder: Path) -> int:
    """Queues prepared runs with their launcher settings, those of the same settings as one array. What belongs to the
    jobs lies under `folder/slurm`. Returns the exit code."""
    waiting = [run for run, _ in runs if not (run / "summary.json").exists()]
    with contextlib.ExitStack() as lock:
        if len(in_queue(waiting)) < len(waiting):  # two commands at once would queue the rest twice
            lock.enter_context(held_run(folder))
        _enqueue_all(runs, waiting, folder)
    settings = plain(runs[0][1])
    return follow([run for run, _ in runs], settings["poll_s"]) if settings["wait"] else 0


def in_queue(runs: Sequence[Path]) -> list[Path]:
    """Those of the runs whose job is queued or running."""
    return [run for run, (_, job) in asked(runs).items() if job is not None and job.alive]


def _enqueue_all(runs: Sequence[tuple[Path, Mapping[str, Any]]], waiting: list[Path], folder: Path) -> None:
    """Queues those of the runs that are neither finished nor in the queue."""
    queued = in_queue(waiting)
    for run in queued:
        sys.stdout.write(
            f"{shown(run)} is in the queue already; python run.py {pasted('cancel', shown(run))} takes it out.\n"
        )
    groups: dict[str, list[Path]] = {}
    for run, settings in runs:
        if run in waiting and run not in queued:
            groups.setdefault(json.dumps(plain(settings)), []).append(run)
    for text, members in groups.items():
        check(json.loads(text), folder, members)
    jobs = []
    for text, members in groups.items():
        jobs.append(enqueue(members, folder, json.loads(text)))
        sys.stdout.write(told_to_user(jobs[-1], members, folder, json.loads(text)))
    if jobs and folder not in waiting and (ROOT / "mae" / "sweep.py").exists():
        after(f"afterany:{':'.join(jobs)}", REPORT.format(folder=str(folder)), folder, plain(runs[0][1]))


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A launcher's settings as Python's own dicts and lists."""
    made = OmegaConf.to_container(settings) if isinstance(settings, DictConfig) else dict(settings)
    assert isinstance(made, dict)
    return {str(key): value for key, value in made.items() if key != "name"}


def after(dependency: str, statement: str, folder: Path, settings: Mapping[str, Any]) -> None:
    """Queues a small job that runs a statement, from the same code, once others have ended."""
    code = snapshot(folder / "slurm" / "code")
    python = settings["python"] or shlex.quote(sys.executable)
    kept = ("partition", "account", "qos", "constraint", "reservation")
    more = {key: settings[key] for key in kept if settings[key] is not None} | {"kill-on-invalid-dep": "yes"}
    options = {"dependency": dependency, "time": 60, "job_name": f"{folder.name}-end", "use_srun": False}
    options |= {
        "nodes": 1,
        "ntasks_per_node": 1,
        "setup": settings["setup"],
        "stderr_to_stdout": True,
        "additional_parameters": more,
    }
    sbatch(f"{python} -c {shlex.quote(AFTER.format(code=str(code)) + statement)}", folder / "slurm", options, None)


def submit_last(run: Path, stages: Sequence[Path], settings: Mapping[str, Any]) -> None:
    """Queues what sums a pipeline up once its stages, which are queued, are finished."""
    jobs = [name for name, job in asked(stages).values() if job is not None and job.alive]
    if jobs:
        after(f"afterok:{':'.join(jobs)}", LAST.format(run=str(run)), run, plain(settings))


def enqueue(runs: list[Path], folder: Path, settings: Mapping[str, Any]) -> str:
    """Writes down what the job shall do and hands it to sbatch through submitit; returns its id."""
    code, array = snapshot(folder / "slurm" / "code"), len(runs) > 1
    told = folder / "slurm" / f"submission_{secrets.token_hex(4)}.json"
    configs = {str(run): (run / "config.yaml").read_text() for run in runs}
    told.write_text(json.dumps({"members": configs, "launcher": dict(settings), "code": str(code)}))
    python = settings["python"] or shlex.quote(sys.executable)
    script = SUPERVISE.format(code=str(code), told=str(told))
    parameters = dict(settings["additional_parameters"]) | {"requeue": True}
    if settings["reservation"]:
        parameters["reservation"] = settings["reservation"]
    if settings["dependency"]:
        parameters["kill-on-invalid-dep"] = "yes"
    options = {theirs: settings[ours] for ours, theirs in OPTIONS.items() if settings[ours] is not None}
    options |= {"ntasks_per_node": tasks_per_node(settings), "job_name": folder.name, "use_srun": False}
    if settings["gpus_per_node"]:
        options["gpus_per_node"] = settings["gpus_per_node"]
    if settings["mem_gb"] is not None:
        options["mem"] = f"{int(settings['mem_gb'] * 1024)}M"
    for run in runs:
        (run / "slurm").mkdir(exist_ok=True)
        for left in ("failure.json", "slurm/verdict.json"):  # of an earlier job
            (run / left).unlink(missing_ok=True)
    job = sbatch(
        f"{python} -u -c {shlex.quote(script)}",
        folder / "slurm",
        options | {"stderr_to_stdout": True, "additional_parameters": parameters},
        len(runs) if array else None,
    )
    for index, run in enumerate(runs):
        place = {"job": f"{job}_{index}" if array else job, "submitted": time.time(), "submission": str(told)}
        (run / "slurm" / "job.json").write_text(json.dumps(place))
    return job


def sbatch(command: str, folder: Path, options: Mapping[str, Any], array: int | None) -> str:
    """Submits a command, as an array of `array` jobs; returns the id. Raises ConfigError with what SLURM says."""
    import io

    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(**options)
    if array is not None:
        executor.parameters["map_count"] = array
    try:
        with outside_of_jobs(), contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return executor._submit_command(command).job_id  # without its worker: see mae/launch/slurm/job.py
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).splitlines() if line]
        raise ConfigError(f"SLURM refuses the job: {lines[-1] if lines else 'it does not say why'}.") from error


def snapshot(folder: Path) -> Path:
    """A copy of the code as it is now, under a name made from its contents: what a job runs is never changed."""
    files = sorted(
        path
        for name in CODE
        for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    made = folder / digest.hexdigest()[:12]
    if not made.exists():
        temporary = folder / f".{made.name}.{os.getpid()}"
        for path in files:
            target = temporary / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        temporary.rename(made)
    return made


def told_to_user(job: str, runs: list[Path], folder: Path, settings: Mapping[str, Any]) -> str:
    """What was submitted, and how to follow it."""
    tasks = tasks_per_node(settings)
    count = f"{len(runs)} jobs, {settings['array_parallelism']} at a time, of " if len(runs) > 1 else ""
    size = f"{count}{settings['nodes']} node{'s' * (settings['nodes'] > 1)} x {tasks} task{'s' * (tasks > 1)}"
    name, log = shown(folder), shlex.quote(shown(runs[0] / "log.txt"))
    lines = [f"Submitted job {job}: {size}"]
    if len(runs) == 1:
        lines += [f"  log      {shown(runs[0] / 'log.txt')}, one a rank in {shown(runs[0] / 'logs')}/"]
        lines += [f"  follow   tail -F {log}"]
    else:
        lines += [f"  log      log.txt of each member, as {shown(runs[0] / 'log.txt')}"]
    lines += [
        f"  {verb:8} python run.py {pasted(word, name)}" for verb, word in (("state", "status"), ("cancel", "cancel"))
    ]
    return "\n".join(lines) + "\n"
