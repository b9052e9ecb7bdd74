"""Ranks agree: on weights, on losses, on when to stop. Real processes over gloo."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import TINY_PRETRAIN, composed

from mae import checkpoint, engine, launch, setup, track
from mae.distributed import assert_same, start

BASE = [*TINY_PRETRAIN, "data.fraction=0.15", "task.epochs=4"]  # 216 images in 7 steps, the last of 24


def rank_main(rank: int, world: int, port: int, folder: str, work: Callable[[int, Path], Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.save(work(rank, Path(folder)), Path(folder) / f"told_{rank}.pt")


def on_ranks(world: int, folder: Path, work: Callable[[int, Path], Any]) -> list[Any]:
    """What `work` returns on each of `world` real processes."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(rank_main, (world, port, str(folder), work), nprocs=world)  # type: ignore[attr-defined]
    return [torch.load(folder / f"told_{rank}.pt", weights_only=False) for rank in range(world)]


def trained(rank: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains on this rank and counts the gradient all-reduces of DDP."""
    cfg = composed(*overrides)
    ranks = start("cpu")
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    tracker = track.JsonLines(run) if ranks.main else track.Tracker()
    t = engine.call(setup.set_up, cfg.task, run, cfg, ranks, tracker)
    calls = [0]
    if ranks.world > 1:

        def counted(state, bucket):
            calls[0] += bucket.is_last()
            work = dist.all_reduce(bucket.buffer().div_(ranks.world), async_op=True)
            assert work is not None
            return work.get_future().then(lambda f: f.value()[0])

        t.model.register_comm_hook(None, counted)
    engine.call(engine.train, cfg.task, t)
    digest = checkpoint.weights_digest(t.task.model.state_dict())
    ranks.close()
    return {"digest": digest, "reduces": calls[0], "steps": t.plan.steps, "accumulation": t.plan.accumulation}


def losses(folder: Path) -> list[float]:
    rows = track.read_lines(folder / "run" / "metrics.jsonl")
    return [row.get("loss", row.get("val/loss")) for row in rows if "loss" in row or "val/loss" in row]


@pytest.mark.parametrize("micro", ["null", "8"])
def test_one_rank_equals_two_and_gradients_are_exchanged_once_a_step(tmp_path, micro):
    overrides = [*BASE, f"task.micro_batch_size={micro}"]
    one = on_ranks(1, tmp_path / "one", functools.partial(trained, overrides=overrides))
    two = on_ranks(2, tmp_path / "two", functools.partial(trained, overrides=overrides))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-6)
    assert len(losses(tmp_path / "one")) >= 28
    assert two[0]["digest"] == two[1]["digest"]
    assert two[0]["reduces"] == two[0]["steps"] == one[0]["steps"]
    assert two[0]["accumulation"] == (1 if micro == "null" else 2)


def test_more_ranks_than_images_in_the_last_step(tmp_path):
    overrides = [*TINY_PRETRAIN, "data.fraction=0.0675", "task.batch_size=96"]  # 97 images: each second step holds one
    overrides += ["task.precision=fp64"]  # one image's gradient is small enough for Adam to turn rounding into steps
    on_ranks(1, tmp_path / "one", functools.partial(trained, overrides=overrides))
    on_ranks(3, tmp_path / "three", functools.partial(trained, overrides=overrides))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "three"), rel=1e-6)


def agreeing(rank: int, folder: Path) -> list[list[bool]]:
    ranks = start("cpu")
    told = [ranks.agree(rank == 1 and step == 2, rank == 0 and step == 3) for step in range(5)]
    ranks.close()
    return told


def test_a_wish_of_one_rank_is_known_to_all_at_the_same_step(tmp_path):
    told = on_ranks(2, tmp_path, agreeing)
    assert told[0] == told[1]
    assert told[0] == [[False, False], [False, False], [False, False], [True, False], [False, True]]


def different(rank: int, folder: Path) -> str:
    ranks = start("cpu")
    try:
        assert_same(ranks, f"digest of {rank}", "weights")
    except RuntimeError as error:
        return str(error)
    finally:
        ranks.close()
    return ""


def test_ranks_that_start_from_different_weights_are_refused(tmp_path):
    assert all("ranks start from different weights" in told for told in on_ranks(2, tmp_path, different))


def test_torchrun_gives_the_same_run(tmp_path):
    import subprocess
    import sys

    from conftest import ROOT

    overrides = [*BASE, "task.max_steps=4"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(ROOT / "run.py"),
    ]
    told = subprocess.run(
        [*command, *overrides, f"output_dir={tmp_path / 'torchrun'}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert told.returncode == 0, told.stderr
    assert launch.launch(composed(*overrides, f"output_dir={tmp_path / 'here'}"), []) == 0
    rows = [
        [r["loss"] for r in track.read_lines(tmp_path / n / "metrics.jsonl") if "loss" in r]
        for n in ("torchrun", "here")
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-6) and len(rows[0]) == 4
    assert told.stdout.count("val_loss") == 1
