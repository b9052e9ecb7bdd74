"""The first step that is not finite: what a run leaves of it, and its replay."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_PRETRAIN, composed, run_cli, run_here
from torch import Tensor

from mae import checkpoint, engine
from mae.config import from_run
from mae.config.check import with_values
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.instability import record, replay
from mae.instability.watch import Finding, examine
from mae.instability.words import advice, origin
from mae.launch import launch
from mae.progress import Progress
from mae.runs import bad_step, checkpoints, files
from mae.tracking.base import Tracker
from mae.training import Training, set_up

BAD = 37  # the image with values near the end of float32
SIZES = [override for override in TINY if not override.startswith("data.")]
FLOATS = ["data=scientific", "data.in_chans=3", "data.img_size=16", "data.mean=[0.5]", "data.std=[0.3]"]
RUN = [*SIZES, *FLOATS, "task.batch_size=16", "task.epochs=3", "task.warmup_epochs=1", "task.log_every_steps=4"]
RUN += ["checkpoint.every_epochs=0.3", "checkpoint.keep=1"]
CPU = Ranks(torch.device("cpu"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Images of floats, of which one overflows."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 96), ("val", 8)):
        (folder / split).mkdir()
        for k in range(count):
            image = random.random((3, 16, 16), dtype=np.float32)
            np.save(folder / split / f"{k:03d}.npy", image * (1e30 if split == "train" and k == BAD else 1))
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run") / "run"
    assert run_here(run, *RUN, f"data.root={images}") == 0
    return run


def events(run: Path) -> list[str]:
    return [row["event"] for row in files.read_json_lines(run / "events.jsonl")]


def digest_of(path: Path | None) -> str:
    assert path is not None
    return checkpoint.weights_digest(checkpoint.read_weights(path))


# ---------------------------------------------------------------- what a run leaves


def test_a_run_leaves_its_first_bad_step_with_its_images_a_checkpoint_and_where_it_arose(run):
    bad = bad_step.read_bad_step(run)
    assert bad.step == 3 and BAD in bad.images and len(bad.images) == 16 and bad.block == "blocks.0"
    assert bad.checkpoint == 2  # the newest before it, though the run has removed its own
    assert [path.name for path in checkpoints.checkpoints_of(run)] == ["step_00000018"]
    assert [checkpoints.damage(path) for path in checkpoints.checkpoints_of(run / "bad_step")] == [""]
    (text,) = [event for event in events(run) if "was the first" in event]
    assert "step 4 was the first that was not finite. Its images with the weights of step 4: The first value" in text
    assert "in the forward pass, in blocks.0.norm1 (block blocks.0), as the result of native_layer_norm" in text
    assert f"`python run.py replay={run}` runs it again." in text
    assert sum("skipped 1 steps" in event for event in events(run)) == 3  # of which the first alone is recorded


def test_looking_at_the_bad_step_changes_no_bit_of_the_run(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "record_bad_step", lambda *_: None)
    assert run_here(tmp_path / "run", *RUN, f"data.root={images}") == 0
    ours, plain = (digest_of(checkpoints.newest_valid(folder)) for folder in (run, tmp_path / "run"))
    assert ours == plain and not (tmp_path / "run" / "bad_step").exists()


def test_a_replay_names_image_block_and_what_to_try_from_the_same_weights(run, images, tmp_path, monkeypatch):
    """Its weights before the bad step are bit for bit those of the run."""
    digests = []
    take_step = engine.take_step

    def noted(t: Training, *arguments: Any, **named: Any) -> Any:
        digests.append(checkpoint.weights_digest(t.task.model.state_dict()))
        return take_step(t, *arguments, **named)

    monkeypatch.setattr(engine, "take_step", noted)
    assert run_here(tmp_path / "same", *RUN, f"data.root={images}", "task.max_steps=4") == 0

    def seen(t: Training, batches: Any) -> Finding:
        assert checkpoint.weights_digest(t.task.model.state_dict()) == digests[3] != digests[2]
        return examine(t, batches)

    monkeypatch.setattr(replay, "examine", seen)
    cfg, folder = with_values(engine.read_config(run), replay=str(run)), tmp_path / "bad_step"
    shutil.copytree(run / "bad_step", folder)
    replay.replay(folder, cfg, CPU)
    text = bad_step.read_replay(folder)
    assert "Step 4 (epoch 0.50), 16 images, repeated from the checkpoint of step 2." in text
    assert "in blocks.0.norm1 (block blocks.0), as the result of native_layer_norm" in text
    assert f"It comes from image {BAD} (037.npy)." in text and "Look at the images named" in text
    assert "Gradients that are not finite: 48 of 48, from the output on: decoder_pred.bias, decoder_pred.weight" in text
    assert "by block: prepare 3.4e+30, patch_embed 4" in text and "blocks.1 nan" in text
    assert "task.clip_grad=1.0" in text and "A lower optimizer.base_lr than" in text


def replayed_here(run: Path) -> int:
    """`replay=RUN` in this process; returns the exit code."""
    return launch.launch(*from_run.replayed(composed(f"replay={run}"), [f"replay={run}"]))


def test_the_command_prints_the_same_report_each_time_and_leaves_the_run_as_it_is(run, capsys):
    before = {path: path.stat().st_mtime for path in run.glob("*") if path.name != "bad_step"}
    reports = []
    for _ in range(2):
        assert replayed_here(run) == 0
        reports.append(capsys.readouterr().out)
    assert reports[0] == reports[1] == (run / "bad_step" / "replay.txt").read_text()
    assert f"image {BAD} (037.npy)" in reports[0] and reports[0].startswith("Step 4 ")
    assert before == {path: path.stat().st_mtime for path in run.glob("*") if path.name != "bad_step"}


def test_a_replay_says_that_its_checkpoint_is_gone_and_that_its_record_is_damaged(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "bad_step" / "checkpoints")
    assert replayed_here(copy) == 0
    saved = bad_step.read_bad_step(copy).checkpoint
    assert f"repeated from the beginning, since the checkpoint of step {saved} is gone." in capsys.readouterr().out
    (copy / "bad_step" / "bad_step.json").write_text('{"step": 3}')
    with pytest.raises(UserError, match="bad_step.json is damaged, or of another version of this program."):
        bad_step.read_bad_step(copy)


def test_a_run_that_goes_on_keeps_its_bad_step(run, images, tmp_path):
    """Resumed from before the bad step, it meets it again."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints")
    shutil.copytree(run / "bad_step" / "checkpoints", copy / "checkpoints")
    before = (copy / "bad_step" / "bad_step.json").stat().st_mtime
    assert run_here(copy, *RUN, f"data.root={images}") == 0
    assert (copy / "bad_step" / "bad_step.json").stat().st_mtime == before
    assert digest_of(checkpoints.newest_valid(copy)) == digest_of(checkpoints.newest_valid(run))


def test_a_run_that_diverges_names_the_block_and_the_command(tmp_path):
    bad = ["optimizer=sgd", "optimizer.base_lr=1e30", "task.max_bad_steps=2", "task.epochs=9"]
    assert run_here(tmp_path, *TINY_PRETRAIN, *bad) == 3
    block = bad_step.read_bad_step(tmp_path).block
    assert block is not None
    text = (tmp_path / "log.txt").read_text()
    assert f"The first value that is not finite arose in {block}, at step 3." in text
    assert f"`python run.py replay={tmp_path}` runs that step again and looks at every operation." in text


def test_a_run_whose_loss_is_not_finite_at_its_end_has_diverged(tmp_path):
    bad = ["optimizer=sgd", "optimizer.base_lr=1e30", "task.max_bad_steps=50"]
    assert run_here(tmp_path, *TINY_PRETRAIN, *bad) == 3
    assert "val/loss is nan after the last step." in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "summary.json").exists() and "diverged" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_several_processes_record_and_replay_as_one(images, tmp_path, sharding):
    run = tmp_path / "run"
    more = [f"data.root={images}", "launcher.processes=2", f"launcher.sharding={sharding}", f"output_dir={run}"]
    ended = run_cli(*RUN, *more)
    assert ended.returncode == 0, ended.stderr
    bad = bad_step.read_bad_step(run)
    assert bad.step == 3 and bad.processes == 2 and len(bad.findings) == (2 if sharding == "none" else 0)
    ended = run_cli(f"replay={run}")
    assert ended.returncode == 0, ended.stderr
    rank = bad.images.index(BAD) % 2
    assert f"Process {rank}: The first value that is not finite arises in the forward pass, in blocks.0" in ended.stdout
    assert f"Process {1 - rank}: Every value of the step is finite." in ended.stdout
    assert f"image {BAD} (037.npy)" in ended.stdout


# ---------------------------------------------------------------- where a value arises


def ready(folder: Path, *overrides: str) -> tuple[Training, list[dict[str, Tensor]]]:
    cfg = composed(*TINY_PRETRAIN, *overrides)
    folder.mkdir(exist_ok=True)
    t = engine.call(set_up, cfg.task, folder, cfg, CPU, Tracker())
    return t, t.loader.batches_of(0, 0)


def test_a_finite_step_has_no_finding_and_leaves_no_trace(tmp_path):
    t, batches = ready(tmp_path)
    state, weights = torch.get_rng_state(), checkpoint.weights_digest(t.task.model.state_dict())
    finding = examine(t, batches)
    assert finding.phase is None and finding.block is None and not finding.gradients
    assert {"blocks.0", "blocks.1", "norm", "decoder_blocks.0", "decoder_pred"} <= set(finding.largest)
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in t.task.parameters())
    assert weights == checkpoint.weights_digest(t.task.model.state_dict())
    assert "finite this time" in advice([finding], t.cfg, t.dtype)[0]


@pytest.mark.parametrize("checkpointing", ["none", "light", "blocks"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, checkpointing):
    t, batches = ready(tmp_path, f"task.checkpointing={checkpointing}")
    with torch.no_grad():
        t.task.model.get_parameter("blocks.1.mlp.fc1.weight")[3, 4] = torch.inf
    finding = examine(t, batches)
    assert (finding.phase, finding.block, finding.weight) == ("forward", "blocks.1", "blocks.1.mlp.fc1.weight")
    assert finding.weights == ["blocks.1.mlp.fc1.weight"] and finding.all_images is False
    assert "start again with init=" in advice([finding], t.cfg, t.dtype)[0]


class Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.inf


def test_a_gradient_that_arises_in_the_backward_pass_is_placed(tmp_path):
    t, batches = ready(tmp_path)
    block = t.task.model.get_submodule("blocks.1")
    block.register_forward_hook(lambda module, inputs, output: Explode.apply(output))
    finding = examine(t, batches)
    assert finding.phase == "backward" and finding.operation == "mul"
    reached = {name.split(".")[0] for name in finding.gradients}
    assert reached == {"blocks", "patch_embed", "cls_token"}  # not the decoder, which comes before it
    assert finding.gradients[0] == "blocks.1.mlp.fc2.bias"
    assert "arises in the backward pass" in origin(finding)


def test_fp16_overflows_where_float32_does_not(tmp_path):
    t, batches = ready(tmp_path)
    with torch.no_grad():
        t.task.model.get_parameter("blocks.0.mlp.fc2.bias")[:] = 1e5
    assert examine(t, batches).phase is None
    half = dataclasses.replace(t, dtype=torch.float16)
    finding = examine(half, batches)
    assert (finding.phase, finding.block) == ("forward", "blocks.0")
    assert "fp16 overflows above 65504" in advice([finding], t.cfg, half.dtype)[0]


def test_a_sum_of_finite_gradients_may_overflow(tmp_path):
    t, batches = ready(tmp_path)
    for batch in batches:
        batch["weight"] = torch.tensor(1e38)  # of gradients below 1, whose squares add up to more than float32 holds
    finding = examine(t, batches)
    assert finding.phase == "norm" and not finding.gradients and finding.block is None
    assert origin(finding) == "Every gradient is finite, but the norm over all of them overflows."


def test_without_memory_the_run_goes_on(tmp_path, monkeypatch, caplog):
    t, _ = ready(tmp_path)

    def hungry(*_: Any) -> Finding:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(record, "examine", hungry)
    assert record.examine_now(t, 0, 0) is None
    assert "could not be examined, for lack of memory" in caplog.text


# ---------------------------------------------------------------- which step counts


def test_the_first_bad_step_is_counted_on_the_device():
    progress, losses = Progress.new(torch.device("cpu")), [1.0, 2.0, float("nan"), 1.0, float("inf")]
    for loss in losses:
        progress.bad_run = torch.tensor(float(not np.isfinite(loss)))
        progress.add({"loss": torch.tensor(loss)})
        progress.step += 1
    assert progress.first_bad == 2


def test_a_gradient_that_the_loss_scale_of_fp16_overflows_is_no_bad_step():
    progress = Progress.new(torch.device("cpu"))
    for loss in (1.0, float("nan")):
        progress.bad_run = torch.tensor(1.0)
        progress.add({"loss": torch.tensor(loss)}, scaled=True)
        progress.step += 1
    assert progress.first_bad == 1


def test_a_checkpoint_of_an_earlier_version_has_no_bad_step():
    progress = Progress.new(torch.device("cpu"))
    state = {key: value for key, value in progress.state().items() if "first" not in key and "recorded" not in key}
    progress.load({"progress": state | {"step": 5}, "sums": [{"loss": 0.0}]}, 0, 1)
    assert progress.step == 5 and progress.first_bad == -1 and not progress.bad_step_recorded


# ---------------------------------------------------------------- sentences


def test_a_run_without_a_bad_step_has_nothing_to_replay(tmp_path):
    assert run_here(tmp_path / "run", *TINY_PRETRAIN, "task.max_steps=1") == 0
    ended = run_cli(f"replay={tmp_path / 'run'}")
    assert ended.returncode == 1 and "this run has left no bad step" in ended.stderr
    assert not (tmp_path / "run" / "bad_step").exists()
    with pytest.raises(UserError, match="nothing to replay"):
        bad_step.read_bad_step(tmp_path)
    ended = run_cli(f"replay={tmp_path}")
    assert "is not the directory of a run: it holds no config.yaml." in ended.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("task.precision=bf16", "task.precision cannot be changed together with replay="),
        ("output_dir=elsewhere", "output_dir cannot be set together with replay="),
        ("resume=elsewhere", "resume cannot be changed together with replay="),
    ],
)
def test_what_contradicts_a_replay_is_refused(run, more, message):
    with pytest.raises(UserError, match=message):
        from_run.replayed(composed(f"replay={run}", more), [f"replay={run}", more])
