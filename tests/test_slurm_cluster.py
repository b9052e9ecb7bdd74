"""Runs on a real SLURM cluster on this machine: disturbed in every way they end with the same bits; their own faults
end them. Second stage; skipped where no cluster can be started."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, TINY_PRETRAIN, run_cli
from slurm_cluster import Cluster, missing, wait_for

from mae import checkpoint
from mae.config.saved import read_config
from mae.runs import checkpoints, files

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
        self.lost_node = ""

    def say(self, **files: object) -> None:
        for name, text in files.items():
            (self.folder / name).write_text(str(text))

    def command(self, *overrides: str, checkout: Path = ROOT) -> list[str]:
        faults = f"export PYTHONPATH={ROOT}/tests/faults MAE_TEST_FOLDER={self.folder}"
        output = ["-m"] if "-m" in overrides else [f"output_dir={self.run}"]
        overrides = tuple(o for o in overrides if o != "-m")
        return [sys.executable, str(checkout / "run.py"), *output, *CPU, f"launcher.setup=['{faults}']", *overrides]

    def start(self, *overrides: str, checkout: Path = ROOT, cwd: Path | None = None) -> subprocess.Popen:
        """Types the command; what it says goes to a file."""
        self.output = (self.folder / "output.txt").open("w+")
        return subprocess.Popen(
            self.command(*overrides, checkout=checkout),
            env=self.cluster.env | {"OMP_NUM_THREADS": "1"},
            stdout=self.output,
            stderr=subprocess.STDOUT,
            cwd=cwd or checkout,
        )

    def type(self, *overrides: str, code: int = 0, seconds: float = 200, cwd: Path | None = None) -> str:
        """Types the command and waits for it; returns what it says."""
        process = self.start(*overrides, cwd=cwd)
        process.wait(seconds)
        self.output.seek(0)
        text = self.output.read()
        assert process.returncode == code, text + self.log()
        return text

    def ask(self, *words: str, code: int = 0) -> str:
        ended = run_cli(*words, env=self.cluster.env)
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    @property
    def id(self) -> str:
        return json.loads((self.run / "slurm" / "job.json").read_text())["job"]

    @property
    def attempt(self) -> str:
        path = self.run / "slurm" / "attempt"
        return path.read_text() if path.exists() else ""

    @property
    def step(self) -> int:
        return max((row["step"] for row in files.read_json_lines(self.run / "metrics.jsonl")), default=0)

    def wait_for_step(self, step: int, attempt: str = "") -> None:
        """Until an attempt other than the given one has trained beyond a step."""
        wait_for(f"step {step}\n{self.log()}", lambda: self.attempt != attempt and self.step >= step, 100)

    def tasks(self) -> list[int]:
        """Ranks of this job that live."""
        mine = self.cluster.processes(f"MAE_TEST_FOLDER={self.folder}")
        return [p for p in mine if b"SLURM_PROCID=" in Path(f"/proc/{p}/environ").read_bytes()
                and b"job.task(" in Path(f"/proc/{p}/cmdline").read_bytes()
                and b"srun" not in Path(f"/proc/{p}/cmdline").read_bytes().split(b"\0")[0]]  # fmt: skip

    def attempts(self) -> dict[str, str]:
        """What the job's log says of each attempt, by its number."""
        text = "".join(path.read_text() for path in (self.run / "slurm").glob("*.out"))
        parts = re.split(rf"attempt (\d+) of job {self.id}", text)
        return dict(zip(parts[1::2], parts[2::2], strict=True))

    def warned_by_slurm(self) -> list[str]:
        """Attempts that were signalled while they still started: after a cut SLURM may do so to the next one."""
        said = self.attempts()
        starting = "requeue: it was asked to stop", "Exited with exit code 130"
        return [
            a for a in said if all(s in said[a] for s in starting) and "TIME LIMIT" in said.get(str(int(a) - 1), "")
        ]

    def log(self) -> str:
        return "".join(f"--- {p}\n{p.read_text()[-3000:]}\n" for p in (self.run / "slurm").glob("*.out"))


@pytest.fixture
def job(cluster, tmp_path):
    cluster.wait_idle()
    yield Job(cluster, tmp_path)
    cluster.run("scancel", "--user=root")


def digest(run: Path) -> str:
    path = checkpoints.newest_valid(run)
    assert path is not None
    return checkpoint.weights_digest(checkpoint.read_weights(path))


def losses(run: Path) -> list[float]:
    rows = files.read_json_lines(run / "metrics.jsonl")
    return [row[key] for row in rows for key in ("loss", "val/loss") if key in row]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = run_cli(*STEPS, "launcher.processes=2", f"output_dir={run}")
    assert ended.returncode == 0, ended.stderr
    return run


# ---------------------------------------------------------------- as on a laptop


def test_two_nodes_by_two_tasks_equal_four_local_processes(job):
    text = job.type(*TINY_PRETRAIN, "launcher.nodes=2", "launcher.tasks_per_node=2", "launcher.wait=true")
    assert "Submitted job" in text and "tail -F" in text and text.splitlines()[-1].startswith("val_loss")
    local = job.folder / "local"
    assert run_cli(*TINY_PRETRAIN, "launcher.processes=4", f"output_dir={local}").returncode == 0
    assert losses(job.run) == losses(local) and len(losses(local)) > 10 and digest(job.run) == digest(local)
    assert sorted(p.name for p in (job.run / "logs").glob("rank_*")) == [f"rank_{r}.txt" for r in (1, 2, 3)]
    assert "step 10/10" in (job.run / "log.txt").read_text()
    assert "FINISHED" in job.ask(f"status={job.run}") and "finished already" in job.type(
        *TINY_PRETRAIN, "launcher.nodes=2", "launcher.tasks_per_node=2"
    )


def test_a_job_submitted_inside_an_interactive_job_has_settings_of_its_own(job):
    """With the outer job's SLURM_MEM_PER_CPU beside the inner one's SLURM_MEM_PER_NODE, every srun would be refused."""
    command = job.command(*TINY_PRETRAIN, "launcher.tasks_per_node=2", "launcher.mem_gb=1", "launcher.wait=true")
    around = ["srun", "--ntasks=1", "--cpus-per-task=2", "--mem-per-cpu=300", "--cpu-bind=none"]
    env = job.cluster.env | {"OMP_NUM_THREADS": "1", "SBATCH_MEM_PER_CPU": "300", "SRUN_CPUS_PER_TASK": "2"}
    done = subprocess.run([*around, *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr + job.log()
    assert done.stdout.splitlines()[-1].startswith("val_loss")
    assert job.cluster.field(job.id, "NumTasks") == "2" and job.cluster.field(job.id, "MinMemoryNode") == "1G"


# ---------------------------------------------------------------- disturbed


def preempt(job: Job) -> None:
    """A job of higher priority takes all nodes."""
    all_of_it = ["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    assert job.cluster.run("sbatch", *all_of_it)


def cut_by_time_limit(job: Job) -> None:
    """With time to save: SLURM looks within 31 s, and warns at that look. The run has steps left for as long."""
    job.say(pace=2)
    limit(job, 40)


def cut_in_a_long_step(job: Job) -> None:
    """B6: the warning comes while a step lasts, which is not over at the end."""
    job.say(pace=60)
    limit(job, 3)


def limit(job: Job, seconds: float) -> None:
    """Lets this attempt's time be over then (SLURM looks every 30 s), and gives the next one its time back.

    While it still waits: an attempt that starts under the short limit is warned at once, and rightly stops again.
    """
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
    job.cluster.run("scontrol", "update", f"JobId={job.id}", f"EndTime={end}")
    wait_for("the end of the attempt", lambda: job.cluster.field(job.id, "JobState") != "RUNNING", 100, 0.1)

    def restored() -> bool:
        assert job.cluster.field(job.id, "JobState") != "COMPLETED", f"it finished before the limit came\n{job.log()}"
        job.cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
        return job.cluster.field(job.id, "TimeLimit") == "01:00:00"

    wait_for("its time limit", restored, 30, 0.1)


def requeue(job: Job) -> None:
    job.cluster.run("scontrol", "requeue", job.id)


def power_off(job: Job) -> None:
    """The second node of the job: rank 0 survives, and finds its peer gone."""
    hosts = job.cluster.run("scontrol", "show", "hostnames", job.cluster.field(job.id, "NodeList")).split()
    job.cluster.kill_node(hosts[-1])
    job.lost_node = hosts[-1]


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
    ways = [preempt, cut_by_time_limit, cut_in_a_long_step, requeue, power_off, usr2_twice, term_during_a_save]
    ways.append(kill_a_rank)
    chance.shuffle(ways)
    job.say(pace=0.2)
    process = job.start(*STEPS, "launcher.nodes=2", "launcher.wait=true")
    attempt, disturbed = "", []
    for way in ways:
        job.wait_for_step(job.step + chance.randint(1, 3), attempt)
        attempt, begin, step = job.attempt, time.monotonic(), job.step
        disturbed.append(attempt.split(".")[1])
        way(job)
        wait_for(f"the next attempt after {way.__name__}\n{job.log()}", lambda: job.attempt != attempt, 120)  # noqa: B023
        print(f"{way.__name__} at step {step}: {time.monotonic() - begin:.1f} s")  # noqa: T201
        job.say(pace=0.2, slow_save=0)
        if way is power_off:
            job.cluster.start_node(job.lost_node)
    job.say(pace=0)
    code = process.wait(120)
    text = (job.folder / "output.txt").read_text()
    assert code == 0 and text.splitlines()[-1].startswith("val_loss"), text + job.log()
    assert digest(job.run) == digest(undisturbed) and losses(job.run) == losses(undisturbed)
    wait_for("the end of the job", lambda: job.cluster.field(job.id, "JobState") == "COMPLETED", 30)
    restarts = job.cluster.field(job.id, "Restarts")
    assert [a for a in job.attempts() if a not in disturbed and a != restarts] == job.warned_by_slurm(), job.log()
    assert len(disturbed) == len(set(disturbed)) == len(ways) and job.tasks() == [], job.log()


# ---------------------------------------------------------------- own faults


def test_a_rank_that_raises_fails_the_job_at_once_and_status_shows_why(job):
    """B1, B2: the stock parts show COMPLETED 0:0, and an exception in rank 1 is lost."""
    job.say(**{"raise": "1 3", "pace": 0.1})
    process = job.start(*STEPS, "launcher.nodes=2", "launcher.wait=true")
    wait_for("the job", lambda: (job.run / "slurm" / "job.json").exists(), 60)
    follower = ["--dependency=afterok:" + job.id, "--kill-on-invalid-dep=yes", "--output=/dev/null", "--wrap=true"]
    after = job.cluster.run("sbatch", "--parsable", *follower).strip()
    job.wait_for_step(3)
    begin = time.monotonic()
    assert process.wait(60) == 1 and time.monotonic() - begin < 30
    message = (job.folder / "output.txt").read_text()
    assert (
        message.splitlines()[-1]
        .partition(" (")[0]
        .endswith("FAILED: rank 1: This is a bug: RuntimeError: a deliberate mistake")
    )
    assert job.cluster.field(job.id, "JobState") == "FAILED" and job.cluster.field(job.id, "Restarts") == "0"
    status = job.ask(f"status={job.run}")
    assert "rank 1 failed first" in status and '("a deliberate mistake")' in status
    text = (job.run / "log.txt").read_text()
    assert "rank 1 failed" in text and "a deliberate mistake" in text.split("rank 1 failed")[1].split("rank 0")[0]
    wait_for("the end of what follows", lambda: job.cluster.field(after, "JobState") == "CANCELLED", 20)
    (job.folder / "raise").unlink()
    job.type(*STEPS, "launcher.nodes=2", "launcher.wait=true")  # the same command goes on
    assert not (job.run / "failure.json").exists()


def test_a_crash_before_any_checkpoint_is_not_tried_again(job):
    job.say(pace=0.3)
    process = job.start(*STEPS, "checkpoint.every_epochs=100", "launcher.nodes=2", "launcher.wait=true")
    job.wait_for_step(2)
    os.kill(job.tasks()[-1], signal.SIGKILL)
    assert process.wait(60) == 1
    text = (job.folder / "output.txt").read_text()
    assert "a task crashed: Killed (no checkpoint was written since the job began" in text, text + job.log()
    assert job.cluster.field(job.id, "Restarts") == "0" and job.tasks() == []


def test_ranks_that_never_come_are_named_and_a_waiting_rank_hears_signals(job):
    """B6: in a blocked rendezvous the stock parts never hear a signal."""
    job.say(absent=1)
    process = job.start(*STEPS, "launcher.nodes=2", "launcher.wait=true", "launcher.rendezvous_timeout_s=12")
    wait_for("both tasks", lambda: len(job.tasks()) == 2, 60)
    time.sleep(6)  # rank 0 has begun to wait
    job.cluster.run("scancel", "--signal=USR2", job.id)
    wait_for("the next attempt", lambda: job.attempt.endswith(".1"), 40)
    assert process.wait(90) == 1
    text = (job.folder / "output.txt").read_text()
    assert "Rank 1 (node2) never came to the rendezvous at node1:" in text and "within 12 s" in text, text + job.log()


# ---------------------------------------------------------------- two attempts at once


def test_an_older_attempt_that_lives_on_stops_and_never_writes(job, undisturbed):
    """B7: only slurmd dies, its tasks live on, and SLURM starts the job again on other nodes."""
    job.say(pace=1)
    process = job.start(*STEPS, "launcher.wait=true")
    job.wait_for_step(2)
    first, old = job.attempt, job.tasks()
    host = job.cluster.field(job.id, "NodeList")
    job.cluster.kill_slurmd(host)
    try:
        wait_for("the next attempt", lambda: job.attempt != first, 90)
        taken = job.step
        wait_for("the end of the old attempt", lambda: not set(old) & set(job.tasks()), 5)
        assert job.step <= taken + 1  # the line that was under way, at most
        job.say(pace=0)
        assert process.wait(100) == 0, (job.folder / "output.txt").read_text() + job.log()
    finally:
        job.cluster.kill_node(host)
        job.cluster.start_node(host)
    steps = [row["step"] for row in files.read_json_lines(job.run / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 61))


# ---------------------------------------------------------------- sweeps and chains


def test_a_sweep_is_one_array_and_a_failed_member_ends_no_other(job):
    sweep = job.folder / "sweep"
    job.say(**{"raise": "0 5"})  # which the last member alone reaches
    lengths = ["task.max_steps=1,2,3,4,5,6", "launcher.array_parallelism=2", f"hydra.sweep.dir={sweep}"]
    text = job.type("-m", *TINY_PRETRAIN, *lengths, "launcher.wait=true", code=1, seconds=280)
    assert (
        "6 jobs, 2 at a time" in text and ": FAILED: rank 0: This is a bug: RuntimeError: a deliberate mistake" in text
    )
    assert "FAILED" in job.cluster.run("sacct", "-X", "-n", "-o", "State", "-j", text.split("job ")[1].split(":")[0])
    assert len(list(sweep.glob("*/summary.json"))) == 5
    table = job.ask(f"status={sweep}").splitlines()
    assert [line.split()[2] for line in table[1:7]] == ["FINISHED"] * 5 + ["FAILED"]
    assert "val_loss" in table[1] and "a deliberate mistake" in table[6] and "Traceback" in "\n".join(table[7:])
    (job.folder / "raise").unlink()
    text = job.ask(f"retry_failed={sweep}", "launcher.wait=true", "launcher.timeout_min=30")
    assert "1 node x 1 task" in text and len(list(sweep.glob("*/summary.json"))) == 6
    assert "Nothing" in job.ask(f"retry_failed={sweep}") and "Nothing" in job.ask(f"cancel={sweep}")
    wait_for("the sweep's last job", lambda: (sweep / "sweep.csv").exists() and (sweep / "sweep.svg").exists(), 60, 0.5)
    assert sum("finished" in row for row in (sweep / "sweep.csv").read_text().splitlines()) >= 5


def test_members_wait_for_the_pretraining_that_init_auto_makes(job):
    sweep = job.folder / "sweep"
    asked = [*TINY, "task=knn", "init=auto", "task.k=[5]", "seed=0,1", f"hydra.sweep.dir={sweep}"]
    text = job.type("-m", *asked, cwd=job.folder)  # queued all at once
    assert "init=auto: pre-training comes first" in text and "2 jobs" in text
    assert not list(job.folder.glob("**/summary.json"))
    wait_for("both members", lambda: len(list(sweep.glob("*/summary.json"))) == 2, 200, 0.5)
    done = list(sweep.glob("*/summary.json"))
    parents = {str(read_config(path.parent).init) for path in done}
    assert len(done) == 2 and len(parents) == 1
    assert json.loads((job.folder / parents.pop() / "summary.json").read_text())["task"] == "pretrain"
    assert len(list((job.folder / "runs").glob("pretrain-*/summary.json"))) == 1


def test_the_stages_of_a_pipeline_wait_for_each_other_even_if_one_is_requeued(job):
    stages = ["task=pipeline", "task.stages=[pretrain,knn]", 'task.overrides.knn=["task.k=[5]"]']
    length = [o for o in STEPS if o.startswith(("task.", "checkpoint.")) and "precision" not in o]
    stages.append(f"task.overrides.pretrain={json.dumps([*length, 'task.precision=fp32'])}")
    job.say(pace=0.1)
    job.type(*(o for o in STEPS if not o.startswith(("task.", "checkpoint."))), *stages)
    first = Job(job.cluster, job.folder)
    first.run = job.run / "pretrain"
    first.wait_for_step(3)
    usr2_twice(first)
    first.wait_for_step(4, first.attempt)
    assert [line.split()[2] for line in job.ask(f"status={job.run}").splitlines()[1:3]] == ["PENDING", "RUNNING"]
    job.say(pace=0)
    wait_for(f"the summary\n{job.log()}", lambda: (job.run / "summary.json").exists(), 120, 0.5)
    assert set(json.loads((job.run / "summary.json").read_text())["stages"]) == {"pretrain", "knn"}


def test_the_stages_of_a_failed_pipeline_are_retried_in_their_order(job):
    short = json.dumps(["task.max_steps=4", "task.precision=fp32"])
    stages = ["task=pipeline", "task.stages=[pretrain,knn]", f"task.overrides.pretrain={short}"]
    stages.append('task.overrides.knn=["task.k=[5]"]')
    job.say(**{"raise": "0 2"})
    job.type(*(o for o in STEPS if not o.startswith(("task.", "checkpoint."))), *stages)

    def states() -> list[str]:
        return [line.split()[2] for line in job.ask(f"status={job.run}").splitlines()[1:3]]

    wait_for("both stages to end", lambda: not {"PENDING", "RUNNING"} & set(states()), 120, 0.5)
    assert "FAILED" in states()[1] and not (job.run / "knn" / "summary.json").exists()
    (job.folder / "raise").unlink()
    text = job.ask(f"retry_failed={job.run}", "launcher.timeout_min=30")
    assert text.index("pretrain/log.txt") < text.index("knn/log.txt")
    assert read_config(job.run / "pretrain").launcher.timeout_min == 30
    wait_for(f"the summary\n{job.log()}", lambda: (job.run / "summary.json").exists(), 120, 0.5)
    assert set(json.loads((job.run / "summary.json").read_text())["stages"]) == {"pretrain", "knn"}
    finished = json.loads((job.run / "knn" / "summary.json").read_text())["checkpoint"]
    assert finished.endswith("step_00000004")  # of the finished pre-training
    wait_for("the page", lambda: "unfinished" not in (job.run / "report.html").read_text(), 60, 0.5)


def test_a_sweep_of_pipelines_ends_with_its_table(job):
    sweep = job.folder / "sweep"
    short = json.dumps(["task.max_steps=2", "task.precision=fp32"])
    asked = [*(o for o in STEPS if not o.startswith(("task.", "checkpoint."))), "task=pipeline"]
    asked += ["task.stages=[pretrain,knn]", f"task.overrides.pretrain={short}", 'task.overrides.knn=["task.k=[5]"]']
    job.type("-m", *asked, "task.mask_ratio=0.5,0.75", f"hydra.sweep.dir={sweep}")
    table = sweep / "sweep.csv"
    wait_for("the table", lambda: table.exists() and table.read_text().count(",finished,") == 2, 200, 0.5)
    wait_for("the figure", (sweep / "sweep.svg").exists, 30, 0.5)


def test_a_job_runs_what_was_submitted_whatever_is_edited_later(job):
    checkout = job.folder / "checkout"
    for name in ("mae", "conf"):
        shutil.copytree(ROOT / name, checkout / name)
    shutil.copy(ROOT / "run.py", checkout)
    mine = checkout / "conf" / "launcher" / "slurm_mine.yaml"
    mine.write_text("defaults: [slurm, _self_]\nadditional_parameters: {hold: true}\n")
    process = job.start(*TINY_PRETRAIN, "launcher=slurm_mine", "task.max_steps=2", checkout=checkout)
    assert process.wait(60) == 0, (job.folder / "output.txt").read_text()
    shutil.rmtree(checkout / "conf")
    for path in (checkout / "mae").rglob("*.py"):
        path.write_text("raise RuntimeError('edited')\n")
    (job.run / "config.yaml").unlink()
    job.cluster.run("scontrol", "release", job.id)
    wait_for("the summary", lambda: (job.run / "summary.json").exists(), 90, 0.5)


def test_cancel_ends_a_job_which_the_same_command_takes_up(job, undisturbed):
    job.say(pace=0.3)
    job.type(*STEPS, "launcher.nodes=2", "launcher.gpus_per_node=1")
    job.wait_for_step(2)
    assert "is in the queue already" in job.type(*STEPS, "launcher.nodes=2", "launcher.gpus_per_node=1")
    assert f"Cancelled {job.id}" in job.ask(f"cancel={job.run}")
    assert job.cluster.field(job.id, "TresPerNode").endswith("gpu:1")  # stand-ins
    wait_for("the end", lambda: job.cluster.field(job.id, "JobState") == "CANCELLED", 30)
    assert (
        job.tasks() == []
        and job.cluster.field(job.id, "Restarts") == "0"
        and "CANCELLED" in job.ask(f"status={job.run}")
    )
    job.say(pace=0)
    job.type(*STEPS, "launcher.nodes=2", "launcher.gpus_per_node=1", "launcher.wait=true")
    assert digest(job.run) == digest(undisturbed)


def test_hydra_s_own_launcher_works_and_sees_a_crash_in_any_rank(job):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    given = {"nodes": 2, "tasks_per_node": 1, "cpus_per_task": 1, "timeout_min": 30, "signal_delay_s": 20}
    plugin = ["hydra/launcher=submitit_slurm", *(f"hydra.launcher.{key}={value}" for key, value in given.items())]
    faults = f"export PYTHONPATH={ROOT}/tests/faults:$PYTHONPATH MAE_TEST_FOLDER={job.folder}"
    plugin.append(f"hydra.launcher.setup=['{faults}']")
    for name, code in (("good", 0), ("bad", 1)):
        if code:
            job.say(**{"raise": "1 2"})
        words = [*TINY_PRETRAIN, *plugin, f"hydra.sweep.dir={job.folder / name}", "task.max_steps=4"]
        command = [sys.executable, str(ROOT / "run.py"), "-m", *words]
        ended = subprocess.run(command, env=job.cluster.env, capture_output=True, text=True, timeout=120)
        assert ended.returncode == code, ended.stdout + ended.stderr
        assert bool(list((job.folder / name).glob("*/summary.json"))) == (not code)
    assert "a deliberate mistake" in next((job.folder / "bad").glob("*/failure.json")).read_text()
    assert "FAILED" in job.cluster.run("sacct", "-X", "-n", "-o", "State")
    assert "2 cpu devices" in next((job.folder / "good").glob("*/log.txt")).read_text()


def test_workers_of_a_search_on_two_nodes_share_its_trials(job):
    pytest.importorskip("optuna")
    searched = ["optimizer.base_lr=tag(log,interval(1e-3,1e-1))", "model.decoder_depth=1,2"]
    options = ["--trials", "6", "--metric", "val_loss", "--no-prune", *TINY_PRETRAIN, *searched]
    workers = ["srun", "--label", "--nodes=2", "--ntasks=2", sys.executable, "-m", "mae.search", str(job.run), *options]
    env = job.cluster.env | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(workers, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(list(job.run.glob("trial_*/summary.json"))) == 6
    assert all(f"{task}: trial " in ended.stderr for task in (0, 1)), ended.stderr
    assert len((job.run / "sweep.csv").read_text().splitlines()) == 7


# ---------------------------------------------------------------- what cannot run, said before it is queued


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("launcher.partition=mian", "launcher.partition=mian does not exist on this cluster. Did you mean main?"),
        ("launcher.gpus_per_node=8", "launcher.gpus_per_node=8 GPUs, but no node of partition main has more than 2"),
        ("launcher.nodes=5", "launcher.nodes=5, but partition main has 3 such nodes."),
        ("launcher.cpus_per_task=64", "=64 CPUs, but no node of partition main has more than 8"),
        ("launcher.mem_gb=100", "=102400 MB, but no node of partition main has more than 8000"),
        ("launcher.partition=brief launcher.timeout_min=100", "is above the limit of partition brief, 60"),
        ("+launcher.additional_parameters={begin: never}", "SLURM refuses the job: Invalid --begin"),
        ("output_dir=LOCAL launcher.probe_s=10", "is not shared: this machine has it, and a node of the cluster does"),
        ("output_dir=/proc/mae", "output_dir: /proc/mae cannot be written to"),
    ],
)
def test_what_the_cluster_cannot_run_is_refused_in_a_sentence(job, override, sentence):
    split = [override] if "{" in override else override.split()
    text = job.type(
        *STEPS, *(o.replace("LOCAL", f"{job.cluster.folder}/local/run") for o in split), "task.batch_size=40", code=1
    )
    assert sentence in text and "Traceback" not in text and len(text.splitlines()) <= 2, text
    assert job.cluster.run("squeue", "-h") == ""
