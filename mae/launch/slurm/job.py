"""Inside a job. On its first node `supervise` starts a task a rank and judges how they end; `task` is one rank.

submitit's own worker is not used. It looks at rank 0 alone, and takes an exception for a normal end. It also keeps
results that a later attempt can mistake for its own. Here the run's directory says how an attempt ended:
`summary.json` (finished), `failure.json` (the first error of this attempt), `slurm/stopped/` (asked to stop,
saved), `slurm/verdict.json` (what the supervisor decided).
"""

import functools
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

from mae.launch.slurm import queue
from mae.launch.slurm.settings import SlurmSettings
from mae.launch.slurm.verdict import INTERRUPTED, Ending, Verdict, cause_in, judge, newest_step, write_verdict
from mae.runs import attempt
from mae.runs.failure import FAILURE, read_failure
from mae.runs.summary import is_finished

TASK = "import sys; sys.path[0] = {code!r}; from mae.launch.slurm import job; job.task({run!r})"
SUPERVISE = "import sys; sys.path[0] = {code!r}; from mae.launch.slurm import job; "
SUPERVISE += "sys.exit(job.supervise({submission!r}))"
VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


# ---------------------------------------------------------------- the supervisor


def supervise(submission: str) -> int:
    """Runs one attempt of a job's member; returns the job's exit code, or requeues the job and does not return."""
    values = json.loads(Path(submission).read_text())
    settings = SlurmSettings(**values["launcher"])
    member, config = list(values["members"].items())[int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))]
    run = Path(member)
    job, number = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", 0))
    left = settings.max_requeues - number
    signal.signal(signal.SIGUSR2, lambda *_: None)  # meant for the tasks, whose end we wait for
    signal.signal(signal.SIGTERM, functools.partial(at_time_limit, job, [None] * min(1, left)))
    start_attempt(run, f"{job}.{number}")
    if not (run / "config.yaml").exists():  # removed while the job waited
        (run / "config.yaml").write_text(config)
    write_line(f"attempt {number} of job {job} on {os.environ['SLURM_JOB_NODELIST']}: {run}")
    if is_finished(run):
        verdict = Verdict("finished")
    elif left < 0:
        verdict = Verdict("failed", "it was started again more often than launcher.max_requeues allows")
    else:
        verdict = judge(run_tasks(run, values["code"], settings), left)
    return act_on(run, job, number, verdict)


def write_line(text: str) -> None:
    """A line in the job's own log."""
    os.write(1, f"{time.strftime('%H:%M:%S')} {text}\n".encode())  # not print's buffer: signal handlers write too


def at_time_limit(job: str, requeues: list[None], *_: object) -> None:
    """On TERM: requeues a job whose time limit came before its tasks could save.

    SLURM would not start it again by itself, and kills this process soon. `requeues` holds an item for each allowed.
    """
    if requeues and queue.field(job, "Reason") == "TimeLimit":
        requeues.pop()
        write_line("requeue: its time limit came before it had saved" + queue.requeue(job))


def start_attempt(run: Path, name: str) -> None:
    """Takes the run over, and removes what earlier attempts left about their end."""
    attempt.claim(run, name)
    os.environ[attempt.NAME] = name
    (run / FAILURE).unlink(missing_ok=True)
    (run / "slurm" / "verdict.json").unlink(missing_ok=True)
    shutil.rmtree(run / "slurm" / "stopped", ignore_errors=True)
    (run / "slurm" / "stopped").mkdir(exist_ok=True)
    (run / "logs").mkdir(exist_ok=True)


def run_tasks(run: Path, code: str, settings: SlurmSettings) -> Ending:
    """Starts the tasks and waits for all; returns how the attempt ended."""
    step = newest_step(run)
    causes, exit_code = start_tasks(run, code, settings)
    failure, finished = read_failure(run), is_finished(run)
    stops = [path.stat().st_mtime for path in (run / "slurm" / "stopped").glob("*")]
    first = bool(stops and failure) and min(stops) <= (run / FAILURE).stat().st_mtime  # one server's clock
    explained = finished or exit_code == 0 or (failure is not None and not failure["lost_peer"])
    return Ending(
        finished=finished,
        failure=failure,
        stopped=bool(stops),
        causes=causes,
        left_first=first,
        code=exit_code,
        advanced=newest_step(run) > step,
        lost_node="" if explained else lost_node(),
    )


def start_tasks(run: Path, code: str, settings: SlurmSettings) -> tuple[list[str], int]:
    """Starts a task a rank with srun and waits for all; returns the causes of their ends and srun's exit code."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    hosts, per_node = list(SlurmJobEnvironment().hostnames), settings.tasks
    environment = os.environ | {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(free_port())}
    environment |= {"RANK_HOSTS": ",".join(host for host in hosts for _ in range(per_node))}
    environment |= {"MAE_SIGNAL_DELAY_S": str(settings.signal_delay_s)}
    interfaces = {"NCCL": settings.nccl_interface, "GLOO": settings.gloo_interface}
    environment |= {f"{library}_SOCKET_IFNAME": name for library, name in interfaces.items() if name}
    words = ["srun", f"--ntasks={len(hosts) * per_node}", f"--ntasks-per-node={per_node}"]
    words += [f"--cpus-per-task={settings.cpus_per_task}", "--distribution=block", "--kill-on-bad-exit=1"]
    words += ["--export=ALL", "--wait=0", "--unbuffered", "--open-mode=append", f"--output={run}/logs/console_%t.txt"]
    python = shlex.split(settings.python or shlex.quote(sys.executable))
    words += [*settings.srun_args, *python, "-u", "-c", TASK.format(code=code, run=str(run))]
    causes = []
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, errors="replace") as srun:
        assert srun.stderr is not None
        for line in srun.stderr:
            write_line(line.rstrip())
            causes += [cause] if (cause := cause_in(line)) else []
    return causes, srun.returncode


def free_port() -> int:
    """A port for the rendezvous in 20000-32000, another one for each job and attempt."""
    first = zlib.crc32(os.environ[attempt.NAME].encode())
    for offset in range(200):
        port = 20000 + (first + 37 * offset) % 12000
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no port is free between 20000 and 32000")


def lost_node() -> str:
    """A node of this job on which nothing can be started any more, or empty."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    hosts = list(SlurmJobEnvironment().hostnames)
    for host in hosts if len(hosts) > 1 else []:
        words = ["srun", "--overlap", f"--nodelist={host}", "--nodes=1", "--ntasks=1", "--mem=0", "--gpus=0"]
        _, output, _ = queue.command(*words, "echo", "alive", seconds=20)
        if "alive" not in output:
            return host
    return ""


def act_on(run: Path, job: str, number: int, verdict: Verdict) -> int:
    """Writes the verdict down and requeues the job, or returns its exit code."""
    if not attempt.holds(run):
        write_line("a newer attempt has taken over")
        return 1
    if verdict.action == "requeue":
        if queue.field(job, "JobState") not in queue.RUNNING:  # SLURM has decided already
            stopped = Verdict("stopped", "SLURM ended it: cancelled, or requeued by SLURM itself")
            write_verdict(run, job, number, stopped)
            return 1
        write_verdict(run, job, number, verdict)
        write_line(f"requeue: {verdict.reason}")
        for signum in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_DFL)
        refusal = queue.requeue(job)
        if not refusal:
            time.sleep(120)  # SLURM ends this process
        verdict = Verdict("failed", f"{verdict.reason}, and SLURM does not requeue it: {refusal}")
    write_line(f"{verdict.action}: {verdict.reason}" if verdict.reason else verdict.action)
    write_verdict(run, job, number, verdict)
    return 0 if verdict.action == "finished" else 1


# ---------------------------------------------------------------- a rank


def ranks_from(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from SLURM's, and CUDA_VISIBLE_DEVICES where a task must choose its slice of a GPU."""
    local, own_slice = environment["SLURM_LOCALID"], {}
    lists = {name: environment[name].split(",") for name in VISIBLE_DEVICES if environment.get(name)}
    slices = lists.get("CUDA_VISIBLE_DEVICES", [])
    if int(local) < len(slices) and all(name.startswith("MIG") for name in slices):
        # CUDA shows a process the first slice of a list alone
        own_slice = {"CUDA_VISIBLE_DEVICES": slices[int(local)]}
        lists |= {name: [value] for name, value in own_slice.items()}
    if any(len(visible) == 1 for visible in lists.values()):  # each task has a device of its own
        local = "0"
    threads = environment.get("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", "1"))
    ranks = {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": environment["SLURM_NTASKS"], "LOCAL_RANK": local}
    return ranks | {"OMP_NUM_THREADS": threads} | own_slice


def task(run: str) -> None:
    """One rank of a run. Asked to stop, it notes that in `slurm/stopped` and exits with 0 once all have saved."""
    os.environ.update(ranks_from(os.environ))
    stop_file = Path(run) / "slurm" / "stopped" / os.environ["RANK"]

    def leave(number: int, frame: object) -> None:
        """Asked to stop where nothing can be lost: before the train loop, or after it."""
        stop_file.touch()
        os._exit(INTERRUPTED)

    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, leave)
    attempt.watch(Path(run))
    from mae import engine

    code = 1
    try:
        code = engine.work(Path(run))
        if code == INTERRUPTED:
            stop_file.touch()
            code = 0  # not an error: srun must let the others finish too
    except BaseException:
        logging.getLogger(__name__).exception("rank %s failed", os.environ["RANK"])
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what hangs at exit, such as a data worker, must not hold the job
