"""Ranks agree: on weights, on losses, on when to stop. Real processes over gloo."""

import functools
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, TINY, TINY_PRETRAIN, composed, of_type, run_here
from torch._C._distributed_c10d import HashStore
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mae import checkpoint, engine, step, training
from mae.config.build import call
from mae.distributed import fsdp
from mae.distributed.fsdp import gathered, local_shard, on_host, shard, whole
from mae.distributed.ranks import Ranks, assert_same, start
from mae.distributed.rendezvous import lost_peer
from mae.errors import UserError
from mae.launch import launch
from mae.models.layers import blocks_of
from mae.models.mae import MaskedAutoencoder
from mae.runs import checkpoints, files
from mae.tracking import jsonl
from mae.tracking.base import Tracker

BASE = [*TINY_PRETRAIN, "data.fraction=0.15", "task.epochs=4"]  # 216 images in 7 steps, the last of 24


Work = Callable[[int, Path], Any]


def rank_main(rank: int, world: int, port: int, folder: str, environ: dict[str, str], work: Work) -> None:
    torch.set_num_threads(1)
    os.environ.update(environ)  # which a process of forkserver has from the first test
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.save(work(rank, Path(folder)), Path(folder) / f"told_{rank}.pt")


def on_ranks(world: int, folder: Path, work: Work) -> list[Any]:
    """What `work` returns on each of `world` real processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    # a process of forkserver need not import torch anew; one of spawn may use CUDA
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    multiprocessing.set_forkserver_preload(["mae.engine", "mae.training", "mae.tasks.pretrain", "mae.tasks.finetune"])
    arguments = (world, port, str(folder), dict(os.environ), work)
    mp.start_processes(rank_main, arguments, nprocs=world, start_method=method)  # type: ignore[attr-defined]
    return [torch.load(folder / f"told_{rank}.pt", weights_only=False) for rank in range(world)]


def trained(rank: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains on this rank and counts the gradient all-reduces of DDP."""
    cfg = composed(*overrides)
    ranks = start(cfg.device, timeout_s=100, rendezvous_timeout_s=100, sharding=cfg.launcher.sharding)
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    tracker = jsonl.JsonLines(run) if ranks.main else Tracker()
    t = engine.call(training.set_up, cfg.task, run, cfg, ranks, tracker)
    calls = [0]
    if ranks.world > 1 and ranks.sharding == "none":

        def counted(state, bucket):
            calls[0] += bucket.is_last()
            work = dist.all_reduce(bucket.buffer().div_(ranks.world), async_op=True)
            assert work is not None
            return work.get_future().then(lambda f: f.value()[0])

        of_type(DistributedDataParallel, t.model).register_comm_hook(None, counted)
    engine.call(engine.train, cfg.task, t)
    numbers = sum(local_shard(p).numel() for p in t.task.model.parameters())
    digest = checkpoint.weights_digest(gathered(t.task.model.state_dict()))
    ranks.close()
    facts = {"digest": digest, "reduces": calls[0], "steps": t.plan.steps, "accumulation": t.plan.accumulation}
    return facts | {"held": numbers}


def losses(folder: Path) -> list[float]:
    rows = files.read_json_lines(folder / "run" / "metrics.jsonl")
    return [row["loss" if "loss" in row else "val/loss"] for row in rows if "loss" in row or "val/loss" in row]


@pytest.mark.parametrize("micro", [pytest.param("null", marks=pytest.mark.slow), "8"])
def test_one_rank_equals_two_and_gradients_are_exchanged_once_a_step(tmp_path, micro):
    overrides = [*BASE, f"task.micro_batch_size={micro}"]
    one = on_ranks(1, tmp_path / "one", functools.partial(trained, overrides=overrides))
    two = on_ranks(2, tmp_path / "two", functools.partial(trained, overrides=overrides))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-6)
    assert len(losses(tmp_path / "one")) >= 28
    assert two[0]["digest"] == two[1]["digest"]
    assert two[0]["reduces"] == two[0]["steps"] == one[0]["steps"]
    assert two[0]["accumulation"] == (1 if micro == "null" else 2)


@pytest.mark.slow
def test_more_ranks_than_images_in_the_last_step(tmp_path):
    overrides = [*TINY_PRETRAIN, "data.fraction=0.0675", "task.batch_size=96"]  # 97 images: each second step holds one
    overrides += ["task.precision=fp64"]  # one image's gradient is small enough for Adam to turn rounding into steps
    on_ranks(1, tmp_path / "one", functools.partial(trained, overrides=overrides))
    on_ranks(3, tmp_path / "three", functools.partial(trained, overrides=overrides))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "three"), rel=1e-6)


def spoiled(rank: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains on ranks of which the second has a loss that is not a number in step 3."""
    original, calls = step.poisoned, itertools.count(1)

    def poisoned(loss: torch.Tensor) -> torch.Tensor:
        return original(loss * math.nan if rank == 1 and next(calls) == 3 else loss)

    step.poisoned = poisoned  # in a process of its own
    return trained(rank, folder, overrides)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_loss_of_one_rank_that_is_not_finite_skips_the_step_of_all(tmp_path, sharding):
    overrides = [*BASE, f"launcher.sharding={sharding}", "task.max_steps=5"]
    results = on_ranks(2, tmp_path, functools.partial(spoiled, overrides=overrides))
    assert results[0]["digest"] == results[1]["digest"] or sharding == "full"
    events = [row["event"] for row in files.read_json_lines(tmp_path / "run" / "events.jsonl")]
    assert events[:1] == ["skipped 1 steps whose loss or gradient was not finite"]
    assert len(events) == 2 and events[1].startswith("step 3 was the first that was not finite.")
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    assert [loss is None for loss in losses(tmp_path)][:5] == [False, False, True, False, False]


def agreeing(rank: int, folder: Path) -> list[list[bool]]:
    ranks = start("cpu", timeout_s=100, rendezvous_timeout_s=100, sharding="none")
    answers = [ranks.agree(rank == 1 and step == 2, rank == 0 and step == 3) for step in range(5)]
    ranks.close()
    return answers


@pytest.mark.slow
def test_a_wish_of_one_rank_is_known_to_all_at_the_same_step(tmp_path):
    results = on_ranks(2, tmp_path, agreeing)
    assert results[0] == results[1]
    assert results[0] == [[False, False], [False, False], [False, False], [True, False], [False, True]]


def connecting(rank: int, folder: Path) -> list[str]:
    """What `start` asks of torch.distributed, in order."""
    calls: list[str] = []
    for name in ("init_process_group", "all_reduce", "new_group"):
        function = getattr(dist, name)

        def noted(*args, name=name, function=function, **how):
            calls.append(f"{name} of {args[0].numel()}" if name == "all_reduce" else name)
            return function(*args, **how)

        setattr(dist, name, noted)
    start("cpu", timeout_s=100, rendezvous_timeout_s=100, sharding="none").close()
    return calls


@pytest.mark.slow
def test_ranks_exchange_once_before_memory_is_measured(tmp_path):
    expected = ["init_process_group", "all_reduce of 1", "new_group"]
    assert [calls[:3] for calls in on_ranks(2, tmp_path, connecting)] == [expected, expected]


def test_a_rank_that_runs_out_of_memory_blames_no_other():
    memory = "NCCL error in: NCCLUtils.cpp, unhandled cuda error, Cuda failure 'out of memory'"
    assert not lost_peer(dist.DistBackendError(memory)) and not lost_peer(RuntimeError(memory))
    assert not lost_peer(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. NCCL"))
    assert lost_peer(dist.DistBackendError("NCCL error: remote process exited or there was a network error"))


def refusal(error: type[Exception], work: Callable[[Ranks], object]) -> str:
    """The message of the error that a rank's work ends in; empty where it ends in none."""
    ranks = start("cpu", timeout_s=100, rendezvous_timeout_s=100, sharding="none")
    try:
        work(ranks)
    except error as raised:
        return str(raised)
    finally:
        ranks.close()
    return ""


def different(rank: int, folder: Path) -> str:
    return refusal(RuntimeError, lambda ranks: assert_same(ranks, f"digest of {rank}", "weights"))


@pytest.mark.slow
def test_ranks_that_start_from_different_weights_are_refused(tmp_path):
    assert all("ranks start from different weights" in text for text in on_ranks(2, tmp_path, different))


def of_another_teacher(rank: int, folder: Path) -> str:
    steps = checkpoint.checkpoints_of(folder / "teacher")
    cfg = composed(*TINY_PRETRAIN, "target=features", f"target.teacher={steps[-1 - rank]}")
    return refusal(
        UserError, lambda ranks: engine.call(training.set_up, cfg.task, folder / "run", cfg, ranks, Tracker())
    )


@pytest.mark.slow
def test_ranks_that_read_different_teachers_are_refused(tmp_path):
    often = ["task.max_steps=2", "checkpoint.every_epochs=0.1", "checkpoint.keep=2"]
    run_here(tmp_path / "teacher", *TINY_PRETRAIN, *often)
    sentence = "target.teacher= names a run that goes on meanwhile, and ranks have read different checkpoints: name one"
    assert all(sentence in text for text in on_ranks(2, tmp_path, of_another_teacher))


def torchrun(*overrides: str, script: Path = ROOT / "run.py") -> subprocess.CompletedProcess[str]:
    """A script on two ranks that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(script), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_torchrun_takes_a_pipeline_from_stage_to_stage(tmp_path):
    base = [one for one in BASE if one.startswith(("model", "data", "device"))]
    short = '["task.batch_size=32","task.max_steps=2"]'
    stages = ["task=pipeline", "task.stages=[pretrain,finetune]"]
    stages += [f"task.overrides.{name}={short}" for name in ("pretrain", "finetune")]
    ended = torchrun(*base, *stages, f"output_dir={tmp_path}")
    assert ended.returncode == 0, ended.stderr
    assert list(json.loads((tmp_path / "summary.json").read_text())["stages"]) == ["pretrain", "finetune"]


@pytest.mark.slow
def test_torchrun_gives_the_same_run(tmp_path):
    overrides = [*BASE, "task.max_steps=4"]
    ended = torchrun(*overrides, f"output_dir={tmp_path / 'torchrun'}")
    assert ended.returncode == 0, ended.stderr
    assert launch.launch(composed(*overrides, f"output_dir={tmp_path / 'here'}"), []) == 0
    rows = [
        [r["loss"] for r in files.read_json_lines(tmp_path / n / "metrics.jsonl") if "loss" in r]
        for n in ("torchrun", "here")
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-6) and len(rows[0]) == 4
    assert ended.stdout.count("val_loss") == 1


# ---------------------------------------------------------------- spread weights


def weights(run: Path) -> dict[str, torch.Tensor]:
    path = checkpoints.newest_valid(run)
    assert path is not None
    return checkpoint.read_weights(path)


@pytest.mark.slow
@pytest.mark.parametrize("micro", ["null", "8"])
def test_spread_weights_train_as_whole_ones_and_go_on_with_one_rank(tmp_path, micro):
    overrides = [*BASE, f"task.micro_batch_size={micro}", "task.clip_grad=0.5"]
    overrides += ["task.precision=fp64"]  # keys' biases have no gradient but rounding, which Adam turns into steps
    spread_and_whole(tmp_path, overrides)


@pytest.mark.slow
def test_an_average_of_spread_weights_is_spread_too(tmp_path):
    overrides = [*TINY, "task=finetune", "task.ema_decay=0.9", "task.precision=fp64", "task.batch_size=32"]
    overrides += ["data.fraction=0.2", "task.epochs=4", "task.log_every_steps=1"]
    overrides += ["task.drop_path=0", "task.mixup=0", "task.cutmix=0"]  # which one rank draws otherwise than two
    spread_and_whole(tmp_path, overrides)
    path = checkpoints.newest_valid(tmp_path / "spread" / "run")
    assert path is not None
    live, average = checkpoint.read_trainer(path)["task"]["live"], checkpoint.read_weights(path)
    assert {name: tensor.shape for name, tensor in live.items()} == {k: v.shape for k, v in average.items()}
    assert not torch.equal(live["head.weight"], average["head.weight"])


def spread_and_whole(tmp_path: Path, overrides: list[str]) -> None:
    """Trains with whole and with spread weights, and from the middle of the latter on, with one rank and with two:
    losses and weights must be the same."""
    whole = on_ranks(2, tmp_path / "whole", functools.partial(trained, overrides=overrides))
    spreading = [*overrides, "launcher.sharding=full", "checkpoint.every_epochs=1", "checkpoint.keep=100"]
    spread = on_ranks(2, tmp_path / "spread", functools.partial(trained, overrides=spreading))
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "spread"), rel=1e-5)
    assert spread[0]["held"] + spread[1]["held"] == whole[0]["held"] and spread[0]["held"] < 0.6 * whole[0]["held"]
    ends = [weights(tmp_path / name / "run") for name in ("whole", "spread")]
    assert list(ends[0]) == list(ends[1])
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-5, atol=1e-5)
    saved = checkpoint.checkpoints_of(tmp_path / "spread" / "run")
    for path in saved[2:]:  # as if the run had been stopped halfway
        for file in path.iterdir():
            file.unlink()
    for world, sharding in ((1, "none"), (2, "full")):
        again = [*overrides, f"launcher.sharding={sharding}"]
        folder = tmp_path / f"on_{world}"
        shutil.copytree(tmp_path / "spread" / "run", folder / "run", symlinks=True)
        on_ranks(world, folder, functools.partial(trained, overrides=again))
        for name, tensor in weights(folder / "run").items():
            torch.testing.assert_close(ends[0][name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "more"), [
    ("finetune", ["launcher.sharding=full"]),
    ("finetune", ["launcher.sharding=full", "task.compile=blocks"]),
    ("pretrain", ["task.compile=blocks", "task.micro_batch_size=8"]),
])  # fmt: skip
def test_ranks_learn_alike_however_weights_lie_and_steps_are_compiled(tmp_path, task, more):
    base = [*TINY, f"task={task}", "task.batch_size=32", "task.max_steps=3", "task.log_every_steps=1"]
    on_ranks(2, tmp_path / "plain", functools.partial(trained, overrides=base))
    on_ranks(2, tmp_path / "other", functools.partial(trained, overrides=[*base, *more]))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "other"), rel=1e-4)
    assert len(losses(tmp_path / "plain")) >= 3


@pytest.mark.slow
def test_sharded_blocks_train_in_bf16_on_a_cpu(tmp_path):
    base = [*TINY_PRETRAIN, "task.max_steps=2", "task.precision=bf16"]
    on_ranks(2, tmp_path / "plain", functools.partial(trained, overrides=base))
    on_ranks(2, tmp_path / "sharded", functools.partial(trained, overrides=[*base, "launcher.sharding=full"]))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "sharded"), rel=1e-2)


def compiled_whole(rank: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains a model that is compiled as a whole, cut at small buckets, and runs as dynamo traced it."""
    from torch._inductor import compile_fx

    from mae.perf import graphs

    graphs.DDP_BUCKET, dist._DEFAULT_FIRST_BUCKET_BYTES = 20_000, 10_000  # type: ignore[attr-defined]
    pieces: list[int] = []
    compile_fx.compile_fx = lambda module, inputs, config_patches: pieces.append(1) or module  # type: ignore[assignment]
    return trained(rank, folder, overrides) | {"pieces": len(pieces)}


@pytest.mark.slow
def test_ranks_learn_alike_where_the_whole_model_is_compiled(tmp_path):
    base = [*TINY_PRETRAIN, "task.max_steps=2", "task.micro_batch_size=8"]
    on_ranks(2, tmp_path / "plain", functools.partial(trained, overrides=base))
    more = [*base, "task.compile=model"]
    results = on_ranks(2, tmp_path / "compiled", functools.partial(compiled_whole, overrides=more))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "compiled"), rel=1e-4)
    assert results[0]["digest"] == results[1]["digest"] and results[0]["pieces"] >= 8
    assert results[0]["reduces"] == results[0]["steps"]


def test_a_checkpoint_gathers_one_whole_tensor_at_a_time(monkeypatch):
    from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        spread = [distribute_tensor(torch.randn(4, 2), mesh, [Shard(0)]) for _ in range(3)]
        state = {"state": {0: {"exp_avg": spread[0], "step": torch.tensor(3.0)}}, "more": [*spread[1:], "text"]}
        whole, alive, most, full = gathered(state), [], [], DTensor.full_tensor

        def counted(self):
            tensor = full(self).clone()
            alive.append(weakref.ref(tensor))
            most.append(sum(one() is not None for one in alive))
            return tensor

        monkeypatch.setattr(DTensor, "full_tensor", counted)
        nothing = on_host(state, main=False)
        assert most == [1, 1, 1] and nothing["state"][0]["exp_avg"] is None and nothing["more"][:2] == [None, None]
        made = on_host(state, main=True)
        assert made["more"][2] == "text" and made["state"][0]["step"] == 3
        for one, other in (
            (made["state"][0]["exp_avg"], whole["state"][0]["exp_avg"]),
            (made["more"][0], whole["more"][0]),
        ):
            assert torch.equal(one, other) and type(one) is torch.Tensor
    finally:
        dist.destroy_process_group()


def test_a_validation_leaves_no_order_of_gathering_behind():
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        cfg = composed(*TINY_PRETRAIN)
        made = call(MaskedAutoencoder, cfg.model, norm_pix_loss=True)
        model, images = made, torch.randn(2, 3, 16, 16)
        shard(model, torch.device("cpu"), torch.float32, 1)
        model(images, 0.75).loss.backward()  # as the loop begins
        with whole(model), torch.no_grad():
            model(images, 0.75)
            model.forward_features(images)
            assert order_of(model)
        assert not order_of(model)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
    finally:
        dist.destroy_process_group()


def test_blocks_gather_half_weights_and_reduce_in_float32(monkeypatch):
    assert fsdp.gathers_half(torch.bfloat16, torch.device("cuda"))
    assert not fsdp.gathers_half(torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(fsdp, "gathers_half", lambda dtype, device: True)  # as on a GPU
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        cfg = composed(*TINY_PRETRAIN)
        model = call(MaskedAutoencoder, cfg.model, norm_pix_loss=True)
        block: Any = blocks_of(model)[0]
        shard(model, torch.device("cpu"), torch.bfloat16, 1)
        dtypes: list[torch.dtype] = []
        forward = block._forward

        def noted(x, first):
            dtypes.extend([x.dtype, block.attn.qkv.weight.dtype, block.norm1.weight.dtype])
            return forward(x, first)

        block._forward = noted
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(2, 3, 16, 16), 0.75).loss
        loss.backward()
        assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16] and loss.dtype == torch.float32
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    finally:
        dist.destroy_process_group()


def hybrid(rank: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains with shards that two nodes of one rank hold copies of."""
    socket.gethostname = lambda: f"node{rank}"  # in a process of its own
    return trained(rank, folder, overrides)


@pytest.mark.slow
def test_shards_within_nodes_train_as_whole_weights(tmp_path):
    overrides = [*BASE, "task.max_steps=3", "task.precision=fp64"]
    on_ranks(2, tmp_path / "whole", functools.partial(trained, overrides=overrides))
    more = [*overrides, "launcher.sharding=hybrid", "task.micro_batch_size=auto"]
    results = on_ranks(2, tmp_path / "hybrid", functools.partial(hybrid, overrides=more))
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "hybrid"), rel=1e-5)
    assert results[0]["digest"] == results[1]["digest"]


def order_of(model):
    return model._get_fsdp_state()._comm_ctx.post_forward_order


def test_what_spread_weights_cannot_do_is_refused():
    with pytest.raises(ValueError, match="task.compile=graphs wants weights that stay where they are: use blocks"):
        composed(*TINY_PRETRAIN[:-1], "device=auto", "task.compile=graphs", "launcher.sharding=full")


@pytest.mark.slow
def test_a_probe_s_statistics_are_those_of_all_ranks(tmp_path):
    assert run_here(tmp_path / "encoder", *TINY_PRETRAIN, "task.epochs=1") == 0
    overrides = [*TINY, "task=linprobe", "task.batch_size=32", "task.epochs=2", "task.warmup_epochs=0"]
    overrides += [f"init={tmp_path / 'encoder'}", "task.log_every_steps=1"]
    one = on_ranks(1, tmp_path / "one", functools.partial(trained, overrides=overrides))
    two = on_ranks(2, tmp_path / "two", functools.partial(trained, overrides=overrides))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-6)
    ends = [weights(tmp_path / name / "run") for name in ("one", "two")]
    for name in ("head.0.running_mean", "head.0.running_var"):
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-5, atol=1e-7)
    assert two[0]["digest"] == two[1]["digest"] and one[0]["steps"] == two[0]["steps"]


# ---------------------------------------------------------------- a rank that hangs


HANGING = """
import os, runpy, sys, time
sys.path.insert(0, {root!r})
from mae.tasks.pretrain import Pretrain

forward, calls = Pretrain.forward, []

def stuck_in_a_mount(self, batch):
    calls.append(1)
    if os.environ.get("RANK") == "1" and len(calls) > 4:
        time.sleep(1000)
    return forward(self, batch)

Pretrain.forward = stuck_in_a_mount
if __name__ == "__main__":
    runpy.run_path({root!r} + "/run.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_and_says_where(tmp_path):
    script = tmp_path / "hanging.py"
    script.write_text(HANGING.format(root=str(ROOT)))
    overrides = [*BASE, "launcher.timeout_s=12", f"output_dir={tmp_path / 'run'}"]
    ended = torchrun(*overrides, script=script)
    assert ended.returncode == 1
    assert "process 1 has not moved for" in ended.stderr and "launcher.timeout_s=12" in ended.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "stuck_in_a_mount" in log and log.count("rank 0: process") == 0


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_one_that_waits_for_it(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "run.py"), *TINY_PRETRAIN, "task.epochs=200", "launcher.processes=2"]
    process = subprocess.Popen(
        [*command, "launcher.timeout_s=10", f"output_dir={run}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while sum("loss" in row for row in files.read_json_lines(run / "metrics.jsonl")) < 5:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        victim = ranks_of(process.pid)[1]
        os.kill(victim, signal.SIGSTOP)
        _, text = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "process 1 has not moved for" in text and "it was stopped, or lost" in text
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)


def ranks_of(parent: int) -> list[int]:
    """The processes that a run started as its ranks, in their order."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return sorted(int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
