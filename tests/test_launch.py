"""Runs that are killed, stopped or fail go on to the same bits, or end in a sentence; none leaves a process behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_PRETRAIN, run_cli

from mae import checkpoint
from mae.runs import checkpoints, files
from mae.runs.failure import write_failure

OFTEN = [*TINY_PRETRAIN, "checkpoint.every_epochs=0.2", "task.epochs=6", "data.fraction=0.3"]


def started(run: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *OFTEN, f"output_dir={run}", *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MAE_TEST_RUN": str(run)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def step_of(run: Path) -> int:
    rows = files.read_json_lines(run / "metrics.jsonl")
    return max((row["step"] for row in rows), default=0)


def wait_for_step(run: Path, process: subprocess.Popen, step: int, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while step_of(run) < step and process.poll() is None:
        assert time.monotonic() < end, f"step {step_of(run)} of {step} after {seconds} s"
        time.sleep(0.02)


def digest(run: Path) -> str:
    path = checkpoints.newest_valid(run)
    assert path is not None
    return checkpoint.weights_digest(checkpoint.read_weights(path))


def told_losses(run: Path) -> list[float]:
    return [row["loss"] for row in files.read_json_lines(run / "metrics.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = run_cli(*OFTEN, f"output_dir={run}")
    assert ended.returncode == 0, ended.stderr
    return run


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_changes_no_bit(undisturbed, tmp_path, kills):
    run, chance = tmp_path / "run", random.Random(9)
    for _ in range(kills):
        process = started(run)
        wait_for_step(run, process, step_of(run) + chance.randint(1, 12))
        time.sleep(chance.random() * 0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    ended = run_cli(*OFTEN, f"output_dir={run}")
    assert ended.returncode == 0, ended.stderr
    assert digest(run) == digest(undisturbed)
    assert told_losses(run) == told_losses(undisturbed)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGUSR2, signal.SIGINT))],
)
def test_a_signal_saves_and_the_same_command_goes_on(undisturbed, tmp_path, number):
    run = tmp_path / "run"
    process = started(run, "checkpoint.every_epochs=100")
    wait_for_step(run, process, 5)
    process.send_signal(number)
    ended, _ = process.communicate(timeout=60)
    assert process.returncode == 130, ended
    assert "the same command goes on from it" in ended and "Traceback" not in ended
    assert len(checkpoint.checkpoints_of(run)) == 1 and not (run / "summary.json").exists()
    ended = run_cli(*OFTEN, "checkpoint.every_epochs=100", f"output_dir={run}")
    assert ended.returncode == 0, ended.stderr
    assert digest(run) == digest(undisturbed)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["data.workers=thread"], marks=pytest.mark.slow),
        pytest.param(["data.workers=process"], marks=pytest.mark.slow),
        ["launcher.processes=2"],
    ],
)
def test_ctrl_c_in_a_terminal_reaches_workers_and_ranks_too_and_stops_none_of_them(tmp_path, more):
    run = tmp_path / "run"
    process = started(run, "checkpoint.every_epochs=100", "task.epochs=60", "data.num_workers=2", *more)
    wait_for_step(run, process, 5)
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from it" in text, text
    assert len(checkpoint.checkpoints_of(run)) == 1 and living(run) == []


def test_ctrl_c_while_ranks_begin_ends_them(tmp_path):
    run = tmp_path / "run"
    process = started(run, "launcher.processes=2", "task.epochs=60")
    end = time.monotonic() + 60
    while len(ranks_of(run)) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(1.5)  # they import torch: none takes signals itself yet
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and living(run) == [], text


def test_the_failure_of_a_rank_takes_the_place_of_those_it_left_alone(tmp_path):
    for rank, lost in ((0, True), (1, False), (2, True), (3, False)):
        write_failure(tmp_path, rank, RuntimeError(f"of {rank}"), lost)
        results = json.loads((tmp_path / "failure.json").read_text())
        assert results["rank"] == min(rank, 1) and results["error"] == f"RuntimeError: of {min(rank, 1)}"


def living(run: Path) -> list[int]:
    """Processes of a run that live, found by what `started` wrote into their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            alive = (path / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
            if alive and f"MAE_TEST_RUN={run}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def ranks_of(run: Path) -> list[int]:
    """Those of them that are ranks."""
    return [p for p in living(run) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


@pytest.mark.slow
def test_several_processes_killed_together_go_on_to_the_same_bits(tmp_path):
    two = ["launcher.processes=2", "task.epochs=2", "task.log_every_steps=3"]  # a mean that spans the kill, too
    for name, kill in (("whole", False), ("cut", True)):
        run = tmp_path / name
        process = started(run, *two)
        if kill:
            wait_for_step(run, process, 4)
            for pid in living(run):
                os.kill(pid, signal.SIGKILL)
            process.wait()
            process = started(run, *two)
        text, _ = process.communicate(timeout=200)
        assert process.returncode == 0, text
    assert digest(tmp_path / "whole") == digest(tmp_path / "cut")
    assert told_losses(tmp_path / "whole") == told_losses(tmp_path / "cut")


@pytest.mark.parametrize("victim", ["one", pytest.param("all", marks=pytest.mark.slow)])
def test_sigterm_to_a_run_of_two_saves_once(tmp_path, victim):
    run = tmp_path / "run"
    process = started(run, "launcher.processes=2", "checkpoint.every_epochs=100", "task.epochs=60")
    wait_for_step(run, process, 5)
    ranks = ranks_of(run)
    assert len(ranks) == 2
    os.kill(ranks[0] if victim == "one" else process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=100)
    assert process.returncode not in (0, 1), text
    assert len(checkpoint.checkpoints_of(run)) == 1 and checkpoints.newest_valid(run) is not None
    assert living(run) == []


def test_a_rank_that_is_killed_ends_the_run(tmp_path):
    run = tmp_path / "run"
    process = started(run, "launcher.processes=2", "task.epochs=100")
    wait_for_step(run, process, 3)
    victim = ranks_of(run)[0]
    begin = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - begin < 60
    assert "it was killed by SIGKILL" in text and "Traceback" not in text
    assert living(run) == []


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "says"), [("raise", "a deliberate mistake"), ("exit", "it exited with code 3")])
def test_a_rank_that_fails_ends_the_run_in_its_own_words(tmp_path, monkeypatch, fault, says):
    run = tmp_path / "run"
    (tmp_path / fault).write_text("1 3")  # rank 1 at step 3
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "faults"))
    monkeypatch.setenv("MAE_TEST_FOLDER", str(tmp_path))
    process = started(run, "launcher.processes=3", "task.batch_size=48", "task.epochs=100")
    wait_for_step(run, process, 3)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Process 1 of the run failed" in text and says in text, text
    assert living(run) == []


@pytest.mark.slow
def test_ranks_end_where_their_launcher_alone_is_killed(tmp_path):
    run = tmp_path / "run"
    process = started(run, "launcher.processes=2", "checkpoint.every_epochs=100", "task.epochs=100")
    wait_for_step(run, process, 5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 60
    while living(run) and time.monotonic() < end:
        time.sleep(0.2)
    assert living(run) == [] and checkpoints.newest_valid(run) is not None


def test_a_user_s_error_in_several_processes_is_one_sentence(tmp_path):
    (tmp_path / "photos").mkdir()
    ended = run_cli(
        *TINY_PRETRAIN,
        "data=folder",
        f"data.root={tmp_path / 'photos'}",
        "launcher.processes=2",
        f"output_dir={tmp_path / 'run'}",
    )
    assert ended.returncode == 1 and "no image lies under" in ended.stderr
    assert "Traceback" not in ended.stderr.splitlines()[-1]
