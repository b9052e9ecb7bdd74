"""The levers of a training step: none changes what is computed, and none waits for the device."""

import json
import math
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, TINY_PRETRAIN, composed, of_type, run_cli, run_here
from torch._subclasses.fake_tensor import FakeTensorMode

from mae import device, engine, optim
from mae.config.build import build, call
from mae.data import SOURCES
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.models import layers
from mae.models.layers import Block, attention, set_checkpointing
from mae.models.mae import MaskedAutoencoder
from mae.perf import micro_batch
from mae.perf.activations import saved_for_backward
from mae.perf.graphs import compile_blocks, uncompile
from mae.perf.micro_batch import Trial
from mae.progress import Progress
from mae.runs import files
from mae.tasks.base import build_task
from mae.tasks.finetune import Finetune
from mae.tools import dry_run, planned_model

CLASSIFY = ["task.batch_size=32", "task.epochs=1", "task.warmup_epochs=0"]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in files.read_json_lines(run / "metrics.jsonl") if "loss" in row]


def trial_of(cfg: Any, task: Any, device: str = "cpu") -> Trial:
    return Trial(cfg, task, task.masking, torch.device(device), nullcontext, task.example_target)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A pre-trained run to start classifiers from."""
    run = tmp_path_factory.mktemp("encoder") / "run"
    assert run_here(run, *TINY_PRETRAIN, "task.epochs=1") == 0
    return run


# ---------------------------------------------------------------- profile, compilation, checkpointing


def test_profile_leaves_a_trace_and_a_table_and_changes_no_number(tmp_path):
    assert run_here(tmp_path / "plain", *TINY_PRETRAIN, "task.epochs=3") == 0
    assert run_here(tmp_path / "profiled", *TINY_PRETRAIN, "task.epochs=3", "task.profile=true") == 0
    assert losses(tmp_path / "plain") == losses(tmp_path / "profiled")
    events = json.loads((tmp_path / "profiled" / "profile" / "trace.json").read_text())["traceEvents"]
    assert any("aten::mm" in event.get("name", "") for event in events)
    table = (tmp_path / "profiled" / "profile" / "operations.txt").read_text()
    assert "Self CPU" in table and "aten::mm" in table
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_run_too_short_for_a_profile_says_so(tmp_path):
    assert run_here(tmp_path, *TINY_PRETRAIN, "task.max_steps=5", "task.profile=true") == 0
    words = "task.profile=true records the 6th to the 10th step, and 5 are left: no profile"
    assert words in (tmp_path / "log.txt").read_text() and not (tmp_path / "profile").exists()


@pytest.mark.parametrize("what", ["none", "blocks"])
def test_checkpointing_of_a_run_changes_no_loss(tmp_path, what):
    assert run_here(tmp_path / "light", *TINY_PRETRAIN) == 0
    assert run_here(tmp_path / what, *TINY_PRETRAIN, f"task.checkpointing={what}") == 0
    assert losses(tmp_path / "light") == pytest.approx(losses(tmp_path / what), rel=1e-6)


@pytest.mark.parametrize("kernel", ["plain", "fused", "flash", "math"])
def test_the_attention_kernel_can_be_chosen_and_changes_no_loss(tmp_path, monkeypatch, kernel):
    assert run_here(tmp_path / "auto", *TINY_PRETRAIN) == 0
    used: list[str | None] = []

    def noted(q, k, v, kernel=None):
        used.append(kernel)
        return attention(q, k, v, kernel)

    monkeypatch.setattr(layers, "attention", noted)
    assert run_here(tmp_path / "chosen", *TINY_PRETRAIN, f"task.attention_kernel={kernel}") == 0
    assert set(used) == {kernel}
    serving = files.read_json_lines(tmp_path / "chosen" / "environment.jsonl")[-1]["attention"]
    assert serving == ("flash" if kernel == "fused" else kernel)
    assert f"attention is computed by: {serving}" in (tmp_path / "chosen" / "log.txt").read_text()
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "chosen"), rel=1e-6)


def test_an_attention_backend_of_gpus_alone_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(UserError, match="task.attention_kernel=cudnn needs a GPU: use auto with device=cpu"):
        run_here(tmp_path, *TINY_PRETRAIN, "task.attention_kernel=cudnn")


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(tmp_path):
    assert run_here(tmp_path / "plain", *TINY_PRETRAIN) == 0
    ended = run_cli(*TINY_PRETRAIN, "task.compile=blocks", f"output_dir={tmp_path / 'compiled'}")
    assert ended.returncode == 0, ended.stderr
    assert "switched off" not in ended.stderr
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "compiled"), rel=1e-5)


@pytest.mark.slow
def test_where_blocks_cannot_be_compiled_the_run_goes_on_with_a_warning(tmp_path):
    env = {"CXX": str(tmp_path / "no_compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ended = run_cli(*TINY_PRETRAIN, "task.compile=blocks", f"output_dir={tmp_path / 'run'}", env=env)
    assert ended.returncode == 0, ended.stderr
    assert "task.compile=blocks is switched off: compiling the blocks failed" in ended.stderr
    assert run_here(tmp_path / "plain", *TINY_PRETRAIN) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(ValueError, match="task.compile=graphs needs a GPU: use off, blocks or model with device=cpu"):
        composed(*TINY_PRETRAIN, "task.compile=graphs")


@pytest.mark.parametrize(("given", "told"), [("8", "=8 may take fewer"), ("auto", "=auto may take fewer")])
def test_graphs_with_more_than_one_micro_batch_are_refused(given, told):
    graphs = [*TINY_PRETRAIN, "task.compile=graphs", "device=cuda"]
    with pytest.raises(ValueError, match=f"takes the 32 images of a device's share at a time.*micro_batch_size{told}"):
        composed(*graphs, f"task.micro_batch_size={given}")
    assert composed(*graphs).task.compile == "graphs"
    assert composed(*graphs, "task.micro_batch_size=32").task.micro_batch_size == 32


def test_graphs_begin_anew_with_each_pass_through_a_model(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    monkeypatch.setattr(Block, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", self._call_impl))
    cfg = composed(*TINY_PRETRAIN)
    model = of_type(MaskedAutoencoder, build_task(cfg, build(SOURCES, cfg.data, "val")).trained)
    images = torch.rand(2, 3, 16, 16)
    for compiled, passes in (("blocks", 0), ("graphs", 3)):
        compile_blocks(model, "reduce-overhead" if compiled == "graphs" else None)
        model(images, 0.75)
        model.predict(images, 0.75)
        model.forward_features(images)
        assert len(begun) == passes
    uncompile(model, model, ())
    model(images, 0.75)
    assert len(begun) == 3


def test_a_trial_computes_as_a_validation_too():
    cfg = composed(*TINY_PRETRAIN)
    made = build_task(cfg, build(SOURCES, cfg.data, "val"))
    seen = []
    made.model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    trial_of(cfg, made).step(2)
    assert seen == [True, False]


@pytest.mark.slow
@pytest.mark.skipif(not device.has_bf16(torch.device("cpu")), reason="bfloat16 emulated takes a hundred times as long")
def test_bf16_learns_as_float32_does(tmp_path):
    """150 steps on the digits: the difference of the curves lies within what another seed makes."""
    base = ["device=cpu", "task.max_steps=150", "task.log_every_steps=5", "checkpoint.every_epochs=100"]
    curves = {}
    for name, more in {
        "bf16": ["task.precision=bf16"],
        "fp32": ["task.precision=fp32"],
        "other": ["task.precision=fp32", "seed=1"],
    }.items():
        assert run_here(tmp_path / name, *base, *more) == 0
        curves[name] = torch.tensor(losses(tmp_path / name))[10:]
    rounding = (curves["bf16"] - curves["fp32"]).abs().mean() / curves["fp32"].mean()
    noise = (curves["other"] - curves["fp32"]).abs().mean() / curves["fp32"].mean()
    assert len(curves["fp32"]) == 20 and rounding < noise and rounding < 0.03


# ---------------------------------------------------------------- what one device holds


def hungry(most: int):
    """A forward that runs out of memory for more than `most` images, as CUDA says it."""
    from mae.tasks.pretrain import Pretrain

    forward = Pretrain.forward

    def limited(self, batch):
        if len(batch["image"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch)

    return limited


def test_auto_finds_the_largest_part_that_fits_and_keeps_the_batch(tmp_path, monkeypatch):
    from mae.tasks.pretrain import Pretrain

    assert run_here(tmp_path / "known", *TINY_PRETRAIN, "task.micro_batch_size=8") == 0
    monkeypatch.setattr(Pretrain, "forward", hungry(11))
    assert run_here(tmp_path / "auto", *TINY_PRETRAIN, "task.micro_batch_size=auto") == 0
    assert losses(tmp_path / "auto") == losses(tmp_path / "known")
    assert "8 of the 32 images" in (tmp_path / "auto" / "log.txt").read_text()
    derived = next(r for r in files.read_json_lines(tmp_path / "auto" / "metrics.jsonl") if "derived/accumulation" in r)
    assert derived["derived/accumulation"] == 4 and derived["derived/micro_batch_size"] == 8


def test_auto_keeps_what_it_found_when_the_run_goes_on(tmp_path, monkeypatch):
    from mae.tasks.pretrain import Pretrain

    run, fit = tmp_path / "run", micro_batch.largest
    monkeypatch.setattr(Pretrain, "forward", hungry(11))
    assert run_here(run, *TINY_PRETRAIN, "task.micro_batch_size=auto") == 0
    (run / "summary.json").unlink()
    monkeypatch.setattr(micro_batch, "largest", lambda *_: pytest.fail("tried again"))
    assert run_here(run, *TINY_PRETRAIN, "task.micro_batch_size=auto") == 0
    assert fit is not micro_batch.largest


@pytest.mark.parametrize("change", ["checkpointing", "card"])
def test_auto_tries_again_where_what_it_found_is_for_something_else(tmp_path, monkeypatch, change):
    run, more = tmp_path / "run", []
    assert run_here(run, *TINY_PRETRAIN, "task.micro_batch_size=auto") == 0
    (run / "summary.json").unlink()
    if change == "card":
        monkeypatch.setattr(device, "model_name", lambda _: "another card, 16 GiB")
    else:
        more = ["task.checkpointing=blocks"]
    tried = []
    monkeypatch.setattr(micro_batch, "largest", lambda *_: tried.append(1) or 8)
    for _ in range(2):  # and keeps that
        assert run_here(run, *TINY_PRETRAIN, "task.micro_batch_size=auto", *more) == 0
        (run / "summary.json").unlink()
    assert tried == [1] and json.loads((run / micro_batch.MICRO_BATCH_FILE).read_text())["micro_batch_size"] == 8


@pytest.mark.parametrize("schedule", ["[[0,12,0.1],[1,16,0.9]]", "[[0,12,0.5],[1,16,0.75]]", "[[0,8],[1,16]]"])
def test_the_costliest_phase_is_the_one_that_keeps_most_for_the_backward_pass(schedule):
    network = ["model.depth=4", "model.decoder_depth=1", "model.decoder_embed_dim=16"]
    cfg = composed(*TINY_PRETRAIN, *network, "task.epochs=3", f"task.img_size_schedule={schedule}")
    task = build_task(cfg, build(SOURCES, cfg.data, "val"))
    trial, saved_bytes = trial_of(cfg, task), []
    for phase in (0, 1):
        with saved_for_backward(task.parameters()) as saved:
            task(trial.batch(4, phase))
        saved_bytes.append(sum(saved.values()))
    assert saved_bytes[trial.costliest] == max(saved_bytes) > min(saved_bytes)


def test_a_trial_keeps_as_much_as_a_step_that_leaves_no_branch_out():
    kept = []
    for rate in (1e-6, 0.99):
        cfg = composed(*TINY, "task=finetune", "task.batch_size=32", f"task.drop_path={rate}")
        made = build_task(cfg, build(SOURCES, cfg.data, "val")).train()
        kept.append(trial_of(cfg, made).saved_bytes(4))
        drops = [block.drop_path1 for block in of_type(Finetune, made).live.blocks]
        rates = [drop.keep.item() for drop in drops if isinstance(drop, layers.DropPath)]
        assert rates and min(rates) == pytest.approx(1 - rate)  # the run's own again
    assert kept[0] == kept[1] > 0


def test_auto_leaves_room_for_what_the_run_holds_beside_a_step(monkeypatch):
    cfg = composed(*TINY_PRETRAIN)
    made = build_task(cfg, build(SOURCES, cfg.data, "val")).to("meta")
    weights = sum(4 * p.numel() for p in made.parameters() if p.requires_grad)
    allocate, held, trials = torch.empty, [], []

    def empty(*size, **how):
        room = allocate(*size, **how)
        held.append(weakref.ref(room))
        return room

    def trial(*_):
        trials.append([room().nbytes for room in held if room() is not None])
        if len(trials) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trial, "step", trial)
    monkeypatch.setattr(torch, "empty", empty)
    assert micro_batch.largest(trial_of(cfg, made, "meta"), 32) == 16
    assert trials == [[3 * weights], [3 * weights]]  # gradients and two states, once at a time


def test_two_small_sizes_predict_what_a_gpu_holds_and_one_step_confirms_it(monkeypatch):
    cfg = composed(*TINY_PRETRAIN, "task.batch_size=5040")
    tried: list[int] = []
    monkeypatch.setattr(Trial, "fits", lambda self, images, reserved: tried.append(images) or True)
    monkeypatch.setattr(Trial, "peak", lambda self, images: 5000 + 100 * images)
    monkeypatch.setattr(device, "headroom", lambda _: 700)
    made = build_task(cfg, build(SOURCES, cfg.data, "val"))
    states = 3 * sum(4 * p.numel() for p in made.parameters() if p.requires_grad)
    monkeypatch.setattr(device, "free_memory", lambda _: states + 700 + 5000 + 100 * 1000)
    assert micro_batch.largest(trial_of(cfg, made, "cuda"), 5040) == 840
    assert tried == [1, 8, 840]


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_the_plan_s_activations_are_those_of_the_model(task):
    """What is counted without memory is what autograd keeps: less in half precision, and less of whole blocks."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for what in ("none", "light", "blocks"):
            cfg = composed(*TINY, f"task={task}", *CLASSIFY, f"task.checkpointing={what}")
            model = dry_run.model_on_meta(cfg)
            found[dtype, what] = planned_model.activation_bytes(cfg, model, dtype, torch.device("cpu"), 8)
            on_gpu = planned_model.activation_bytes(cfg, model, dtype, torch.device("cuda"), 8)
            assert on_gpu <= found[dtype, what]  # which keeps no scores of attention
            real = dry_run.model_on_meta(cfg).to_empty(device="cpu")
            set_checkpointing(real, what)
            images = torch.rand(8, cfg.model.in_chans, 16, 16)
            with saved_for_backward(real.parameters()) as kept, torch.autocast("cpu", dtype, dtype is torch.bfloat16):
                real(images, cfg.task.mask_ratio) if task == "pretrain" else real(images)
            assert found[dtype, what] == pytest.approx(sum(kept.values()), rel=0.01)
    for dtype in (torch.float32, torch.bfloat16):
        assert found[dtype, "blocks"] < found[dtype, "light"] < found[dtype, "none"]
    for what in ("none", "light"):
        assert found[torch.bfloat16, what] < found[torch.float32, what]


def test_auto_on_a_host_judges_by_what_autograd_keeps(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda _: 1_500_000)
    assert run_here(tmp_path / "run", *TINY_PRETRAIN, "task.micro_batch_size=auto") == 0
    found = json.loads((tmp_path / "run" / micro_batch.MICRO_BATCH_FILE).read_text())["micro_batch_size"]
    assert 1 <= found < 32 and 32 % found == 0


@pytest.mark.parametrize("micro", ["null", "16"])
def test_out_of_memory_is_a_sentence_that_names_what_saves_it(tmp_path, monkeypatch, micro):
    from mae.tasks.pretrain import Pretrain

    monkeypatch.setattr(Pretrain, "forward", hungry(0))
    share = "A device takes its whole share of a batch at a time, 32 images. "
    expected = f"GiB. {share if micro == 'null' else ''}Set task.micro_batch_size=auto, or task.checkpointing=blocks."
    with pytest.raises(UserError, match=expected):
        run_here(tmp_path, *TINY_PRETRAIN, f"task.micro_batch_size={micro}")


def test_auto_where_nothing_fits_is_a_sentence(tmp_path, monkeypatch):
    from mae.tasks.pretrain import Pretrain

    monkeypatch.setattr(Pretrain, "forward", hungry(0))
    monkeypatch.setattr(Trial, "saved_bytes", lambda *_: 1)
    with pytest.raises(ValueError, match="task.micro_batch_size=auto: not even the smallest part of a batch"):
        run_here(tmp_path / "run", *TINY_PRETRAIN, "task.micro_batch_size=auto")


@pytest.mark.parametrize("task", ["finetune", "linprobe"])
def test_a_trial_leaves_no_trace(tmp_path, encoder, task):
    base = [*TINY, f"task={task}", *CLASSIFY, f"init={encoder}", "task.log_every_steps=1"]
    base += ["augmentation=linprobe"]
    assert run_here(tmp_path / "plain", *base) == 0
    assert run_here(tmp_path / "tried", *base, "task.micro_batch_size=auto") == 0
    assert losses(tmp_path / "plain") == losses(tmp_path / "tried")


# ---------------------------------------------------------------- no wait for the device


@pytest.mark.parametrize(
    ("task", "mixing"), [("pretrain", False), ("finetune", False), ("finetune", True), ("linprobe", False)]
)
def test_no_task_waits_for_the_gpu(tmp_path, encoder, task, mixing):
    """Forward, loss, masking and augmentation on a fake GPU, which raises where it would wait or mix devices."""
    more = [] if task == "pretrain" else [f"init={encoder}", "augmentation=linprobe"]
    if task == "finetune" and not mixing:
        more += ["task.mixup=0", "task.cutmix=0"]
    cfg = composed(*TINY, f"task={task}", *CLASSIFY, *more)
    sets = build(SOURCES, cfg.data, "train"), build(SOURCES, cfg.data, "val")
    made = build_task(cfg, sets[1])
    made.check_data(*sets)
    made.load_init()
    with FakeTensorMode(allow_non_fake_inputs=True):
        made.to("cuda")
        batch = trial_of(cfg, made, "cuda").batch(4)
        with torch.autocast("cuda", torch.bfloat16):
            loss = made.train()(batch)["loss"]
    assert loss.device.type == "cuda" and loss.shape == ()


# Without lion and muon, timm's, which cannot skip a step by themselves: there the host waits for the gradient's norm.
# Muon also reads its count of steps, a tensor on the host, which waits for no GPU but which this mode refuses.
@pytest.mark.parametrize("optimizer", ["adamw", "lars", "sgd"])
@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_no_step_waits_for_the_gpu(optimizer, clip_grad):
    cfg = composed(*TINY_PRETRAIN, f"optimizer={optimizer}")
    made = build_task(cfg, build(SOURCES, cfg.data, "val"))
    gpu = torch.device("cuda")
    with torch.library._scoped_library("aten", "IMPL") as library, FakeTensorMode(allow_non_fake_inputs=True):
        library.impl("_fused_sgd_", lambda *_, **__: None, "Meta")  # which torch 2.14 has only for AdamW's
        made.to(gpu)
        groups = call(optim.param_groups, cfg.optimizer, made.trained)
        t: Any = SimpleNamespace(
            scaler=torch.amp.GradScaler("cuda", enabled=False),
            optimizer=build(optim.OPTIMIZERS, cfg.optimizer, groups),
            task=made,
            ranks=Ranks(gpu),
            progress=Progress.new(gpu),
        )
        watched: dict[str, torch.Tensor] = {}
        for _ in range(2):
            for parameter in made.trained.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            watched = engine.take_step(t, clip_grad, by_block=True)
    assert t.progress.bad_run.device.type == watched["grad_norm"].device.type == "cuda"


def test_backward_runs_without_a_device():
    """On `meta`, which has no values to wait for."""
    cfg = composed(*TINY_PRETRAIN)
    made = build_task(cfg, build(SOURCES, cfg.data, "val")).to("meta")
    made(trial_of(cfg, made, "meta").batch(4))["loss"].backward()
    assert all(p.grad is not None for p in made.trained.parameters() if p.requires_grad)


def test_divisors_of_a_share():
    assert micro_batch.divisors(12, 1, False) == [12, 6, 4, 3, 2, 1]
    assert micro_batch.divisors(12, 2, True) == [12, 6, 4, 2]
    assert micro_batch.divisors(7, 2, True) == []


def test_blocks_compute_again_by_default():
    cfg = composed(*TINY_PRETRAIN)
    made = build_task(cfg, build(SOURCES, cfg.data, "val"))
    assert {m.checkpointing for m in made.modules() if isinstance(m, Block)} == {"light"}
    assert math.isfinite(made(trial_of(cfg, made).batch(2))["loss"])
