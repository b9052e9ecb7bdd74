"""What a run computes does not depend on where it stopped, how it is cut up, or what went wrong on the way."""

import errno
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_PRETRAIN, composed, run_here
from PIL import Image
from torch import Tensor

from mae import checkpoint, device, engine, plan
from mae.distributed.ranks import Ranks
from mae.launch import errors
from mae.runs import checkpoints, environment, files
from mae.tracking import jsonl
from mae.tracking.base import Tracker
from mae.training import set_up


def saved(run: Path) -> dict[str, Tensor]:
    """Weights of a run's newest checkpoint."""
    path = checkpoints.newest_valid(run)
    assert path is not None
    return checkpoint.read_weights(path)


def weights(run: Path) -> str:
    return checkpoint.weights_digest(saved(run))


def lines(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock and the machine."""
    timed = ("images_per_second", "data_wait", "memory_mb")
    rows = files.read_json_lines(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows if "loss" in row or "val/loss" in row]


def test_a_run_leaves_what_the_contract_names(tmp_path):
    assert run_here(tmp_path / "run", *TINY_PRETRAIN) == 0
    run = tmp_path / "run"
    for name in ("config.yaml", "overrides.yaml", "metrics.jsonl", "log.txt", "summary.json", "checkpoints", "images"):
        assert (run / name).exists(), name
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == {
        *("task", "steps", "epochs", "images_seen", "seconds", "images_per_second", "checkpoint", "val_loss")
    }
    assert summary["images_seen"] == 2 * 144 and summary["epochs"] == 2 and (run / summary["checkpoint"]).is_dir()
    training = [row for row in files.read_json_lines(run / "metrics.jsonl") if "loss" in row]
    assert {"step", "images_seen", "epoch", "loss", "lr", "grad_norm", "images_per_second", "data_wait"} <= set(
        training[0]
    )
    assert [row["step"] for row in training] == list(range(1, summary["steps"] + 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_four_steps_equal_two_and_a_resume(tmp_path, workers):
    often = [*TINY_PRETRAIN, f"data.num_workers={workers}", "checkpoint.every_epochs=0.2", "checkpoint.keep=100"]
    run_here(tmp_path / "whole", *often)
    run_here(tmp_path / "cut", *often)
    run = tmp_path / "cut"
    for path in checkpoint.checkpoints_of(run)[2:]:  # as if it had been killed after step 2
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # cut short by the kill
    run_here(run, *often)
    assert weights(run) == weights(tmp_path / "whole")
    assert lines(run) == lines(tmp_path / "whole")


def test_a_damaged_checkpoint_is_reported_and_passed_over(tmp_path, caplog):
    often = [*TINY_PRETRAIN, "checkpoint.every_epochs=0.2", "checkpoint.keep=100"]
    run_here(tmp_path, *often)
    whole = weights(tmp_path)
    newest, before = checkpoint.checkpoints_of(tmp_path)[-1], checkpoint.checkpoints_of(tmp_path)[-2]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    (before / "trainer.pt").write_bytes((before / "trainer.pt").read_bytes()[:100])
    (tmp_path / "summary.json").unlink()
    with caplog.at_level(logging.WARNING):
        run_here(tmp_path, *often)
    log = (tmp_path / "log.txt").read_text()
    assert log.count("passing over a damaged checkpoint") == 2 and "its checksum differs" in log
    assert weights(tmp_path) == whole


def test_a_run_that_goes_on_with_other_images_says_so(tmp_path, caplog):
    def photo(name: str) -> None:
        (tmp_path / "photos").mkdir(exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)

    for k in range(40):
        photo(f"{k}.png")
    given = ["data=folder", f"data.root={tmp_path / 'photos'}", "data.fraction=1", f"data.cache_dir={tmp_path}"]
    for more in (0, 0, 1):
        if more:
            photo("more.png")
        t = set_up_here(tmp_path / "run", *given)
        t.progress.step += 1
        t.save()
        t.saver.wait()
        t.loader.close()
    text = "the training images are not those that the run began with (36 images"
    assert caplog.text.count(text) == 1


def test_accumulation_counts_every_image(tmp_path):
    """144 images in batches of 32: the last step holds 16, which micro-batches of 12 cut into 12 and 4."""
    base = [*TINY_PRETRAIN, "task.precision=fp64", "task.batch_size=48", "data.fraction=0.07"]  # 101 images
    run_here(tmp_path / "whole", *base)
    run_here(tmp_path / "parts", *base, "task.micro_batch_size=12")
    for a, b in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert a == pytest.approx(b, rel=1e-6)  # losses are summed in float32
    for name, whole in saved(tmp_path / "whole").items():
        torch.testing.assert_close(saved(tmp_path / "parts")[name], whole, rtol=1e-9, atol=1e-12)


def set_up_here(run: Path, *overrides: str) -> engine.Training:
    run.mkdir(parents=True, exist_ok=True)
    cfg = composed(*TINY_PRETRAIN, *overrides)
    return engine.call(set_up, cfg.task, run, cfg, Ranks(device.pick(cfg.device)), Tracker())


class Spoiled(torch.nn.Module):
    """A task whose loss is not finite at some steps."""

    def __init__(self, task: torch.nn.Module, at: set[int], value: float):
        super().__init__()
        self.task, self.at, self.value, self.calls = task, at, value, 0

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        out = self.task(batch)
        return {"loss": out["loss"] * self.value} if self.calls in self.at else out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, value, optimizer):
    t = set_up_here(tmp_path, f"optimizer={optimizer}", "optimizer.betas=[0.9,0.95]", "task.max_steps=3")
    t.model = Spoiled(t.task, {2}, value)
    seen: list[str] = []
    after_step = t.task.after_step

    def note(skipped: Tensor) -> None:
        seen.append(checkpoint.weights_digest(t.task.model.state_dict()))
        after_step(skipped)

    t.task.after_step = note
    engine.call(engine.train, t.cfg.task, t)
    assert seen[0] == seen[1] != seen[2]
    assert t.progress.bad_steps == 1 and t.progress.bad_run == 0


def test_a_run_that_diverges_ends_with_a_checkpoint(tmp_path):
    t = set_up_here(tmp_path, "task.max_bad_steps=3")
    t.model = Spoiled(t.task, set(range(3, 100)), float("nan"))
    with pytest.raises(engine.Diverged):
        engine.call(engine.train, t.cfg.task, t)
    path = checkpoints.newest_valid(tmp_path)
    assert path is not None and path.name == "step_00000005"
    assert all(w.isfinite().all() for w in checkpoint.read_weights(path).values())


def test_divergence_ends_with_a_sentence_and_a_code(tmp_path, capfd):
    code = run_here(
        tmp_path, *TINY_PRETRAIN, "optimizer=sgd", "optimizer.base_lr=1e30", "task.max_bad_steps=2", "task.epochs=9"
    )
    assert code == 3
    text = (tmp_path / "log.txt").read_text()
    assert "not finite" in text and "optimizer.base_lr" in text
    assert not (tmp_path / "summary.json").exists()


def test_a_start_s_record_is_whole_after_one_that_a_kill_cut_short(tmp_path):
    environment.keep(tmp_path, "cpu", None, 1)
    with (tmp_path / "environment.jsonl").open("a") as file:
        file.write('{"started": "2026')
    environment.keep(tmp_path, "cpu", None, 2)
    environment.add(tmp_path, attention="plain")
    first, second = files.read_json_lines(tmp_path / "environment.jsonl")
    assert (first["processes"], second["processes"], second["attention"]) == (1, 2, "plain")


def test_gradient_clipping_bounds_the_update(tmp_path):
    for clip, bound in ((1e-3, 1e-3), (None, None)):
        t = set_up_here(tmp_path / str(clip), "optimizer=sgd", "optimizer.momentum=0.0", "optimizer.weight_decay=0.0")
        before = [p.detach().clone() for p in t.task.trained.parameters()]
        batch, _ = next(t.batches())
        t.model(batch)["loss"].backward()
        for group in t.optimizer.param_groups:
            group["lr"] = 1.0
        norm = engine.take_step(t, clip, by_block=False)["grad_norm"]
        after = [p.detach() for p in t.task.trained.parameters()]
        moved = torch.stack([(a - b).norm() for a, b in zip(before, after, strict=True)]).norm()
        assert float(moved) == pytest.approx(bound if bound else float(norm), rel=1e-3)


def test_bf16_trains_to_the_same_loss_within_noise(tmp_path):
    run_here(tmp_path / "fp32", *TINY_PRETRAIN)
    run_here(tmp_path / "bf16", *TINY_PRETRAIN, "task.precision=bf16")
    a, b = (lines(tmp_path / name)[-1]["val/loss"] for name in ("fp32", "bf16"))
    assert a == pytest.approx(b, rel=0.02) and a != b


@pytest.mark.parametrize("its_own", [True, False])
def test_bf16_is_auto_where_it_is_fast_and_a_warning_elsewhere(its_own, monkeypatch, caplog):
    monkeypatch.setattr(device, "has_bf16", lambda _: its_own)
    cpu = torch.device("cpu")
    assert device.number_format("auto", cpu) == (torch.bfloat16 if its_own else torch.float32)
    assert not caplog.records
    assert device.number_format("bf16", cpu) == torch.bfloat16
    assert ("this cpu has no arithmetic of its own for it" in caplog.text) is not its_own


def test_a_trainer_state_that_carries_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("code ran",)

    checkpoint.write(tmp_path / "step_00000001", {"w": torch.ones(1)}, {"x": Code()}, {"step": 1, "epoch": 0.1})
    with pytest.raises(checkpoint.DamagedCheckpoint, match="is refused: it is damaged, or holds code"):
        checkpoint.read_trainer(tmp_path / "step_00000001")


def test_old_checkpoints_are_removed_but_for_every_nth(tmp_path):
    saver = checkpoint.Checkpoints(tmp_path, every_epochs=1, every_minutes=None, keep=2, keep_every_epochs=3)
    for epoch in range(1, 9):
        saver.save(epoch * 10, float(epoch), {"w": torch.ones(2)}, {"step": epoch * 10})
    saver.wait()
    assert [int(p.name[5:]) for p in checkpoint.checkpoints_of(tmp_path)] == [30, 60, 70, 80]


def test_a_damaged_checkpoint_of_a_later_step_takes_no_place(tmp_path):
    damaged = tmp_path / "checkpoints" / checkpoint.step_name(100)
    damaged.mkdir(parents=True)  # after a power cut, perhaps
    saver = checkpoint.Checkpoints(tmp_path, every_epochs=1, every_minutes=None, keep=1, keep_every_epochs=1)
    for step in (10, 20, 100, 110):
        saver.save(step, step / 100, {"w": torch.ones(2)}, {"step": step})
        saver.wait()
        kept = [int(p.name[5:]) for p in checkpoint.checkpoints_of(tmp_path)]
        assert kept == {10: [10, 100], 20: [20, 100], 100: [100], 110: [100, 110]}[step]
    assert checkpoint.verify(damaged)["epoch"] == 1.0


def test_the_link_to_the_best_checkpoint_is_repaired_by_what_manifests_say(tmp_path):
    saver = checkpoint.Checkpoints(tmp_path, every_epochs=1, every_minutes=None, keep=9, keep_every_epochs=None)
    for step, best in ((10, True), (20, True), (30, False)):
        saver.save(step, step / 10, {"w": torch.ones(2)}, {}, best)
    saver.wait()
    first, second, third = checkpoint.checkpoints_of(tmp_path)
    link = tmp_path / "checkpoints" / "best"
    assert checkpoint.best_of(tmp_path) == second
    for restored, target, repaired in (
        (third, None, second),  # killed before the link was made
        (third, first, second),  # or moved
        (first, second, first),  # later ones are passed over, and written again
        (third, third, third),  # of an earlier version, which did not note it
    ):
        link.unlink()
        if target is not None:
            link.symlink_to(target.name)
        checkpoints.repair_best(tmp_path, restored)
        assert checkpoint.best_of(tmp_path) == repaired


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch, caplog):
    saver = checkpoint.Checkpoints(tmp_path, every_epochs=1, every_minutes=None, keep=1, keep_every_epochs=None)
    saver.save(1, 1.0, {"w": torch.ones(2)}, {})
    saver.wait()
    remove = checkpoint.shutil.rmtree

    def refused(path, **options):
        if Path(path).name == checkpoint.step_name(1):
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        remove(path, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refused)
    saver.save(2, 2.0, {"w": torch.ones(2)}, {})
    saver.wait()
    assert [int(p.name[5:]) for p in checkpoint.checkpoints_of(tmp_path)] == [1, 2]
    assert "an old checkpoint cannot be removed: " in caplog.text and "(Operation not permitted)" in caplog.text


def test_a_late_save_is_asked_for_once(tmp_path):
    saver = checkpoint.Checkpoints(tmp_path, every_epochs=1, every_minutes=1e-9, keep=2, keep_every_epochs=None)
    for step in (1, 2):
        assert saver.late() and not saver.late()
        saver.save(step, 0.1, {"w": torch.ones(2)}, {})
    saver.wait()


def test_saving_copies_before_it_returns(tmp_path):
    saver = checkpoint.Checkpoints(tmp_path, every_epochs=1, every_minutes=None, keep=2, keep_every_epochs=None)
    weight, moment = torch.zeros(1000), {"m": [torch.zeros(1000)]}
    saver.save(1, 0.1, {"w": weight}, {"optimizer": moment})
    weight += 1
    moment["m"][0] += 1
    saver.wait()
    path = checkpoint.checkpoints_of(tmp_path)[0]
    assert not checkpoint.read_weights(path)["w"].any() and not checkpoint.read_trainer(path)["optimizer"]["m"][0].any()


def test_random_states_come_back():
    import random

    import numpy as np

    state = checkpoint.random_state()
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    checkpoint.set_random_state(state)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())


def test_images_seen_and_crossings_of_a_plan():
    p = plan.make_plan(101, 4, 1, epochs=2.5, max_steps=None, batch_size=32, micro_batch_size=None, drop_last=False)
    assert p.steps == 10 and [p.images_seen(s) for s in (0, 1, 3, 4, 5, 8)] == [0, 32, 96, 101, 133, 202]
    assert [s for s in range(1, 11) if p.crosses(0.5, s)] == [2, 4, 6, 8, 10]


def test_the_traceback_of_a_failure_is_in_log_txt(tmp_path, monkeypatch):
    from mae.tasks.pretrain import Pretrain

    def broken(self, batch):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(Pretrain, "forward", broken)
    with pytest.raises(ZeroDivisionError) as caught:
        run_here(tmp_path, *TINY_PRETRAIN)
    log = (tmp_path / "log.txt").read_text()
    assert "rank 0 failed" in log and "a bug of ours" in log and "Traceback" in log
    explanation = errors.explain(caught.value)
    assert explanation.startswith("This is a bug: ZeroDivisionError: a bug of ours (tests/test_engine.py:"), explanation
    assert f", in broken). The traceback is in {tmp_path / 'log.txt'};" in explanation


def test_the_micro_batch_may_change_between_two_starts(tmp_path):
    run_here(tmp_path, *TINY_PRETRAIN, "task.max_steps=2")
    run = tmp_path
    (run / "summary.json").unlink()
    assert run_here(run, *TINY_PRETRAIN, "task.max_steps=2", "task.micro_batch_size=16") == 0


def test_a_skipped_step_leaves_metrics_readable(tmp_path):
    t = set_up_here(tmp_path, "task.max_steps=4", "task.log_every_steps=2")
    t.tracker = jsonl.JsonLines(tmp_path)
    t.model = Spoiled(t.task, {2}, float("nan"))
    engine.call(engine.train, t.cfg.task, t)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    first = next(row for row in files.read_json_lines(tmp_path / "metrics.jsonl") if "loss" in row)
    assert first["loss"] == pytest.approx(1.5, rel=0.3) and first["grad_norm"] is None
    assert "skipped 1 steps" in (tmp_path / "events.jsonl").read_text()


class Overflowing(torch.nn.Module):
    """A task whose loss is finite and whose gradient is not, at its second call: as float16 overflows."""

    def __init__(self, task: torch.nn.Module):
        super().__init__()
        self.task, self.calls = task, 0

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        loss = self.task(batch)["loss"]
        if self.calls == 2:
            loss.register_hook(lambda gradient: gradient * float("inf"))
            loss = loss * 1.0
        return {"loss": loss}


def test_the_loss_told_is_that_of_the_steps_taken(tmp_path):
    losses = []
    for every in (1, 2):
        t = set_up_here(tmp_path / str(every), "task.max_steps=2", f"task.log_every_steps={every}")
        t.tracker = jsonl.JsonLines(t.run)
        t.model = Overflowing(t.task)
        engine.call(engine.train, t.cfg.task, t)
        losses.append([row["loss"] for row in files.read_json_lines(t.run / "metrics.jsonl") if "loss" in row])
    (first, skipped), (both,) = losses
    assert skipped is None and both == first
