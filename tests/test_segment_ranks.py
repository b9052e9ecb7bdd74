"""Segmentation over two real ranks: the figures of one, and the same bits after a kill."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, composed, run_here
from test_distributed import losses, on_ranks, ranks_of, trained, weights
from test_evaluate import work_on
from test_segment import TINY_SCENES, TINY_SEGMENT

from mae.launch import launch
from mae.runs.files import read_json_lines

pytestmark = pytest.mark.slow
FIGURES = ("val/miou", "val/pixel_accuracy", "val/mean_accuracy", "val/loss")


def test_two_ranks_learn_what_one_does_and_measure_the_same(tmp_path):
    """Crops have no border to ignore, so that the means over the pixels of two micro-batches are those of one."""
    command = [*TINY_SEGMENT, "augmentation.scale=[1.0,1.0]", "task.drop_path=0", "task.eval_every_epochs=1"]
    command += ["optimizer.base_lr=0.01", "task.log_every_steps=1"]
    for world in (1, 2):
        results = on_ranks(world, tmp_path / str(world), functools.partial(trained, overrides=command))
        assert len({each["digest"] for each in results}) == 1 and results[0]["steps"] == 6
    one, two = tmp_path / "1", tmp_path / "2"
    assert len(losses(one)) >= 6 and losses(one) == pytest.approx(losses(two), rel=1e-4)
    for name, tensor in weights(one / "run").items():
        torch.testing.assert_close(weights(two / "run")[name], tensor, rtol=1e-3, atol=1e-5)
    rows = [[row for row in read_json_lines(run / "run" / "metrics.jsonl") if "val/miou" in row] for run in (one, two)]
    assert len(rows[0]) == 2 and rows[0][-1]["val/miou"] > 0
    for first, second in zip(*rows, strict=True):
        assert [first[key] for key in FIGURES] == pytest.approx([second[key] for key in FIGURES], rel=1e-3)


def test_an_evaluation_counts_alike_on_one_rank_and_on_two(tmp_path):
    assert run_here(tmp_path / "run", *TINY_SEGMENT, "task.max_steps=2") == 0
    command, figures = ["task=evaluate", *TINY_SCENES, f"init={tmp_path / 'run'}"], []
    for world in (1, 2):
        run = tmp_path / f"on_{world}"
        launch.prepare(composed(*command, f"output_dir={run}"), command)
        work_on(world, run)
        summary = json.loads((run / "summary.json").read_text())
        figures.append([summary[key] for key in ("miou", "pixel_accuracy", "mean_accuracy")])
        figures.append((run / "iou.csv").read_text())
    assert figures[:2] == figures[2:]


def started(run: Path) -> subprocess.Popen[bytes]:
    command = [*TINY_SEGMENT, "task.epochs=25", "checkpoint.every_epochs=1", "launcher.processes=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "run.py"), *command, f"output_dir={run}"], env=environment)


def test_two_ranks_that_were_killed_go_on_to_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert started(whole).wait(240) == 0
    process = started(killed)
    try:
        deadline = time.monotonic() + 120
        while not list((killed / "checkpoints").glob("step_*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        for pid in [*ranks_of(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)
    finally:
        process.kill()
    process.wait()
    assert not (killed / "summary.json").exists()
    assert started(killed).wait(240) == 0
    assert "goes on from" in (killed / "log.txt").read_text()
    names = [path.name for path in sorted((whole / "checkpoints").glob("step_*"))]
    files = [run / "checkpoints" / names[-1] / "model.safetensors" for run in (whole, killed)]
    assert names[-1] == "step_00000075" and files[0].read_bytes() == files[1].read_bytes()
    assert (
        json.loads((whole / "summary.json").read_text())["miou"]
        == json.loads((killed / "summary.json").read_text())["miou"]
    )
