"""A search by Optuna: its ranges, its trials, and that it ends with as many as asked for whatever happens."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_PRETRAIN

from mae.tools import search

optuna = pytest.importorskip("optuna")

SMALL = [*TINY_PRETRAIN, "task.eval_every_epochs=0.5", "optimizer.base_lr=tag(log,interval(1e-3,1e-1))"]
SMALL += ["model.decoder_depth=choice(1,2)", "optimizer.weight_decay=interval(0.0,0.1)"]


def command(directory: Path, trials: int, *more: str) -> list[str]:
    options = ["--trials", str(trials), "--metric", "val_loss"]
    return [sys.executable, "-m", "mae.search", str(directory), *options, *more, *SMALL]


def trials_of(directory: Path) -> list:
    return search.open_study(directory, "val_loss").get_trials()


def test_ranges_are_read_as_hydra_writes_them():
    searched, fixed = search.spaces(["task=finetune", "a.x=interval(0,1)", "a.y=1,2", "a.z=range(1,9,2)"])
    assert fixed == ["task=finetune"] and list(searched) == ["a.x", "a.y", "a.z"]
    trial = optuna.trial.FixedTrial({"a.x": 0.25, "a.y": "2", "a.z": 7})
    assert [search.suggested(trial, key, space) for key, space in searched.items()] == ["0.25", "2", "7"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=finetune"], "Nothing is searched: give a key a range"),
        (["optimizer.base_lrr=interval(0.1,1.0)"], "optimizer.base_lrr is not a key of the configuration."),
        (["task.mask_ratio=interval(1.5,2.5)"], "task.mask_ratio must lie in (0, 1), got 1.5."),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_a_sentence(arguments, message, tmp_path, capsys):
    assert search.main([str(tmp_path / "s"), *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not (tmp_path / "s").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_killed_twice_ends_with_twelve_trials_and_its_best(tmp_path):
    place = tmp_path / "search"
    for done in (2, 5):
        process = subprocess.Popen(command(place, 12), cwd=ROOT, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 200
        while not (place / f"trial_{done:04d}" / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.kill()
        process.wait()
    subprocess.run(command(place, 12), cwd=ROOT, check=True, capture_output=True)
    found = trials_of(place)
    assert len(found) == 12 and all(trial.state.is_finished() for trial in found)
    states = [trial.state.name for trial in found]
    assert states.count("COMPLETE") >= 4 and "FAIL" not in states
    best = min((t for t in found if t.state.name == "COMPLETE"), key=lambda t: t.value)
    page = (place / "report.html").read_text()
    assert f'"best": "trial_{best.number:04d}"' in page
    with (place / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and {"optimizer.base_lr", "model.decoder_depth"} <= rows[0].keys()
    assert {row["state"] for row in rows} <= {"finished", "pruned"}


@pytest.mark.slow
def test_two_workers_share_the_trials(tmp_path):
    place = tmp_path / "search"
    workers = [subprocess.Popen(command(place, 4, "--no-prune"), cwd=ROOT, stderr=subprocess.DEVNULL) for _ in "ab"]
    assert [worker.wait(200) for worker in workers] == [0, 0]
    assert [trial.state.name for trial in trials_of(place)] == ["COMPLETE"] * 4


OPEN = """
import sys, time
from pathlib import Path
from mae.tools import search
Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
search.open_study(Path(sys.argv[1]), "val_loss")
"""


def test_workers_that_begin_at_the_same_moment_open_one_study(tmp_path):
    ready, go = [tmp_path / name for name in "abc"], tmp_path / "go"
    words = [sys.executable, "-c", OPEN, str(tmp_path / "search")]
    workers = [
        subprocess.Popen([*words, str(one), str(go)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for one in ready
    ]
    until = time.monotonic() + 100
    while not all(one.exists() for one in ready):
        assert time.monotonic() < until
        time.sleep(0.01)
    go.touch()
    for worker in workers:
        text = worker.communicate(timeout=60)[1]
        assert worker.returncode == 0, text
    assert trials_of(tmp_path / "search") == []


@pytest.mark.slow
def test_a_search_that_is_asked_to_stop_leaves_a_trial_to_go_on_with(tmp_path):
    place = tmp_path / "search"
    long = [*command(place, 1), "task.epochs=200"]
    process = subprocess.Popen(long, cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 100
    while not (place / "trial_0000" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    (trial,) = trials_of(place)
    assert trial.state.name == "RUNNING"
    assert list((place / "trial_0000" / "checkpoints").glob("step_*"))


def test_whole_numbers_are_searched_as_whole_numbers():
    import optuna

    searched, _ = search.spaces(["model.depth=int(interval(2,9))", "optimizer.base_lr=interval(0.1,1.0)"])
    trial = optuna.create_study().ask()
    depth = search.suggested(trial, "model.depth", searched["model.depth"])
    assert depth == str(int(depth)) and 2 <= int(depth) <= 9
    assert 0.1 <= float(search.suggested(trial, "optimizer.base_lr", searched["optimizer.base_lr"])) <= 1.0
