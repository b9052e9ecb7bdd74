"""One process at a time writes into a run's directory; the others say who does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_PRETRAIN, run_cli, run_here

from mae import checkpoint
from mae.launch.slurm import status
from mae.report import run as report
from mae.runs import attempt as fence
from mae.runs import checkpoints, locks

LONG = [*TINY_PRETRAIN, "task.epochs=2000", "checkpoint.every_minutes=60", "checkpoint.every_epochs=1000"]


def started(run: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run.py"), *overrides, f"output_dir={run}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_metrics(run: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)


@pytest.fixture
def running(tmp_path):
    """A run that goes on until the test ends it."""
    process = started(tmp_path / "run", *LONG)
    wait_for_metrics(tmp_path / "run", process)
    yield process, tmp_path / "run"
    process.kill()
    process.wait()


def test_the_same_command_twice_at_once_trains_once(tmp_path):
    command = [*TINY_PRETRAIN, "task.epochs=20"]
    both = [started(tmp_path, *command) for _ in range(2)]
    said = [process.communicate(timeout=200)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    refused = said[[process.returncode for process in both].index(1)]
    winner = both[[process.returncode for process in both].index(0)]
    assert f"is in use: process {winner.pid} on {socket.gethostname()} has been running there since" in refused
    assert "Traceback" not in refused
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    losses = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(losses) == 100


def test_who_runs_is_named_and_readers_need_no_lock(running):
    process, run = running
    refused = run_cli(*LONG, f"output_dir={run}")
    assert refused.returncode == 1
    said = rf"{run} is in use: process {process.pid} on \S+ has been running there since \d{{4}}-\d\d-\d\d \d\d:"
    assert re.search(said, refused.stderr), refused.stderr
    assert "another output_dir= starts a second run" in refused.stderr
    assert process.poll() is None and not (run / "failure.json").exists()
    report.write_report(run)
    assert (run / "report.html").exists() and checkpoint.main([str(run)]) == 0
    assert "UNFINISHED" in status.status_table(run)
    before = (run / "config.yaml").read_text()
    assert "is in use" in run_cli(*LONG, "seed=7", f"output_dir={run}").stderr
    assert (run / "config.yaml").read_text() == before


def test_a_killed_process_leaves_no_lock_behind_even_where_workers_outlive_it(tmp_path):
    workers = ["data.workers=process", "data.num_workers=2"]
    process = started(tmp_path, *LONG, *workers)
    wait_for_metrics(tmp_path, process)
    process.kill()
    process.wait()
    with locks.held_run(tmp_path):
        assert locks.holder(tmp_path)["pid"] == os.getpid()


@pytest.mark.slow
def test_several_processes_of_one_run_share_it_and_keep_others_out(tmp_path):
    process = started(tmp_path, *LONG, "launcher.processes=2", "data.num_workers=0")
    try:
        wait_for_metrics(tmp_path, process)
        holder = locks.holder(tmp_path)["pid"]
        assert holder != process.pid  # the first rank, which outlives a launcher that is killed
        with pytest.raises(ValueError, match=rf"is in use: process {holder} on"):
            run_here(tmp_path, *LONG)
        process.kill()
        process.wait()
    finally:
        process.kill()
    end = time.monotonic() + 60
    while not locks.is_free(tmp_path / locks.RUN) and time.monotonic() < end:
        time.sleep(0.1)
    assert locks.is_free(tmp_path / locks.RUN) and checkpoints.newest_valid(tmp_path) is not None  # it saved first


def test_a_process_may_enter_its_own_run_again(tmp_path):
    with locks.held_run(tmp_path):
        with locks.held_run(tmp_path):
            pass
        assert not free_for_others(tmp_path)
    assert free_for_others(tmp_path)


def free_for_others(run: Path, attempt: str | None = None) -> bool:
    """Whether another process can take a run."""
    code = "import sys; from pathlib import Path; from mae.runs.locks import held_run\n"
    code += "with held_run(Path(sys.argv[1])): print('taken')"
    env = {k: v for k, v in os.environ.items() if k != fence.NAME} | ({fence.NAME: attempt} if attempt else {})
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, env=env)
    return done.stdout == "taken\n"


# ---------------------------------------------------------------- jobs that are started again


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch):
    monkeypatch.setattr(locks, "ENDING_S", 0.2)


def test_a_new_attempt_goes_on_beside_an_older_one_that_lives_on(tmp_path, monkeypatch):
    monkeypatch.setenv(fence.NAME, "7.0")
    with locks.held_run(tmp_path):
        assert free_for_others(tmp_path, "7.1")  # the fence keeps 7.0 from writing
        assert not free_for_others(tmp_path)  # what is typed on a login node does not


def test_an_attempt_does_not_join_what_was_started_by_hand(tmp_path):
    with locks.held_run(tmp_path):
        assert not free_for_others(tmp_path, "7.0")


def test_an_older_attempt_that_ends_hands_the_lock_over(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "ENDING_S", 30.0)
    code = "import os, sys, time; from pathlib import Path; from mae.runs.locks import held_run\n"
    code += "with held_run(Path(sys.argv[1])): print('taken', flush=True); time.sleep(60)"
    old = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {fence.NAME: "7.0"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert old.stdout is not None and old.stdout.readline() == "taken\n"
    old.send_signal(signal.SIGKILL)
    old.wait()
    monkeypatch.setenv(fence.NAME, "7.1")
    with locks.held_run(tmp_path):
        assert locks.holder(tmp_path)["attempt"] == "7.1"
