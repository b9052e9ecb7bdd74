"""A search by Optuna: its ranges, its trials, and that it ends with as many as asked for whatever happens."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, TINY_PRETRAIN, composed

from mae.config.saved import read_config
from mae.errors import UserError
from mae.runs.files import write_json
from mae.tools import search, search_trial
from mae.tools.search_trial import SearchSettings

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
        (["task=finetune", "masking=block,grid"], "masking=block does nothing with task=finetune: leave it out."),
        (["task=knn", "init=RUN", "target=hog", "task.k=[5],[9]"], "target=hog does nothing with task=knn"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_a_sentence(arguments, message, tmp_path, capsys):
    assert search.main([str(tmp_path / "s"), *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("optimizer.base_lrr=0.1", "--first names optimizer.base_lrr, which is not searched. Did you mean"),
        ("optimizer.base_lr=2", "--first names optimizer.base_lr=2, which the search cannot choose: optimizer."),
        ("optimizer.base_lr=0.1,0.2", "--first names optimizer.base_lr=0.1,0.2, which the search cannot choose:"),
        ("model.depth=2.5", "--first names model.depth=2.5, which the search cannot choose: model.depth=int("),
        ("model.depth=true", "--first names model.depth=true, which the search cannot choose:"),
        ("optimizer.base_lr=0.2 masking=blok", "--first names masking=blok, which the search cannot choose:"),
        ("model.decoder_depth=2", "--first names model.decoder_depth=2, which the search cannot choose:"),
    ],
)
def test_first_values_that_the_search_cannot_choose_are_refused_in_a_sentence(first, message, tmp_path, capsys):
    searched = ["optimizer.base_lr=interval(0.1,1.0)", "masking=block,grid"]
    searched += ["model.depth=int(interval(1,4))", "model.decoder_depth=range(1,8,2)"]
    assert search.main([str(tmp_path / "s"), "--first", first, *searched]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_search_begins_with_the_values_that_are_named_and_chooses_the_rest(tmp_path):
    ranges = ["a.rate=tag(log,interval(1e-3,1.0))", "a.depth=int(interval(1,4))", "a.kind=x,y", "a.width=range(1,8,2)"]
    searched, _ = search.spaces(ranges)
    first = [search.first_trial(text, searched) for text in ("a.rate=0.25 a.depth=3 a.kind=y a.width=5", "a.width=7")]
    settings = SearchSettings(trials=3, metric="val_loss", seed=0, prune=False)
    values = []
    for _ in range(settings.trials):  # each as a worker that has just started
        study = search.open_study(tmp_path, settings.metric)
        following = search.next_trial(study, tmp_path, settings, first)
        assert following is not None
        trial, lock = following
        values.append([search.suggested(trial, key, space) for key, space in searched.items()])
        study.tell(trial, 1.0)
        lock.release()
    assert values[0] == ["0.25", "3", "y", "5"] and values[1][3] == "7"
    assert values[2] != values[0]
    assert search.next_trial(search.open_study(tmp_path, settings.metric), tmp_path, settings, first) is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_killed_twice_ends_with_its_trials_and_its_best(tmp_path):
    place = tmp_path / "search"
    for done in (1, 3):
        process = subprocess.Popen(command(place, 8), cwd=ROOT, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 200
        while not (place / f"trial_{done:04d}" / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.kill()
        process.wait()
    subprocess.run(command(place, 8), cwd=ROOT, check=True, capture_output=True)
    found = trials_of(place)
    assert len(found) == 8 and all(trial.state.is_finished() for trial in found)
    states = [trial.state.name for trial in found]
    assert states.count("COMPLETE") >= 4 and "FAIL" not in states
    best = min((t for t in found if t.state.name == "COMPLETE"), key=lambda t: t.value)
    page = (place / "report.html").read_text()
    assert f'"best": "trial_{best.number:04d}"' in page
    with (place / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {"optimizer.base_lr", "model.decoder_depth"} <= rows[0].keys()
    assert {row["state"] for row in rows} <= {"finished", "pruned"}


@pytest.mark.slow
def test_two_workers_share_the_trials(tmp_path):
    place = tmp_path / "search"
    workers = [subprocess.Popen(command(place, 4, "--no-prune"), cwd=ROOT, stderr=subprocess.DEVNULL) for _ in "ab"]
    assert [worker.wait(200) for worker in workers] == [0, 0]
    assert [trial.state.name for trial in trials_of(place)] == ["COMPLETE"] * 4


@pytest.mark.slow
def test_what_init_auto_pre_trains_with_is_not_said_to_the_trials(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["task=finetune", "init=auto", "masking=block", "optimizer.base_lr=interval(0.001,0.01)"]
    words += [*TINY, "task.batch_size=32", "task.max_steps=2", "task.warmup_epochs=0"]
    search.search(tmp_path / "s", SearchSettings(1, "top1", seed=0, prune=False), words)
    assert "masking" not in (tmp_path / "s" / "trial_0000" / "overrides.yaml").read_text()
    (parent,) = (tmp_path / "runs").glob("pretrain-*/config.yaml")
    assert read_config(parent.parent).masking.name == "block"


@pytest.mark.parametrize(
    ("words", "metric"),
    [
        ([], "val_loss"),
        (["task=knn", "init=RUN"], "knn"),
        (["task=segment", "data=digit_scenes"], "miou"),
        (["task=pipeline", "task.stages=[pretrain,linprobe]"], "top1"),
        (["task=pipeline", "task.stages=[pretrain,visualize]"], "val_loss"),
    ],
)
def test_a_search_is_for_the_result_of_its_task(words, metric):
    assert search.usual_metric(composed(*words)) == metric


def test_a_search_of_a_task_without_results_asks_for_one():
    with pytest.raises(UserError, match="task=embed has no result to search by: name a number of its summary"):
        search.usual_metric(composed("task=embed", "init=RUN"))


@pytest.mark.parametrize(("metric", "value"), [("knn", 61.0), ("seconds", 2.5), ("top7", None)])
def test_the_result_of_a_trial_is_a_number_of_its_summary(metric, value, tmp_path, monkeypatch):
    def finish(run: Path, *_: object) -> bool:
        run.mkdir()
        write_json(run / "summary.json", {"task": "knn", "seconds": 2.5, "knn": {"5": 61.0, "10": 60.0}})
        return False

    monkeypatch.setattr(search_trial, "watch_trial", finish)
    study = search.open_study(tmp_path, metric)
    settings = SearchSettings(1, metric, seed=0, prune=False)
    if value is None:
        with pytest.raises(UserError, match="trial 0 has no top7. --metric can be knn, seconds."):
            search_trial.run_trial(study, study.ask(), tmp_path, [], settings)
    else:
        search_trial.run_trial(study, study.ask(), tmp_path, [], settings)
    assert [trial.value for trial in study.get_trials()] == [value]


OPEN = """
import sys, time
from pathlib import Path
from mae.tools import search
Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
search.open_study(Path(sys.argv[1]), "val_loss")
"""


def test_a_search_by_another_metric_in_the_same_directory_is_refused(tmp_path):
    search.open_study(tmp_path, "top1")
    search.open_study(tmp_path, "top1")
    with pytest.raises(UserError, match="is a search by top1, not loss: name another directory"):
        search.open_study(tmp_path, "loss")


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
    searched, _ = search.spaces(
        ["model.depth=int(interval(2,9))", "seed=int(interval(0,9999999))", "optimizer.base_lr=interval(0.1,1.0)"]
    )
    trial = optuna.create_study().ask()
    depth = search.suggested(trial, "model.depth", searched["model.depth"])
    assert depth == str(int(depth)) and 2 <= int(depth) <= 9
    assert search.suggested(optuna.trial.FixedTrial({"seed": 1234567}), "seed", searched["seed"]) == "1234567"
    assert 0.1 <= float(search.suggested(trial, "optimizer.base_lr", searched["optimizer.base_lr"])) <= 1.0
