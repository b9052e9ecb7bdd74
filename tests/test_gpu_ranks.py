"""Acceptance suite, checks 20 to 25: several GPUs under NCCL, or two processes under gloo; speed. See docs/gpu.md."""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from gpu_suite import (
    AUTO,
    DEVICE,
    ON_GPU,
    RANKS,
    SMALL_PRETRAIN,
    SUITE,
    gpu_alone,
    lines,
    needs_gpus,
    own_settings,  # noqa: F401
)
from test_distributed import HANGING, losses, on_ranks, spoiled, torchrun, trained, weights

from mae import checkpoint
from mae.runs import files
from mae.runs.checkpoints import newest_valid

pytestmark = SUITE
several = needs_gpus(2)

BASE = [*SMALL_PRETRAIN, "data.fraction=0.15", "task.epochs=2"]  # 216 images in 7 steps, the last of 24
CLOSE = 1e-3 if ON_GPU else 1e-6  # TF32 rounds each rank's share otherwise


@several
def test_20_one_process_equals_several_and_gradients_are_exchanged_once_a_step(tmp_path):
    one = trained(0, tmp_path / "one", BASE)
    several = on_ranks(RANKS, tmp_path / "several", functools.partial(trained, overrides=BASE))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "several"), rel=CLOSE)
    assert len({result["digest"] for result in several}) == 1
    assert {result["reduces"] for result in several} == {several[0]["steps"]} == {one["steps"]}


@several
@pytest.mark.parametrize("precision", [
    "fp64",  # keys' biases have no gradient but rounding, which Adam turns into steps
    pytest.param("fp16", marks=gpu_alone("the same steps are taken in fp64; fp16's scale is check 9")),
])  # fmt: skip
def test_21_sharded_weights_train_as_whole_ones_and_go_from_two_ranks_to_one_to_two(tmp_path, precision):
    overrides = [*BASE, f"task.precision={precision}", "task.max_steps=6"]
    overrides += ["checkpoint.every_epochs=0.14", "checkpoint.keep=100"]
    sharded, chain = [*overrides, "launcher.sharding=full"], tmp_path / "chain"
    both = functools.partial(trained_twice, whole=overrides, sharded=sharded, port=free_port())
    (whole, one), (_, other) = on_ranks(2, tmp_path, both)
    assert one["held"] + other["held"] == whole["held"] and one["held"] < 0.6 * whole["held"]
    forget_after(chain, 2)
    trained(0, chain, overrides)
    forget_after(chain, 4)
    on_ranks(2, chain, functools.partial(trained, overrides=sharded))
    close = 1e-5 if precision == "fp64" else 1e-2
    assert losses(chain) == pytest.approx(losses(tmp_path / "whole"), rel=close)
    if precision == "fp64":
        for name, tensor in weights(tmp_path / "whole" / "run").items():
            assert (weights(chain / "run")[name] - tensor).abs().max() < 1e-5, name


def trained_twice(rank: int, folder: Path, whole: list[str], sharded: list[str], port: int) -> list[dict[str, Any]]:
    """Trains with whole weights and then with sharded ones, in the same processes."""
    results = [trained(rank, folder / "whole", whole)]
    os.environ["MASTER_PORT"] = str(port)
    return [*results, trained(rank, folder / "chain", sharded)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def forget_after(folder: Path, count: int) -> None:
    """As if the run had been killed after so many checkpoints."""
    for path in checkpoint.checkpoints_of(folder / "run")[count:]:
        shutil.rmtree(path)


@several
def test_22_a_loss_of_one_rank_that_is_not_a_number_skips_the_step_of_all(tmp_path):
    results = on_ranks(2, tmp_path, functools.partial(spoiled, overrides=[*BASE, "task.max_steps=5"]))
    assert results[0]["digest"] == results[1]["digest"]
    assert [loss is None for loss in losses(tmp_path)][:5] == [False, False, True, False, False]


@several
def test_22_a_signal_ends_all_ranks_with_a_checkpoint(tmp_path):
    command = [sys.executable, str(ROOT / "run.py"), *BASE, "task.epochs=2000", f"launcher.processes={RANKS}"]
    process = subprocess.Popen(
        [*command, f"output_dir={tmp_path}"], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )
    try:
        end = time.monotonic() + 200
        while len(files.read_json_lines(tmp_path / "metrics.jsonl")) < 4:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130 and newest_valid(tmp_path) is not None


@several
@gpu_alone("tests/test_distributed.py runs the same script over gloo, as a slow test")
def test_22_a_rank_that_hangs_ends_the_run_and_says_where(tmp_path):
    script = tmp_path / "hanging.py"
    script.write_text(HANGING.format(root=str(ROOT)))
    result = torchrun(*BASE, "launcher.timeout_s=20", f"output_dir={tmp_path / 'run'}", script=script)
    assert result.returncode == 1 and "process 1 has not moved for" in result.stderr
    assert "stuck_in_a_mount" in (tmp_path / "run" / "log.txt").read_text()


@several
def test_23_processes_that_see_one_gpu_each_start_with_auto(tmp_path):
    """As a cluster that binds a GPU to each task."""
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "run.py"), *BASE, f"device={AUTO}", "task.micro_batch_size=auto"]
    command += ["task.max_steps=2", f"output_dir={tmp_path}"]
    processes = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank) if ON_GPU else ""}
        processes.append(subprocess.Popen(command, env=os.environ | address | own, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2
    derived = next(row for row in files.read_json_lines(tmp_path / "metrics.jsonl") if "derived/devices" in row)
    assert derived["derived/devices"] == 2 and len(lines(tmp_path)) >= 2


@pytest.fixture(scope="module")
def speed(tmp_path_factory) -> dict[int, dict[str, float]]:
    """The rows of benchmarks/gpu.py at tiny sizes; whether they reach their goals is the script's to say."""
    file = tmp_path_factory.mktemp("speed") / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--device", DEVICE, "--json", str(file)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    return {row["row"]: row for row in json.loads(file.read_text())}


@several
def test_24_scaling_and_the_hidden_part_of_the_exchange_are_measured(speed):
    assert speed[106]["ratio"] > 0  # a busy machine makes the hidden part of so short an exchange negative
    assert speed[107]["ratio"] <= 1 and speed[107]["peer"] > 0


@pytest.mark.parametrize("row", [10, 101, 102, 103, 104, 105])
def test_25_speed_utilisation_launches_loader_and_stall_are_measured(speed, row):
    assert 0 < speed[row]["ratio"] < float("inf") and speed[row]["ours"] > 0
