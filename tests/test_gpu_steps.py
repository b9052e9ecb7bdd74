"""Acceptance suite, checks 7 to 15, 17 and 19: steps, checkpoints, memory, data and tasks on a GPU. See docs/gpu.md."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_here
from gpu_suite import (
    AUTO,
    DEVICE,
    LARGE,
    ON_GPU,
    PLAIN,
    SMALL,
    SMALL_PRETRAIN,
    SUITE,
    distance,
    graphs,  # noqa: F401
    held_memory,
    leave_free,
    own_settings,  # noqa: F401
    trained,
)
from test_device_decode import batches_of, loader_of, write_images
from test_engine import Overflowing, Spoiled, saved, set_up_here
from test_step import hungry
from torch.utils._python_dispatch import TorchDispatchMode

from mae import checkpoint, device, engine
from mae.errors import UserError
from mae.perf import micro_batch
from mae.tasks.pretrain import Pretrain
from mae.tasks.registry import TASKS

pytestmark = SUITE

WAITS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select}


class NoWaits(TorchDispatchMode):
    """Refuses operations whose result a host would wait for, were this a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_07_ten_steps_wait_for_nothing(tmp_path, monkeypatch):
    """On a GPU torch itself refuses to wait; on a CPU the operations that would are refused."""
    t = set_up_here(
        tmp_path, *SMALL_PRETRAIN, "task.epochs=3", "task.max_steps=12", "task.log_every_steps=100",
        "data.num_workers=2", "task.eval_every_epochs=100", "task.clip_grad=1.0",
    )  # fmt: skip
    take_step, steps, refusing = engine.take_step, [], NoWaits()

    def noted(*args: Any, **how: Any) -> Any:
        result = take_step(*args, **how)
        steps.append(1)
        if len(steps) == 1:
            torch.cuda.set_sync_debug_mode("error") if ON_GPU else refusing.__enter__()
        if len(steps) == 11:
            torch.cuda.set_sync_debug_mode("default") if ON_GPU else refusing.__exit__(None, None, None)
        return result

    monkeypatch.setattr(engine, "take_step", noted)
    engine.call(engine.train, t.cfg.task, t)
    t.loader.close()
    assert len(steps) == 12
    waited = torch.ones(1, device=DEVICE)
    with pytest.raises((AssertionError, RuntimeError)):  # the check itself can fail
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("error")
            waited.item()
        with refusing:
            waited.item()


def test_08_a_step_that_is_not_a_number_leaves_weights_bit_equal(tmp_path):
    t = set_up_here(tmp_path, *SMALL_PRETRAIN, "task.max_steps=3")
    t.model = Spoiled(t.task, {2}, float("nan"))
    digests: list[str] = []
    after_step = t.task.after_step

    def noted(skipped: torch.Tensor) -> None:
        digests.append(checkpoint.weights_digest(t.task.model.state_dict()))
        after_step(skipped)

    t.task.after_step = noted
    engine.call(engine.train, t.cfg.task, t)
    assert digests[0] == digests[1] != digests[2] and t.progress.bad_steps == 1


def test_09_the_scale_of_fp16_falls_and_comes_back_with_a_checkpoint(tmp_path):
    half = [*SMALL_PRETRAIN, f"device={AUTO}", "task.precision=fp16"]
    t = set_up_here(tmp_path, *half, "task.max_steps=3")
    t.model = Overflowing(t.task)
    before = t.scaler.get_scale()
    assert t.scaler.is_enabled() and before > 1
    engine.call(engine.train, t.cfg.task, t)
    assert t.scaler.get_scale() == before / 2 and t.progress.bad_steps == 1
    t.saver.wait()
    again = set_up_here(tmp_path, *half, "task.max_steps=5")
    assert again.progress.step == 3 and again.scaler.get_scale() == before / 2
    engine.call(engine.train, again.cfg.task, again)
    assert again.progress.step == 5 and again.progress.bad_steps == 1


OFTEN = [*SMALL_PRETRAIN, "checkpoint.every_epochs=0.2", "checkpoint.keep=100", "task.max_steps=4"]


def forget_after(run: Path, count: int) -> None:
    """As if the run had been killed after so many checkpoints."""
    for path in checkpoint.checkpoints_of(run)[count:]:
        shutil.rmtree(path)
    (run / "summary.json").unlink()


@pytest.mark.parametrize("exact", [False, True])
def test_10_a_run_that_goes_on_computes_what_it_would_have(tmp_path, exact):
    torch.use_deterministic_algorithms(exact)
    overrides = [*OFTEN, f"task.attention_kernel={'math' if exact else 'auto'}"]
    whole = trained(tmp_path, *overrides)
    weights = saved(tmp_path)
    forget_after(tmp_path, 2)
    assert trained(tmp_path, *overrides) == (whole if exact else pytest.approx(whole, rel=1e-3))
    assert not exact or checkpoint.weights_digest(saved(tmp_path)) == checkpoint.weights_digest(weights)


@pytest.mark.parametrize(("first", "second"), [(DEVICE, "cpu"), ("cpu", DEVICE)])
def test_11_a_checkpoint_of_one_device_goes_on_with_another(tmp_path, first, second):
    """How long a checkpoint stalls the loop is a row of benchmarks/gpu.py."""
    whole = trained(tmp_path, *OFTEN, f"device={first}")
    weights = torch.cat([w.flatten() for w in saved(tmp_path).values()])
    forget_after(tmp_path, 2)
    assert trained(tmp_path, *OFTEN, f"device={second}") == pytest.approx(whole, rel=1e-3)
    assert distance(torch.cat([w.flatten() for w in saved(tmp_path).values()]), weights) < 1e-2


def test_12_auto_finds_a_size_in_six_gigabytes_and_stays_compiled(tmp_path, monkeypatch, graphs):  # noqa: F811
    auto = ["task.micro_batch_size=auto", "task.compile=blocks", "task.max_steps=5", "task.epochs=2"]
    if ON_GPU:  # beside what stays free for NCCL and cuBLAS
        size, taken = LARGE, leave_free(6 + device.headroom(torch.device("cuda", 0)) / 1e9)
    else:
        size, taken = ["task.batch_size=32"], None
        monkeypatch.setattr(device, "free_memory", lambda _: 1_500_000)
    assert len(trained(tmp_path, *SMALL_PRETRAIN, *auto, *size)) >= 5
    del taken
    found = json.loads((tmp_path / micro_batch.MICRO_BATCH_FILE).read_text())["micro_batch_size"]
    assert 1 <= found < (512 if ON_GPU else 32)
    log = (tmp_path / "log.txt").read_text()
    assert "switched off" not in log and f"compiled {graphs()} graphs in " in log and graphs() > 0


def test_13_out_of_memory_is_a_sentence(tmp_path, monkeypatch):
    if ON_GPU:
        size, taken = LARGE, leave_free(2.0)
    else:
        size, taken = [], None
        monkeypatch.setattr(Pretrain, "forward", hungry(0))
    with pytest.raises(UserError, match="Out of memory on .*Set task.micro_batch_size=auto, or task.checkpointing"):
        run_here(tmp_path, *SMALL_PRETRAIN, *size, "task.max_steps=2")
    del taken


def checksum(images: torch.Tensor) -> torch.Tensor:
    """A sum of all values and their positions, on the images' device."""
    values = images.flatten().long()
    return (values * (torch.arange(len(values), device=values.device) % 251 + 1)).sum()


def test_14_batches_arrive_whole_under_load_and_evaluations_leave_no_memory(tmp_path):
    side, batches, evaluations = (4096, 200, 40) if ON_GPU else (256, 200, 20)
    size = ["data.img_size=112", "task.batch_size=64", "data.fraction=1"] if ON_GPU else []
    t = set_up_here(tmp_path, *SMALL_PRETRAIN, *size, "data.num_workers=2", "data.workers=thread", "task.epochs=100")
    sender, load = device.Sender(t.ranks.device), torch.eye(side, device=t.ranks.device)
    expected, actual = [], []
    for batch, _ in itertools.islice(t.batches(), batches):
        expected.append(checksum(batch["image"]))
        load = load @ load
        actual.append(checksum(sender(batch)["image"]))
    assert len(actual) == batches and torch.equal(torch.stack(actual).cpu(), torch.stack(expected))
    assert load[0, 0] == 1
    sizes = []
    for _ in range(evaluations):
        t.evaluate()
        sizes.append(held_memory())
    t.loader.close()
    assert sizes[-1] < 1.05 * sizes[4]


def test_15_batches_of_threads_are_those_of_processes_and_pinned_for_a_gpu(tmp_path):
    batches = {}
    for workers in ("thread", "process"):
        more = ["data.num_workers=2", f"data.workers={workers}"]
        t = set_up_here(tmp_path / workers, *SMALL_PRETRAIN, *more)
        batches[workers] = [batch for batch, _ in itertools.islice(t.batches(), 5)]
        t.loader.close()
    for first, second in zip(*batches.values(), strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert first["image"].is_pinned() is second["image"].is_pinned() is ON_GPU


@pytest.mark.parametrize("augmentation", ["pretrain", "color_jitter"])
def test_15_files_that_the_device_decodes_are_the_host_s_samples(tmp_path, augmentation):
    write_images(tmp_path)
    pairs = zip(
        batches_of(loader_of(tmp_path, torch.device(DEVICE), augmentation=augmentation)),
        batches_of(loader_of(tmp_path, None, augmentation=augmentation)),
        strict=True,
    )
    for actual, expected in pairs:
        assert all(torch.equal(actual[name], expected[name]) for name in ("index", "flip", "noise", "label"))
        assert actual["image"].device.type == DEVICE and actual["image"].dtype == torch.uint8
        difference = (actual["image"].cpu().float() - expected["image"].float()).abs()
        assert difference.mean() < (8 if ON_GPU else 1e-6)  # of 255: nvJPEG enlarges the colours of a JPEG otherwise


def test_16_a_run_on_uint16_images_of_five_channels_ends_with_pictures(tmp_path):
    noise = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for k in range(24):
        np.save(tmp_path / "images" / f"{k}.npy", noise.integers(0, 1 << 16, (5, 20, 20), np.uint16))
    data = ["data=scientific", f"data.root={tmp_path / 'images'}", "data.in_chans=5", "data.fraction=1"]
    data += [f"data.cache_dir={tmp_path}", "task.batch_size=8", "task.max_steps=2"]
    assert np.isfinite(trained(tmp_path / "run", *SMALL_PRETRAIN, *data)).all()
    assert list((tmp_path / "run" / "images").iterdir())


# Three steps of each task that trains; the others read what these leave
SHORT = [PLAIN, "task.batch_size=32", "task.max_steps=3", "task.log_every_steps=1"]
OTHER = [override for override in SMALL if not override.startswith("task.precision")]
COMMANDS = {
    "pretrain": [*SMALL, *SHORT, "task.epochs=2", "task.warmup_epochs=1"],
    "finetune": [*SMALL, *SHORT, "task.mixup=0", "task.cutmix=0", "task.drop_path=0"],
    "linprobe": [*SMALL, *SHORT],
    "knn": [*SMALL, "task.k=[10]"],
    "evaluate": SMALL,
    "visualize": OTHER,
    "export": OTHER,
    "stats": OTHER,
    "inspect": OTHER,
    "embed": [*SMALL, "task.split=val"],
    "predict": [*SMALL, "task.split=val"],
}


CLOSE: dict[str, dict[str, Any]] = {key: {"abs": 0.5} for key in ("top1", "top5", "knn")}
CLOSE |= {key: {"rel": 1e-2} for key in ("val_loss", "loss")}


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, Path]:
    """An encoder and a classifier of the CPU, from which tasks start."""
    folder, cpu = tmp_path_factory.mktemp("starts"), "device=cpu"
    assert run_here(folder / "pretrain", *COMMANDS["pretrain"], "task=pretrain", cpu) == 0
    init = f"init={folder / 'pretrain'}"
    assert run_here(folder / "finetune", *COMMANDS["finetune"], "task=finetune", init, cpu) == 0
    return {"pretrain": folder / "pretrain", "finetune": folder / "finetune"}


@pytest.mark.parametrize("name", [name for name in TASKS if name != "pipeline"])  # which is several of the others
def test_17_every_task_gives_the_cpu_s_results(tmp_path, starts, name):
    if name not in COMMANDS:
        pytest.skip("a task without a row in COMMANDS")
    start = starts["finetune" if name in ("evaluate", "predict") else "pretrain"]
    init = [f"init={start}"] if TASKS[name].needs_init or name == "finetune" else []
    results = []
    for where in ("cpu", DEVICE):
        run = tmp_path / f"{where}_{len(results)}"
        assert run_here(run, *COMMANDS[name], f"task={name}", *init, f"device={where}") == 0
        results.append(json.loads((run / "summary.json").read_text()))
    expected, actual = results
    assert expected.keys() == actual.keys()
    for key, how in CLOSE.items():
        assert key not in expected or actual[key] == pytest.approx(expected[key], **how)


def test_19_a_profile_has_the_time_of_the_device(tmp_path):
    trained(tmp_path, *SMALL_PRETRAIN, "task.epochs=3", "task.profile=true")
    table = (tmp_path / "profile" / "operations.txt").read_text()
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert ("Self CUDA" if ON_GPU else "Self CPU") in table and "aten::mm" in table
    assert any(event.get("cat") == ("kernel" if ON_GPU else "cpu_op") for event in events)
