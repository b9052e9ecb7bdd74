"""Inside a job. On its first node `supervise` starts a task a rank and judges how they end; `task` is one rank.

submitit's own worker is not used: it believes rank 0 alone, takes an exception for an end like any other, and
keeps results that a later attempt can mistake for its own. Here the run's directory says what happened:
`summary.json` (finished), `failure.json` (the first error of this attempt), `slurm/stopped/` (asked to stop,
saved), `slurm/verdict.json` (what the supervisor made of it).
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mae.launch.slurm import queue
from mae.launch.slurm.verdict import ASKED, Ending, Verdict, cause_in, judge, newest_step, read, write_verdict
from mae.runs import attempt as fence

TASK = "import sys; sys.path[0] = {code!r}; from mae.launch.slurm import job; job.task({run!r})"
SUPERVISE = "import sys; sys.path[0] = {code!r}; from mae.launch.slurm import job; sys.exit(job.supervise({told!r}))"


# ---------------------------------------------------------------- the supervisor


def supervise(told: str) -> int:
    """Runs one attempt of a job's member; returns the job's exit code, or requeues the job and does not return."""
    submission = json.loads(Path(told).read_text())
    settings = submission["launcher"]
    member, config = list(submission["members"].items())[int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))]
    run = Path(member)
    job, number = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", 0))
    left = settings["max_requeues"] - number
    signal.signal(signal.SIGUSR2, lambda *_: None)  # meant for the tasks, whose end we wait for
    signal.signal(signal.SIGTERM, functools.partial(at_time_limit, job, [None] * min(1, left)))
    begin(run, f"{job}.{number}")
    if not (run / "config.yaml").exists():  # someone has tidied up
        (run / "config.yaml").write_text(config)
    say(f"attempt {number} of job {job} on {os.environ['SLURM_JOB_NODELIST']}: {run}")
    before = newest_step(run)
    if (run / "summary.json").exists():
        verdict = Verdict("finished")
    elif left < 0:
        verdict = Verdict("failed", "it was started again more often than launcher.max_requeues allows")
    else:
        causes, code = start_tasks(run, submission["code"], settings)
        failure = read(run / "failure.json")
        finished = (run / "summary.json").exists()
        words = [path.stat().st_mtime for path in (run / "slurm" / "stopped").glob("*")]
        first = bool(words and failure) and min(words) <= (run / "failure.json").stat().st_mtime  # one server's clock
        lost = "" if finished or code == 0 or (failure and not failure["lost_peer"]) else lost_node(settings)
        advanced = newest_step(run) > before
        verdict = judge(Ending(finished, failure, bool(words), causes, first, code, advanced, lost), left)
    return conclude(run, job, number, verdict)


def say(text: str) -> None:
    """A line in the job's own log."""
    os.write(1, f"{time.strftime('%H:%M:%S')} {text}\n".encode())  # not print's buffer: signal handlers say things too


def at_time_limit(job: str, chances: list[None], *_: Any) -> None:
    """TERM: where the time limit has come before the tasks could save, SLURM would not start the job again by itself,
    and kills this process soon."""
    if chances and queue.field(job, "Reason") == "TimeLimit":
        chances.pop()
        say("requeue: its time limit came before it had saved" + queue.requeue(job))


def begin(run: Path, attempt: str) -> None:
    """Takes the run over, and removes what earlier attempts said of their end."""
    fence.claim(run, attempt)
    os.environ[fence.NAME] = attempt
    (run / "failure.json").unlink(missing_ok=True)
    (run / "slurm" / "verdict.json").unlink(missing_ok=True)
    shutil.rmtree(run / "slurm" / "stopped", ignore_errors=True)
    (run / "slurm" / "stopped").mkdir(exist_ok=True)
    (run / "logs").mkdir(exist_ok=True)


def start_tasks(run: Path, code: str, settings: Mapping[str, Any]) -> tuple[list[str], int]:
    """Starts a task a rank with srun and waits for all; returns srun's words for their ends, and its exit code."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    from mae.launch.slurm.check import tasks_per_node

    hosts, per_node = list(SlurmJobEnvironment().hostnames), tasks_per_node(settings)
    environment = os.environ | {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(free_port())}
    environment |= {"RANK_HOSTS": ",".join(host for host in hosts for _ in range(per_node))}
    environment |= {"MAE_SIGNAL_DELAY_S": str(settings["signal_delay_s"])}
    for name in ("nccl", "gloo"):
        if settings[f"{name}_interface"]:
            environment[f"{name.upper()}_SOCKET_IFNAME"] = settings[f"{name}_interface"]
    words = ["srun", f"--ntasks={len(hosts) * per_node}", f"--ntasks-per-node={per_node}"]
    words += [f"--cpus-per-task={settings['cpus_per_task']}", "--distribution=block", "--kill-on-bad-exit=1"]
    words += ["--export=ALL", "--wait=0", "--unbuffered", "--open-mode=append", f"--output={run}/logs/console_%t.txt"]
    python = shlex.split(settings["python"] or shlex.quote(sys.executable))
    words += [*settings["srun_args"], *python, "-u", "-c", TASK.format(code=code, run=str(run))]
    causes = []
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, errors="replace") as srun:
        assert srun.stderr is not None
        for line in srun.stderr:
            say(line.rstrip())
            causes += [cause] if (cause := cause_in(line)) else []
    return causes, srun.returncode


def free_port() -> int:
    """A port for the rendezvous in 20000-32000, another one for each job and attempt."""
    first = zlib.crc32(os.environ[fence.NAME].encode())
    for offset in range(200):
        port = 20000 + (first + 37 * offset) % 12000
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no port is free between 20000 and 32000")


def lost_node(settings: Mapping[str, Any]) -> str:
    """A node of this job on which nothing can be started any more, or nothing."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    hosts = list(SlurmJobEnvironment().hostnames)
    for host in hosts if len(hosts) > 1 else []:
        words = ["srun", "--overlap", f"--nodelist={host}", "--nodes=1", "--ntasks=1", "--mem=0", "--gpus=0"]
        code, told, _ = queue.command(*words, "echo", "alive", seconds=20)
        if "alive" not in told:
            return host
    return ""


def conclude(run: Path, job: str, number: int, verdict: Verdict) -> int:
    """Writes the verdict down and acts on it."""
    if not fence.holds(run):
        say("a newer attempt has taken over")
        return 1
    action, reason = verdict.action, verdict.reason
    state = queue.field(job, "JobState")
    if action == "requeue" and state != "RUNNING":
        write_verdict(run, job, number, "stopped", "SLURM ended it: cancelled, or requeued by SLURM itself")
        return 1  # cancelled, or requeued already: SLURM has decided
    if action == "requeue":
        write_verdict(run, job, number, "requeue", reason)
        say(f"requeue: {reason}")
        for signum in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_DFL)
        refused = queue.requeue(job)
        if not refused:
            time.sleep(120)  # SLURM ends this process
        action, reason = "failed", f"{reason}, and SLURM does not requeue it: {refused}"
    say(f"{action}: {reason}" if reason else action)
    write_verdict(run, job, number, action, reason)
    return 0 if action == "finished" else 1


# ---------------------------------------------------------------- a rank


def ranks_from(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from SLURM's."""
    local = environment["SLURM_LOCALID"]
    visible: Sequence[str] = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(visible) == 1 and visible[0]:  # SLURM has bound each task to a GPU of its own
        local = "0"
    found = {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": environment["SLURM_NTASKS"], "LOCAL_RANK": local}
    return found | {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", "1"))}


def task(run: str) -> None:
    """One rank of a run. Asked to stop, it leaves word and ends with 0 once all have agreed and saved."""
    os.environ.update(ranks_from(os.environ))
    word = Path(run) / "slurm" / "stopped" / os.environ["RANK"]

    def leave(number: int, frame: Any) -> None:
        """Asked to stop where nothing can be lost: before the train loop, or after it."""
        word.touch()
        os._exit(ASKED)

    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, leave)
    fence.watch(Path(run))
    from mae import engine

    code = 1
    try:
        code = engine.work(Path(run))
        if code == ASKED:
            word.touch()
            code = 0  # not an error: srun must let the others finish too
    except BaseException:
        logging.getLogger(__name__).exception("rank %s failed", os.environ["RANK"])
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what hangs at exit, such as a data worker, must not hold the job
