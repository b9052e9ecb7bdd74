"""Runs that earlier versions of this program wrote go on, are reported, evaluated and exported.

`tests/runs/DATE` holds a pre-training and a fine-tuning of it, made by the commit of that day with a model of one block
on the embedded digits (2026-11-24: 53c98f8, 2026-11-26: 6ddfaff, 2026-11-28: d27d0b6).
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_cli
from hydra import compose, initialize_config_dir

from mae import checkpoint
from mae.config.check import check_config, resolve, with_values
from mae.config.from_run import with_groups, with_run_values
from mae.config.identity import run_directory
from mae.config.saved import read_config
from mae.launch import launch
from mae.report import run as report

DATES = sorted(path.name for path in (ROOT / "tests" / "runs").iterdir())


@pytest.fixture(params=DATES)
def old(request, tmp_path, monkeypatch) -> Path:
    """The directory of an earlier version's runs, copied to where they may be written to."""
    shutil.copytree(ROOT / "tests" / "runs" / request.param, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def start(*arguments: str) -> int:
    """What run.py does with a command line, in this process; returns the exit code."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = with_run_values(compose("config", with_groups(arguments)), arguments)
        return launch.launch(check_config(resolve(cfg)), list(arguments))


def test_there_are_three_versions():
    assert len(DATES) == 3


@pytest.mark.parametrize(("name", "last"), [("pretrain", 10), pytest.param("finetune", 8, marks=pytest.mark.slow)])
def test_a_run_goes_on_from_its_checkpoint(old, name, last):
    run = old / name
    before = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / f"step_{last:08d}")
    done = run_cli(f"resume={run}", cwd=old)
    assert done.returncode == 0, done.stderr
    after = json.loads((run / "summary.json").read_text())
    assert after["steps"] == before["steps"] == last
    key = "val_loss" if name == "pretrain" else "loss"
    assert after[key] == pytest.approx(before[key], rel=1e-4)
    steps = [row["step"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert steps == list(range(1, last + 1))  # those after the checkpoint are written anew, none twice


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_the_same_command_comes_back_to_its_directory(old, name):
    cfg = with_values(read_config(old / name), output_dir=None)
    assert not run_directory(cfg).exists()
    directory = Path("runs") / f"{name}-{cfg.model.name}-{cfg.data.name}-01234567"  # another hash than today's
    shutil.copytree(old / name, directory)
    assert run_directory(cfg) == directory
    assert run_directory(with_values(cfg, seed=5)) != directory
    (directory / "config.yaml").write_text("- 1\n")
    assert run_directory(cfg) != directory


def test_a_run_is_reported_and_its_checkpoints_are_whole(old):
    for name in ("pretrain", "finetune"):
        report.write_report(old / name)
        assert (old / name / "report.html").read_text().startswith("<!doctype html>")
        steps = [checkpoint.verify(path)["step"] for path in checkpoint.checkpoints_of(old / name)]
        assert steps == ([5, 10] if name == "pretrain" else [4, 8])


def test_other_tasks_start_from_a_run(old):
    small = ["device=cpu", "data.num_workers=0"]
    assert start("task=knn", "init=pretrain", "task.k=[3]", *small, "output_dir=knn") == 0
    assert start("task=evaluate", "init=finetune", *small, "output_dir=evaluate") == 0
    assert start("task=export", "init=finetune", "task.format=timm", *small, "output_dir=export") == 0
    evaluated = json.loads((old / "evaluate" / "summary.json").read_text())
    assert evaluated["top1"] == pytest.approx(json.loads((old / "finetune" / "summary.json").read_text())["top1"])
    assert (old / "export" / "export" / "timm" / "config.json").is_file()
