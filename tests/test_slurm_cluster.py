"""Runs on a real SLURM cluster on this machine: disturbed in every way they end with the same bits; their own faults
end them. Second stage; skipped where no cluster can be started."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_PRETRAIN, run_cli
from slurm_cluster import Cluster, missing, wait_for

from mae import checkpoint, track

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

CPU = ["launcher=slurm", "launcher.gpus_per_node=0", "launcher.tasks_per_node=1", "launcher.cpus_per_task=1"]
CPU += ["launcher.probe_s=0", "launcher.poll_s=0.5", "launcher.signal_delay_s=20"]
STEPS = [*TINY_PRETRAIN, "task.epochs=12", "task.max_steps=60", "checkpoint.every_epochs=0.8"]  # 5 steps an epoch


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # sockets want a short path
    try:
        with Cluster(folder, nodes=3) as started:
            yield started
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Job:
    """A run on the cluster, whose steps a test slows down and breaks by files in `folder`."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder, self.run = cluster, folder, folder / "run"

    def say(self, **files: object) -> None:
        for name, text in files.items():
            (self.folder / name).write_text(str(text))

    def command(self, *overrides: str, checkout: Path = ROOT) -> list[str]:
        faults = f"export PYTHONPATH={ROOT}/tests/slurm_faults MAE_TEST_FOLDER={self.folder}"
        output = [] if any(o == "-m" for o in overrides) else [f"output_dir={self.run}"]
        return [sys.executable, str(checkout / "run.py"), *CPU, f"launcher.setup=['{faults}']", *output, *overrides]

    def start(self, *overrides: str, checkout: Path = ROOT) -> subprocess.Popen:
        """Types the command; what it says goes to a file."""
        self.told = (self.folder / "told.txt").open("w+")
        return subprocess.Popen(
            self.command(*overrides, checkout=checkout),
            env=self.cluster.env | {"OMP_NUM_THREADS": "1"},
            stdout=self.told,
            stderr=subprocess.STDOUT,
            cwd=checkout,
        )

    def type(self, *overrides: str, code: int = 0, seconds: float = 200) -> str:
        """Types the command and waits for it; returns what it says."""
        process = self.start(*overrides)
        process.wait(seconds)
        self.told.seek(0)
        text = self.told.read()
        assert process.returncode == code, text + self.log()
        return text

    def ask(self, *words: str, code: int = 0) -> str:
        told = run_cli(*words, env=self.cluster.env)
        assert told.returncode == code, told.stdout + told.stderr
        return told.stdout + told.stderr

    @property
    def id(self) -> str:
        return json.loads((self.run / "slurm" / "job.json").read_text())["job"]

    @property
    def attempt(self) -> str:
        path = self.run / "slurm" / "attempt"
        return path.read_text() if path.exists() else ""

    @property
    def step(self) -> int:
        return max((row["step"] for row in track.read_lines(self.run / "metrics.jsonl")), default=0)

    def wait_for_step(self, step: int, attempt: str = "") -> None:
        """Until an attempt other than the given one has trained beyond a step."""
        wait_for(f"step {step}\n{self.log()}", lambda: self.attempt != attempt and self.step >= step, 100)

    def tasks(self) -> list[int]:
        """Ranks of this job that live."""
        mine = self.cluster.processes(f"MAE_TEST_FOLDER={self.folder}")
        return [p for p in mine if b"SLURM_PROCID=" in Path(f"/proc/{p}/environ").read_bytes()
                and b"job.task(" in Path(f"/proc/{p}/cmdline").read_bytes()
                and b"srun" not in Path(f"/proc/{p}/cmdline").read_bytes().split(b"\0")[0]]  # fmt: skip

    def log(self) -> str:
        return "".join(f"--- {p}\n{p.read_text()[-3000:]}\n" for p in (self.run / "slurm").glob("*.out"))


@pytest.fixture
def job(cluster, tmp_path):
    cluster.wait_idle()
    yield Job(cluster, tmp_path)
    cluster.run("scancel", "--user=root")


def digest(run: Path) -> str:
    path = checkpoint.newest_valid(run)
    assert path is not None
    return checkpoint.weights_digest(checkpoint.read_weights(path))


def losses(run: Path) -> list[float]:
    rows = track.read_lines(run / "metrics.jsonl")
    return [row.get("loss", row.get("val/loss")) for row in rows if "loss" in row or "val/loss" in row]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    told = run_cli(*STEPS, "launcher.processes=2", f"output_dir={run}")
    assert told.returncode == 0, told.stderr
    return run


# ---------------------------------------------------------------- as on a laptop


def test_two_nodes_by_two_tasks_equal_four_local_processes(job):
    told = job.type(*TINY_PRETRAIN, "launcher.nodes=2", "launcher.tasks_per_node=2", "launcher.wait=true")
    assert "Submitted job" in told and "tail -F" in told and told.splitlines()[-1].startswith("val_loss")
    local = job.folder / "local"
    assert run_cli(*TINY_PRETRAIN, "launcher.processes=4", f"output_dir={local}").returncode == 0
    assert losses(job.run) == losses(local) and len(losses(local)) > 10 and digest(job.run) == digest(local)
    assert sorted(p.name for p in (job.run / "logs").glob("rank_*")) == [f"rank_{r}.txt" for r in (1, 2, 3)]
    assert "step 10/10" in (job.run / "log.txt").read_text()
    assert "FINISHED" in job.ask(f"status={job.run}") and "finished already" in job.type(
        *TINY_PRETRAIN, "launcher.nodes=2", "launcher.tasks_per_node=2"
    )


# ---------------------------------------------------------------- disturbed


def preempt(job: Job) -> None:
    """A job of higher priority takes all nodes."""
    all_of_it = ["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    assert job.cluster.run("sbatch", *all_of_it)


def cut_by_time_limit(job: Job) -> None:
    job.say(pace=1)
    job.cluster.run(
        "scontrol",
        "update",
        f"JobId={job.id}",
        f"EndTime={time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(time.time() + 15))}",
    )


def requeue(job: Job) -> None:
    job.cluster.run("scontrol", "requeue", job.id)


def power_off(job: Job) -> None:
    """The second node of the job: rank 0 survives, and finds its peer gone."""
    hosts = job.cluster.run("scontrol", "show", "hostnames", job.cluster.field(job.id, "NodeList")).split()
    job.cluster.kill_node(hosts[-1])
    job.lost = hosts[-1]


def usr2_twice(job: Job) -> None:
    for _ in range(2):
        job.cluster.run("scancel", "--signal=USR2", job.id)


def term_during_a_save(job: Job) -> None:
    job.say(slow_save=2)
    wait_for("a save", lambda: list((job.run / "checkpoints").glob(".step_*.begun")), 60, 0.02)
    job.cluster.run("scancel", "--signal=TERM", job.id)


def kill_a_rank(job: Job) -> None:
    """As for lack of memory; there is a checkpoint since the attempt began."""
    count = len(checkpoint.checkpoints_of(job.run)), job.step
    wait_for("a checkpoint", lambda: job.step >= count[1] + 5, 60)
    os.kill(job.tasks()[-1], signal.SIGKILL)


@pytest.mark.timeout(900)
def test_disturbed_in_every_way_in_a_random_order_a_job_ends_with_the_same_bits(job, undisturbed):
    seed = int(os.environ.get("MAE_TEST_SEED", "6"))
    chance = random.Random(seed)
    ways = [preempt, cut_by_time_limit, requeue, power_off, usr2_twice, term_during_a_save, kill_a_rank]
    chance.shuffle(ways)
    job.say(pace=0.2)
    process = job.start(*STEPS, "launcher.nodes=2", "launcher.wait=true")
    attempt = ""
    for way in ways:
        job.wait_for_step(job.step + chance.randint(1, 3), attempt)
        attempt, begin, step = job.attempt, time.monotonic(), job.step
        way(job)
        wait_for(f"the next attempt after {way.__name__}\n{job.log()}", lambda: job.attempt != attempt, 120)  # noqa: B023
        print(f"{way.__name__} at step {step}: {time.monotonic() - begin:.1f} s")  # noqa: T201
        job.say(pace=0.2, slow_save=0)
        if way is power_off:
            job.cluster.start_node(job.lost)
    job.say(pace=0)
    code = process.wait(120)
    text = (job.folder / "told.txt").read_text()
    assert code == 0 and text.splitlines()[-1].startswith("val_loss"), text + job.log()
    assert digest(job.run) == digest(undisturbed) and losses(job.run) == losses(undisturbed)
    assert job.cluster.field(job.id, "Restarts") == str(len(ways)) and job.tasks() == []
