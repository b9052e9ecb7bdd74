"""Fine-tuning, probing, k-NN, pictures, export and the pipeline, as runs and by their parts."""

import itertools
import json
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, TINY_PRETRAIN, composed, labels_of, of_type, run_here
from omegaconf import OmegaConf
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from mae import checkpoint
from mae.config import rules
from mae.config.identity import identity
from mae.config.saved import read_config, stored_overrides
from mae.data import pack
from mae.data.sampler import Batches, Sampler
from mae.data.source import Arrays, Source
from mae.errors import UserError
from mae.launch.pipeline import stage_config
from mae.models.layers import Block
from mae.models.vit import classifier
from mae.plan import make_plan
from mae.runs import checkpoints, files
from mae.tasks.base import build_task
from mae.tasks.batches import both_sets
from mae.tasks.features import Features
from mae.tasks.finetune import Finetune, freeze, unfrozen
from mae.tasks.knn import Neighbours
from mae.tasks.labels import check_classes
from mae.tasks.linprobe import Linprobe, probe_head
from mae.tools import dry_run

TINY_FINETUNE = [*TINY, "task=finetune", "task.batch_size=32", "task.max_steps=3", "task.log_every_steps=1"]
TINY_LINPROBE = [*TINY, "task=linprobe", "task.batch_size=32", "task.max_steps=3"]
TINY_OTHER = [one for one in TINY if "precision" not in one]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("pretrained")
    validated = ["task.knn_every_epochs=0.5", "task.eval_every_epochs=0.5", "task.eval_mask_ratios=[0.5,0.75]"]
    assert run_here(run, *TINY_PRETRAIN, "task.max_steps=4", *validated) == 0
    return run


@pytest.fixture(scope="module")
def finetuned(pretrained, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finetuned")
    assert run_here(run, *TINY_FINETUNE, f"init={pretrained}") == 0
    return run


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    path = checkpoints.newest_valid(run)
    assert path is not None
    return checkpoint.read_weights(path)


def said(*overrides: str, directory: Path) -> str:
    """The message of a run that is refused."""
    with pytest.raises(ValueError) as caught:
        run_here(directory, *overrides)
    return str(caught.value)


def folder_of(root: Path, classes: dict[str, int], size: int = 16) -> Path:
    """Images of noise in folders of classes; a class of 0 images is an empty folder."""
    chance = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = chance.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k:03d}.png")
    return root


# ---------------------------------------------------------------- fine-tuning


def test_a_fine_tuned_run_has_its_summary_its_best_checkpoint_and_its_classes(finetuned):
    results = summary(finetuned)
    keys = {
        "task",
        "steps",
        "epochs",
        "images_seen",
        "seconds",
        "images_per_second",
        "checkpoint",
        "top1",
        "top5",
        "loss",
    }
    assert keys <= results.keys() and results["task"] == "finetune" and results["steps"] == 3
    assert 0 <= results["top1"] <= results["top5"] <= 100
    assert (finetuned / "checkpoints" / "best" / "model.safetensors").is_file()
    assert json.loads((finetuned / "classes.json").read_text()) == [str(digit) for digit in range(10)]
    assert "recognised as ours, pretrained (encoder and decoder)" in (finetuned / "log.txt").read_text()
    names = set(weights(finetuned))
    assert {"fc_norm.weight", "head.weight"} <= names and not any(n.startswith(("norm.", "decoder")) for n in names)


def test_a_run_that_was_killed_before_its_best_checkpoint_was_linked_links_it(finetuned, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finetuned, run, symlinks=True)
    best = checkpoints.best_of(run)
    (run / "checkpoints" / "best").unlink()
    (run / "summary.json").unlink()
    overrides = OmegaConf.to_container(OmegaConf.load(run / "overrides.yaml"))
    assert run_here(run, *of_type(list, overrides)) == 0
    assert best is not None and checkpoints.best_of(run) == best


def test_mixing_averages_and_drop_path_go_on_after_a_resume_as_if_undisturbed(tmp_path):
    command = [*TINY_FINETUNE, "task.ema_decay=0.9", "task.drop_path=0.5", "task.mixup=0.8", "task.cutmix=1.0"]
    command += ["task.batch_size=16", "task.max_steps=4", "checkpoint.every_epochs=0.25", "checkpoint.keep=9"]
    assert run_here(tmp_path, *command) == 0
    before = checkpoint.weights_digest(weights(tmp_path))
    for step in (3, 4):
        for file in (tmp_path / "checkpoints" / checkpoint.step_name(step)).iterdir():
            file.unlink()
    (tmp_path / "summary.json").unlink()
    assert run_here(tmp_path, *command) == 0
    assert checkpoint.weights_digest(weights(tmp_path)) == before


@pytest.mark.parametrize(("blocks", "changed"), [
    (0.0, ("head.",)),
    (0.5, ("head.", "fc_norm.", "blocks.1.norm2.", "blocks.1.mlp.")),
    (1.0, ("head.", "fc_norm.", "blocks.1.")),
    (1.5, ("head.", "fc_norm.", "blocks.1.", "blocks.0.norm2.", "blocks.0.mlp.")),
])  # fmt: skip
def test_partial_fine_tuning_changes_what_it_should_and_no_bit_else(pretrained, tmp_path, blocks, changed):
    assert run_here(tmp_path, *TINY_FINETUNE, f"init={pretrained}", f"task.finetune_blocks={blocks}") == 0
    before, after = weights(pretrained), weights(tmp_path)
    for name, tensor in after.items():
        if name.startswith("fc_norm.") and blocks == 0:
            assert tensor.unique().item() == (1.0 if name.endswith("weight") else 0.0)  # as initialised
        elif name.startswith(changed):
            assert name not in before or not torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, before[name]), name


def test_frozen_blocks_are_not_dropped_after_a_resume_either(pretrained, tmp_path):
    command = [*TINY_FINETUNE, f"init={pretrained}", "task.finetune_blocks=0.5", "task.drop_path=0.5"]
    command += ["task.batch_size=16", "task.max_steps=6", "checkpoint.every_epochs=0.2", "checkpoint.keep=9"]
    command += ["task.eval_every_epochs=0.34"]
    assert run_here(tmp_path, *command) == 0
    before = checkpoint.weights_digest(weights(tmp_path))
    names = [path.name for path in checkpoint.checkpoints_of(tmp_path)]
    assert names == [checkpoint.step_name(step) for step in (2, 4, 6)]  # validated at 4 (.34 of 9 steps) and 6
    for file in (tmp_path / "checkpoints" / checkpoint.step_name(6)).iterdir():
        file.unlink()
    (tmp_path / "summary.json").unlink()
    assert run_here(tmp_path, *command) == 0
    assert checkpoint.weights_digest(weights(tmp_path)) == before


def test_frozen_blocks_are_not_dropped(tmp_path):
    model = tiny_classifier(drop_path=0.9)
    freeze(model, 1.0)
    task = Finetune.__new__(Finetune)
    torch.nn.Module.__init__(task)
    task.live = task.model = model
    task.train()
    assert [block.training for block in model.blocks] == [False, True]
    assert {id(p) for part in unfrozen(model, 1.0) for p in part.parameters()} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def tiny_classifier(classes: int = 10, pool: str = "avg", drop_path: float = 0.0, img_size: int = 16):
    torch.manual_seed(0)
    return classifier(
        img_size=img_size, patch_size=4, in_chans=3, embed_dim=32, depth=2, num_heads=2, mlp_ratio=4.0,
        num_classes=classes, drop_path=drop_path, global_pool=pool,  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_average_follows_the_weights_and_stays_where_a_step_was_skipped():
    cfg = composed(*TINY_FINETUNE, "task.ema_decay=0.75")
    task = of_type(Finetune, build_task(cfg, _Labelled()))
    with torch.no_grad():
        for p in task.live.parameters():
            p.add_(1.0)
    before = [p.clone() for p in task.model.parameters()]
    task.after_step(torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))
    task.after_step(torch.tensor(0.0))
    for old, average in zip(before, task.model.parameters(), strict=True):
        assert torch.allclose(average, old + 0.25, atol=1e-6)
    assert not any(p.requires_grad for p in task.model.parameters())


def test_the_average_moves_as_lerp_does_in_a_few_calls_whatever_the_number_of_weights():
    task = of_type(Finetune, build_task(composed(*TINY_FINETUNE, "task.ema_decay=0.9"), _Labelled()))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in task.live.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    expected = [a.lerp(p, 0.1) for a, p in zip(task.model.parameters(), task.live.parameters(), strict=True)]
    with Calls() as calls:
        task.after_step(torch.tensor(0.0))
    assert len(calls.names) < 10 < len(expected), calls.names
    for average, value in zip(task.model.parameters(), expected, strict=True):
        torch.testing.assert_close(average, value, rtol=1e-6, atol=1e-7)


class Calls(TorchDispatchMode):
    """Names of the operators that are called, each of which launches kernels on a GPU."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [str(func)] if not func.is_view else []
        return func(*args, **(kwargs or {}))


class _Labelled(Source):
    classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return 0


def test_the_best_checkpoint_outlives_newer_ones(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    saver = checkpoint.Checkpoints(tmp_path, every_epochs=1, every_minutes=None, keep=1, keep_every_epochs=None)
    for step, best in ((1, True), (2, False), (3, False)):
        saver.save(step, step, {"w": torch.full((1,), float(step))}, {}, best)
    saver.wait()
    assert [path.name for path in checkpoint.checkpoints_of(tmp_path)] == ["step_00000001", "step_00000003"]
    assert safetensors.torch.load_file(tmp_path / "checkpoints" / "best" / "model.safetensors")["w"].item() == 1.0
    saver.save(4, 4, {"w": torch.zeros(1)}, {}, True)
    saver.wait()
    assert [path.name for path in checkpoint.checkpoints_of(tmp_path)] == ["step_00000004"]


def test_a_best_checkpoint_that_a_copy_made_a_folder_gives_way_to_a_better_one(tmp_path):
    saver = checkpoint.Checkpoints(tmp_path, every_epochs=1, every_minutes=None, keep=2, keep_every_epochs=None)
    saver.save(1, 1, {"w": torch.ones(1)}, {}, True)
    saver.wait()
    shutil.copytree(tmp_path, tmp_path / "copy")  # follows links, as scp does
    copied = checkpoint.Checkpoints(tmp_path / "copy", every_epochs=1, every_minutes=None, keep=2, keep_every_epochs=2)
    copied.save(2, 2, {"w": torch.zeros(1)}, {}, False)
    copied.wait()
    best = tmp_path / "copy" / "checkpoints" / "best"
    assert not best.is_symlink() and checkpoint.read_weights(best)["w"].item() == 1.0
    copied.save(3, 3, {"w": torch.full((1,), 3.0)}, {}, True)
    copied.wait()
    assert best.is_symlink() and checkpoint.read_weights(best)["w"].item() == 3.0


def test_another_image_size_non_square_too_interpolates_positions(pretrained, tmp_path):
    size = ["model.img_size=[16,24]", "task.max_steps=1"]
    assert run_here(tmp_path, *TINY_FINETUNE, f"init={pretrained}", *size) == 0
    assert weights(tmp_path)["pos_embed"].shape == (1, 1 + 4 * 6, 32)
    assert "interpolated from 4 x 4 to 4 x 6 patches" in (tmp_path / "log.txt").read_text()
    again = [*TINY_OTHER, f"init={tmp_path}", size[0]]  # 4 x 6 patches with a class row: rows of 5 x 5
    assert run_here(tmp_path / "e", *again, "task=evaluate") == 0
    assert summary(tmp_path / "e")["top1"] == summary(tmp_path)["top1"]
    target = tmp_path / "model.safetensors"
    assert run_here(tmp_path / "x", *again, "task=export", "task.format=safetensors", f"task.path={target}") == 0
    assert torch.equal(safetensors.torch.load_file(target)["pos_embed"], weights(tmp_path)["pos_embed"])


# ---------------------------------------------------------------- probing and k-NN


def test_a_run_that_goes_on_needs_its_init_no_more(pretrained, tmp_path):
    state = {name: tensor for name, tensor in weights(pretrained).items() if not name.startswith(("decoder", "mask"))}
    state["pos_embed"] = state["pos_embed"][:, 1:]
    del state["cls_token"]  # so that a probe does without one, too
    for name in ("probe.pth", "blocks.pth"):
        torch.save({"model": state if name == "probe.pth" else weights(pretrained)}, tmp_path / name)
    probe = [*TINY_LINPROBE, "task.global_pool=avg", f"init={tmp_path / 'probe.pth'}"]
    tuned = [*TINY_FINETUNE, "task.finetune_blocks=1", f"init={tmp_path / 'blocks.pth'}"]
    for name, command in (("probe", probe), ("tuned", tuned)):
        often = [*command, "checkpoint.every_epochs=0.1", "checkpoint.keep=9"]
        assert run_here(tmp_path / name, *often) == 0
        shutil.copytree(tmp_path / name, tmp_path / f"{name}_cut", symlinks=True)
    for path in tmp_path.glob("*.pth"):
        path.unlink()
    for name, command in (("probe", probe), ("tuned", tuned)):
        run = tmp_path / f"{name}_cut"
        for left in (run / "summary.json", *(run / "checkpoints").glob("step_*[3-9]")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        assert run_here(run, *command) == 0 and "goes on from" in (run / "log.txt").read_text()
        assert all(torch.equal(tensor, weights(tmp_path / name)[key]) for key, tensor in weights(run).items())
    assert "cls_token" not in weights(tmp_path / "probe") and weights(tmp_path / "probe")["pos_embed"].shape[1] == 16


def test_linear_probing_changes_the_head_and_its_statistics_and_no_bit_else(pretrained, tmp_path):
    assert run_here(tmp_path, *TINY_LINPROBE, f"init={pretrained}") == 0
    before, after = weights(pretrained), weights(tmp_path)
    for name, tensor in after.items():
        if not name.startswith("head."):
            assert torch.equal(tensor, before[name]), name
    assert int(after["head.0.num_batches_tracked"]) == 3
    assert not torch.equal(after["head.0.running_mean"], torch.zeros(32))
    assert not torch.equal(after["head.0.running_var"], torch.ones(32))
    assert float(after["head.1.bias"].abs().max()) > 0
    assert {"top1", "top5", "loss"} <= summary(tmp_path).keys()

    target, again = tmp_path / "probe.pth", [*TINY_OTHER, f"init={tmp_path}"]
    assert run_here(tmp_path / "e", *again, "task=export", "task.format=reference", f"task.path={target}") == 0
    exported = torch.load(target, weights_only=True)["model"]
    assert exported.keys() == after.keys() and all(torch.equal(exported[name], after[name]) for name in after)
    assert run_here(tmp_path / "v", *again, "task=evaluate") == 0
    assert summary(tmp_path / "v")["top1"] == summary(tmp_path)["top1"]


def test_heads_on_cached_features_learn_at_several_rates_and_the_best_is_kept(pretrained, tmp_path):
    command = [*TINY_LINPROBE, f"init={pretrained}", "task.cached_features=true", "task.learning_rates=[0.001,30]"]
    assert run_here(tmp_path / "two", *command, "task.max_steps=30", "task.epochs=10") == 0
    two = summary(tmp_path / "two")
    assert two["top1"] == max(two["top1_by_lr"].values()) and set(two["top1_by_lr"]) == {"0.001", "30"}
    assert {"head.0.running_mean", "head.1.weight"} <= weights(tmp_path / "two").keys()
    alone = [*command[:-1], f"task.learning_rates=[{two['best_lr']:g}]", "task.max_steps=30", "task.epochs=10"]
    assert run_here(tmp_path / "one", *alone) == 0
    assert summary(tmp_path / "one")["top1"] == two["top1"]  # heads do not disturb each other
    assert run_here(tmp_path / "again", *TINY_OTHER, "task=evaluate", f"init={tmp_path / 'two'}") == 0
    assert summary(tmp_path / "again")["top1"] == two["top1"]


def test_cached_features_diverge_honour_the_clipping_and_the_last_batch(pretrained, tmp_path):
    command = [*TINY_LINPROBE, f"init={pretrained}", "task.cached_features=true", "task.warmup_epochs=0"]
    assert run_here(tmp_path / "diverged", *command, "task.learning_rates=[1e30]") == 3
    text = (tmp_path / "diverged" / "log.txt").read_text()
    assert "with base learning rate 1e+30 the probe diverged" in text and "val/loss is nan after the last" in text
    assert not (tmp_path / "diverged" / "summary.json").exists()

    heads = {}
    for name, more in {"free": [], "clipped": ["task.clip_grad=1e-4"]}.items():
        assert run_here(tmp_path / name, *command, "optimizer=sgd", "optimizer.base_lr=1", *more) == 0
        heads[name] = weights(tmp_path / name)["head.1.weight"]
    start = probe_head(heads["free"].shape[1], 10).get_parameter("1.weight").std().item()  # of the initial weights
    assert heads["clipped"].std().item() < 2 * start and (heads["free"] - heads["clipped"]).abs().max() > 0.01

    batches = [*command, "task.batch_size=100", "task.epochs=2", "task.max_steps=null"]  # 144 images
    assert run_here(tmp_path / "all", *batches, "task.drop_last=false") == 0 and summary(tmp_path / "all")["steps"] == 4
    assert run_here(tmp_path / "whole", *batches) == 0 and summary(tmp_path / "whole")["steps"] == 2
    single = [*command, "task.batch_size=143", "task.drop_last=false"]
    assert "task=linprobe normalises over a batch" in said(*single, directory=tmp_path / "single")
    misspelt = [*command, "optimizer.no_decay=[head.1.wieght]"]
    assert "Did you mean head.1.weight?" in said(*misspelt, directory=tmp_path / "misspelt")


def test_rates_of_one_pass_have_one_schedule_each(pretrained, tmp_path):
    command = [*TINY_LINPROBE, f"init={pretrained}", "task.cached_features=true", "task.max_steps=6", "task.epochs=2"]
    command += ["optimizer.min_lr=0.01"]
    assert run_here(tmp_path / "listed", *command, "task.learning_rates=[3.0]") == 0
    assert run_here(tmp_path / "base", *command, "optimizer.base_lr=3.0") == 0
    listed, base = (weights(tmp_path / name)["head.1.weight"] for name in ("listed", "base"))
    assert torch.equal(listed, base)


def test_neighbours_vote_as_written_down_by_hand(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 8, generator=generator), torch.randn(7, 8, generator=generator)
    labels = torch.randint(0, 4, (50,), generator=generator)

    monkeypatch.setattr(sys.modules[Neighbours.__module__], "CHUNK", 16)  # several chunks
    found = Neighbours(Features(torch.arange(50), labels, bank), 4, [1, 5, 20], 0.07, torch.device("cpu")).predict(
        queries
    )
    unit = torch.nn.functional.normalize(bank, dim=1)
    for row, query in enumerate(torch.nn.functional.normalize(queries, dim=1)):
        near = unit @ query
        for column, k in enumerate((1, 5, 20)):
            votes = torch.zeros(4)
            for i in near.argsort(descending=True)[:k]:
                votes[labels[i]] += torch.exp(near[i] / 0.07)
            assert found[row, column] == votes.argmax()


@pytest.mark.parametrize("temperature", [0.07, 0.001])
def test_neighbours_vote_alike_in_half_the_digits_at_any_temperature(temperature):
    chance = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(200, 8, generator=chance).double(), torch.randn(100, 8, generator=chance).double()
    labels = torch.arange(200) % 4

    def predicted(dtype: torch.dtype) -> torch.Tensor:
        stored = Features(torch.arange(200), labels, bank.to(dtype))
        return Neighbours(stored, 4, [10], temperature, torch.device("cpu")).predict(queries.to(dtype))

    assert torch.equal(predicted(torch.float32), predicted(torch.float64))
    assert len(predicted(torch.float64).unique()) == 4


@pytest.mark.parametrize(
    "task",
    [
        ["task=knn", "task.k=[1]"],
        ["task=linprobe", "task.cached_features=true", "task.epochs=1", "task.warmup_epochs=0", "task.batch_size=32"],
        ["task=visualize", "task.num_images=2"],
        ["task=inspect", "task.batches=1", "task.batch_size=4", "task.max_workers=1", "target=pca"],
    ],
    ids=lambda task: task[0],
)
def test_float64_is_what_the_network_computes_in_where_it_is_asked_for(pretrained, tmp_path, task, monkeypatch):
    formats, forward = set(), Block.forward

    def noted(self: Block, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        formats.add(x.dtype)
        return forward(self, x, *arguments, **named)

    monkeypatch.setattr(Block, "forward", noted)
    init = [] if "inspect" in task[0] else [f"init={pretrained}"]
    assert run_here(tmp_path, *TINY_OTHER, *task, *init, "task.precision=fp64") == 0
    assert formats == {torch.float64}


def test_knn_gives_an_accuracy_for_each_k(pretrained, tmp_path):
    assert run_here(tmp_path, *TINY_OTHER, "task=knn", "task.k=[1,20]", f"init={pretrained}") == 0
    assert set(summary(tmp_path)["knn"]) == {"1", "20"}
    assert all(10 < value <= 100 for value in summary(tmp_path)["knn"].values())


def test_more_neighbours_than_images_are_refused_before_anything_is_computed(pretrained, tmp_path):
    message = said(*TINY_OTHER, "task=knn", f"init={pretrained}", "task.k=[5,2000]", directory=tmp_path / "a")
    assert message == "task.k=2000 asks for that many neighbours, and there are 144 training images."
    given = [*TINY_PRETRAIN, "task.knn_every_epochs=1", "task.knn_images=10", "task.knn_k=11"]
    message = said(*given, directory=tmp_path / "b")
    assert message == "task.knn_k=11 asks for that many neighbours, and there are 10 training images."


def test_cached_features_of_fewer_images_than_a_batch(pretrained, tmp_path):
    given = [*TINY_LINPROBE, f"init={pretrained}", "task.cached_features=true", "task.batch_size=4096"]
    message = said(*given, directory=tmp_path)
    assert message.startswith("task.batch_size=4096 is larger than the training set (144 images) and task.drop_last")


def test_pretraining_measures_knn_every_so_many_epochs(pretrained):
    measured = [line["step"] for line in lines(pretrained) if "val/knn_20" in line]
    assert measured == [3]  # of 5 steps an epoch; the last validation, at step 4, is not another half epoch away


def test_features_are_measured_where_the_size_of_a_micro_batch_is_tried(pretrained, tmp_path):
    automatic = ["task.micro_batch_size=auto", "task.max_steps=2"]
    assert run_here(tmp_path / "pretrain", *TINY_PRETRAIN, *automatic, "task.knn_every_epochs=0.2") == 0
    assert any("val/knn_20" in line for line in lines(tmp_path / "pretrain"))
    cached = [*TINY_LINPROBE, f"init={pretrained}", "task.cached_features=true", "task.micro_batch_size=auto"]
    assert run_here(tmp_path / "cached", *cached) == 0


def test_a_skipped_step_leaves_the_running_statistics_of_a_probe(pretrained, tmp_path, monkeypatch):
    features, calls = Linprobe.features, itertools.count()

    def overflowing(self, batch):
        inf_once = torch.where(torch.tensor(next(calls) == 1), float("inf"), 1.0)
        return features(self, batch) * inf_once

    monkeypatch.setattr(Linprobe, "features", overflowing)
    assert run_here(tmp_path, *TINY_LINPROBE, f"init={pretrained}", "task.log_every_steps=1") == 0
    head = weights(tmp_path)
    assert head["head.0.running_mean"].isfinite().all() and head["head.0.running_var"].isfinite().all()
    assert head["head.0.num_batches_tracked"] == 2  # of 3 steps
    assert "skipped 1 steps" in (tmp_path / "events.jsonl").read_text()


def test_pretraining_takes_its_validation_loss_at_further_ratios(pretrained):
    measured = [line for line in lines(pretrained) if "val/loss" in line]
    assert len(measured) == 2
    for line in measured:
        assert line["val/loss_at_0.75"] == line["val/loss"] != line["val/loss_at_0.5"]


# ---------------------------------------------------------------- pictures, export, pipeline


def test_pictures_of_a_set_and_of_given_files_in_one_page(pretrained, tmp_path):
    base = [*TINY, "task=visualize", f"init={pretrained}", "task.mask_ratios=[0.75]"]
    assert run_here(tmp_path / "set", *base, "task.num_images=2") == 0
    names = ["attention.png", *(f"reconstruction_{kind}_75.png" for kind in ("block", "grid", "random"))]
    assert sorted(p.name for p in (tmp_path / "set" / "images").iterdir()) == names
    page = (tmp_path / "set" / "visualize.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and not re.search(r"(src|href)=.(?!data:)", page)

    pattern = folder_of(tmp_path / "given", {"cats": 2}) / "cats" / "*.png"
    named = [f'task.files=["{pattern}"]', "task.masks=[block]", "task.attention=false"]
    assert run_here(tmp_path / "file", *base, *named) == 0
    assert "000.png" in (tmp_path / "file" / "visualize.html").read_text()
    assert summary(tmp_path / "set")["images_seen"] == summary(tmp_path / "file")["images_seen"] == 2
    close = ["task.mask_ratios=[0.52,0.53,0.525]", "task.masks=[grid]", "task.attention=false"]  # of 16 patches
    assert run_here(tmp_path / "close", *base, *close, "task.num_images=2") == 0
    names = [f"reconstruction_grid_{percent}.png" for percent in ("52.5", "52", "53")]
    assert sorted(p.name for p in (tmp_path / "close" / "images").iterdir()) == names
    message = said(*base, "task.files=[/nowhere.png]", directory=tmp_path / "none")
    assert message == "task.files names /nowhere.png, which does not exist."


def test_a_classifier_shows_its_attention_but_reconstructs_nothing(finetuned, tmp_path):
    base = [*TINY, "task=visualize", f"init={finetuned}", "task.num_images=1"]
    assert run_here(tmp_path / "a", *base, "task.reconstruction=false") == 0
    assert (tmp_path / "a" / "images" / "attention.png").is_file()
    message = said(*base, directory=tmp_path / "b")
    assert "holds no decoder" in message and "mae_pretrain_vit_*_full.pth" in message
    assert message.endswith("The attention alone needs none (task.reconstruction=false).")


def test_attention_of_the_class_token_is_what_the_block_computes():
    from mae.tasks.visualize import class_attention

    model, images = tiny_classifier(), torch.randn(2, 3, 16, 16)
    maps = class_attention(model, images)
    assert maps.shape == (2, 2, 16)
    inputs = []
    block = of_type(Block, model.blocks[-1])
    hook = block.register_forward_pre_hook(lambda module, given: inputs.append(block.norm1(given[0])))
    model.forward_features(images)
    hook.remove()
    for b in range(2):  # as written down: softmax(q k / sqrt(d)) of the first token, head by head
        q, k, _ = (block.attn.qkv.weight @ inputs[0][b].T + block.attn.qkv.bias[:, None]).chunk(3)
        for head in range(2):
            rows = slice(16 * head, 16 * head + 16)
            expected = torch.softmax(q[rows, 0] @ k[rows] / 4.0, 0)
            torch.testing.assert_close(maps[b, head], expected[1:])


def test_attention_of_a_file_without_a_class_token_is_refused(pretrained, tmp_path):
    state = {k: v for k, v in weights(pretrained).items() if k != "cls_token"}
    torch.save({"model": state | {"pos_embed": state["pos_embed"][:, 1:]}}, tmp_path / "m.pth")
    base = [*TINY, "task=visualize", f"init={tmp_path / 'm.pth'}", "task.num_images=1", "task.reconstruction=false"]
    message = said(*base, directory=tmp_path / "run")
    assert message.endswith("has no class token whose attention could be drawn: set task.attention=false.")


def test_a_file_that_does_not_say_what_it_predicts_must_be_told(pretrained, tmp_path):
    file = tmp_path / "model.pth"
    torch.save({"model": weights(pretrained)}, file)
    base = [*TINY, "task=visualize", f"init={file}", "task.num_images=1", "task.masks=[random]"]
    assert "set task.norm_pix_loss=true or false" in said(*base, directory=tmp_path / "a")
    assert run_here(tmp_path / "b", *base, "task.norm_pix_loss=true", "task.attention=false") == 0


def test_the_export_task_writes_what_timm_loads(finetuned, tmp_path):
    import timm

    target = tmp_path / "exported"
    command = [*TINY_OTHER, "task=export", f"init={finetuned}", "task.format=timm", f"task.path={target}"]
    assert run_here(tmp_path / "run", *command) == 0
    assert {Path(file).name for file in summary(tmp_path / "run")["files"]} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    model = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
    ours = tiny_classifier()
    ours.load_state_dict(weights(finetuned))
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(model(images), ours.eval()(images), atol=1e-6)
    assert json.loads((target / "config.json").read_text())["label_names"] == [str(digit) for digit in range(10)]


def exported(directory: Path, init: Path, format: str, *more: str) -> Path:
    """Where the export task wrote a checkpoint."""
    target = directory / format
    assert run_here(directory / "run", *TINY_OTHER, "task=export", f"init={init}", f"task.format={format}",
                    f"task.path={target}", *more) == 0  # fmt: skip
    return target


def test_an_export_needs_no_images_and_holds_what_the_checkpoint_does(pretrained, tmp_path):
    target = exported(tmp_path / "a", pretrained, "huggingface", "data=imagenet", "data.img_size=16")
    assert json.loads((target / "config.json").read_text())["norm_pix_loss"] is True
    again = exported(tmp_path / "b", target, "huggingface")  # a pretrained file now
    assert json.loads((again / "config.json").read_text()) == json.loads((target / "config.json").read_text())
    text = json.loads((target / "config.json").read_text()) | {"norm_pix_loss": False, "mask_ratio": 0.9}
    (target / "config.json").write_text(json.dumps(text))
    again = exported(tmp_path / "c", target, "huggingface")
    assert json.loads((again / "config.json").read_text())["norm_pix_loss"] is False
    assert json.loads((again / "config.json").read_text())["mask_ratio"] == 0.9
    assert len(json.loads((again / "preprocessor_config.json").read_text())["image_mean"]) == 3
    timm_config = json.loads((exported(tmp_path / "d", pretrained, "timm") / "config.json").read_text())
    assert timm_config["pretrained_cfg"]["crop_pct"] == 1.0  # conf/data/digits.yaml


def test_an_export_makes_nothing_up(pretrained, tmp_path):
    state = weights(pretrained)
    encoder = {k: v for k, v in state.items() if not k.startswith(("decoder_", "mask_token"))}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    base = [*TINY_OTHER, "task=export", f"init={tmp_path / 'encoder.pth'}"]
    message = said(*base, "task.format=huggingface", directory=tmp_path / "a")
    assert "holds no decoder, which Hugging Face's ViTMAE has: choose task.format=timm" in message
    target = exported(tmp_path / "b", tmp_path / "encoder.pth", "reference")
    found = torch.load(target / "model.pth", weights_only=True)["model"]
    assert found.keys() == encoder.keys() and all(torch.equal(found[name], encoder[name]) for name in found)
    other = exported(tmp_path / "c", pretrained, "safetensors", "model.decoder_depth=2")
    assert safetensors.torch.load_file(other / "model.safetensors").keys() == encoder.keys()
    message = said(*base, "data.img_size=32", directory=tmp_path / "d")
    assert "is for 4 x 4 patches, and the model for 8 x 8 (model.img_size=32): choose the data that it was" in message
    assert message.endswith("(data=NAME brings size, mean and std), and model.img_size=16 where it is not theirs.")
    bare = {k: v for k, v in encoder.items() if k != "cls_token"} | {"pos_embed": encoder["pos_embed"][:, 1:]}
    torch.save({"model": bare}, tmp_path / "encoder.pth")
    message = said(*base, directory=tmp_path / "e")
    assert "lacks cls_token, which the exported network would have: fine-tune it first" in message
    torch.save({"model": state}, tmp_path / "encoder.pth")
    assert "set task.norm_pix_loss=true" in said(*base, "task.format=huggingface", directory=tmp_path / "f")


def test_a_pipeline_does_its_stages_once_each_from_what_came_before(tmp_path):
    own = {
        "pretrain": ["task.epochs=1", "task.warmup_epochs=0", "task.batch_size=32", "task.max_steps=1"],
        "linprobe": ["task.batch_size=32", "task.max_steps=1"],
        "finetune": ["task.batch_size=32", "task.max_steps=1"],
    }
    command = [*TINY_OTHER, "task=pipeline", "task.stages=[pretrain,linprobe,finetune,evaluate]"]
    command += [f"task.overrides.{name}={json.dumps(given)}" for name, given in own.items()]
    assert run_here(tmp_path, *command) == 0
    results = summary(tmp_path)
    assert list(results["stages"]) == ["pretrain", "linprobe", "finetune", "evaluate"]
    assert results["top1"] == results["stages"]["evaluate"]["top1"] == results["stages"]["finetune"]["top1"]
    for name in results["stages"]:  # the command on a stage's page makes that stage
        assert identity(composed(*stored_overrides(tmp_path / name))) == identity(read_config(tmp_path / name))
    assert {"val_loss", "top5", "steps", "seconds"} <= results.keys()
    assert composed(*command).model == composed("data=digits", *TINY_OTHER).model

    before = {name: (tmp_path / name / "metrics.jsonl").stat().st_mtime_ns for name in results["stages"]}
    for left in (tmp_path / "summary.json", tmp_path / "evaluate" / "summary.json"):
        left.unlink()
    assert run_here(tmp_path, *command) == 0
    after = {name: (tmp_path / name / "metrics.jsonl").stat().st_mtime_ns for name in results["stages"]}
    assert [name for name in before if before[name] != after[name]] == ["evaluate"]
    assert summary(tmp_path)["top1"] == results["top1"]


def test_another_image_size_of_a_stage_reaches_its_model(tmp_path):
    cfg = composed("task=pipeline", "task.stages=[pretrain,finetune]")
    for given, size in ((["data.img_size=16"], 16), (["data.img_size=16", "model.img_size=24"], 24), ([], 32)):
        assert stage_config(tmp_path, cfg, "finetune", ["pretrain", "finetune"], given).model.img_size == size


@pytest.mark.parametrize(("given", "message"), [
    (["task.stages=[knn]"], "stage knn has nothing to start from: let a stage pretrain come before, or give init=."),
    (["task.stages=[pretrain,pretrain]"], "task.stages must name each stage once"),
    (['task.overrides.knn=["task.k=[3]"]'], "task.overrides names knn, which is not among task.stages"),
    (['task.overrides.pretrain=["init=x"]'], "task.overrides.pretrain: init is the pipeline's to set."),
    (['task.overrides.finetune=["data=cifar10"]'], "task.overrides.finetune: data is the pipeline's to set."),
    (['task.overrides.finetune=["model=vit_large"]'], "task.overrides.finetune: model is the pipeline's to set."),
    (["task.overrides.pretrain=5"], 'task.overrides.pretrain must be a list of overrides as ["task.epochs=5"], got 5.'),
    (["task.overrides.finetune=[1]"], 'task.overrides.finetune must be a list of overrides as ["task.epochs=5"], got'),
    (["task.stages=[pretrain,evaluate]"], "stage evaluate needs a classifier: let a stage finetune or linprobe come"),
    (['task.overrides.finetune=["task.mixup=-1"]'], "stage finetune: task.mixup must be 0 or more, got -1.0."),
])  # fmt: skip
def test_a_pipeline_that_cannot_run_is_refused_before_its_first_stage(tmp_path, given, message):
    assert message in said(*TINY_OTHER, "task=pipeline", *given, directory=tmp_path / "run")
    assert not (tmp_path / "run" / "pretrain").exists()


# ---------------------------------------------------------------- what users get wrong


@pytest.mark.parametrize(("values", "message"), [
    (["task.batch_size=30", "task.micro_batch_size=5"], "mix images in pairs, and a device holds 5 at a time"),
    (["model.img_size=8"], "images of model.img_size=8 are too small for that (below 16 pixels): set task.cutmix=0."),
    (["task.mixup_prob=2"], "task.mixup_prob must lie in [0, 1], got 2.0."),
    (["task.ema_decay=1"], "task.ema_decay must lie in (0, 1), got 1.0."),
])  # fmt: skip
def test_mixing_that_cannot_work_is_refused_before_anything_is_built(values, message):
    with pytest.raises(UserError) as caught:
        composed("task=finetune", "task.batch_size=32", "task.mixup=0.8", "task.cutmix=1.0", *values)
    assert message in str(caught.value)


def test_even_batches_and_images_of_sixteen_pixels_may_be_mixed():
    cfg = composed("task=finetune", "task.mixup=0.8", "task.cutmix=1.0", "model.img_size=16")
    assert not list(rules.contradictions(cfg))


def odd(tmp_path: Path) -> list[str]:
    """A command whose epoch of 17 images ends in a batch of 1."""
    root = tmp_path / "data" if (tmp_path / "data").exists() else folder_of(tmp_path / "data", {"cat": 10, "dog": 9})
    command = [*TINY_FINETUNE, "data=folder", f"data.root={root}", "data.fraction=1", "data.min_crop=0.9"]
    return [*command, "task.batch_size=16", "task.drop_last=false"]


def test_an_odd_last_batch_is_named_before_the_first_step(tmp_path):
    sentence = (
        "task.mixup and task.cutmix mix images in pairs, and a batch of 1 comes in each epoch (17 images in steps "
    )
    sentence += (
        "of 16 on 1 device): choose task.drop_last=true or another task.batch_size, or set task.mixup=0 task.cutmix=0"
    )
    command = [*odd(tmp_path), "task.mixup=0.8", "task.max_steps=2"]
    assert sentence in said(*command, directory=tmp_path / "run")
    assert not files.read_json_lines(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(ValueError, match="a batch of 1 comes in each epoch"):
        dry_run.report(composed(*command, f"output_dir={tmp_path / 'other'}"))
    assert run_here(tmp_path / "short", *odd(tmp_path), "task.mixup=0.8", "task.max_steps=1") == 0  # it never comes


def test_a_probe_s_last_batch_of_one_image_is_named_before_the_first_step(pretrained, tmp_path):
    root = folder_of(tmp_path / "data", {"cat": 10, "dog": 9})
    command = [
        *TINY_OTHER,
        "task=linprobe",
        f"init={pretrained}",
        "data=folder",
        f"data.root={root}",
        "data.fraction=1",
    ]
    command += ["task.batch_size=8", "task.drop_last=false", "task.cached_features=false"]
    message = said(*command, directory=tmp_path / "run")
    assert "one of a single image comes in each epoch (17 images in steps of 8 on 1 device)" in message


def test_where_nothing_is_ever_mixed_odd_batches_train_as_without_mixing(tmp_path):
    seen = {}
    for name, more in {"never": ["task.mixup=0.8", "task.mixup_prob=0"], "none": ["task.mixup=0"]}.items():
        assert run_here(tmp_path / name, *odd(tmp_path), "task.batch_size=7", "task.max_steps=4", *more) == 0
        seen[name] = [row["loss"] for row in files.read_json_lines(tmp_path / name / "metrics.jsonl") if "loss" in row]
    assert seen["never"] == pytest.approx(seen["none"], rel=1e-5) and len(seen["none"]) >= 1


@pytest.mark.parametrize(
    ("images", "devices", "batch", "micro", "repeats"),
    [(19, 1, 16, 16, 1), (21, 2, 16, 4, 1), (37, 4, 32, 8, 1), (33, 4, 32, 8, 1), (101, 2, 32, 8, 2), (9, 2, 16, 8, 1)],
)
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_sizes_of_batches_are_those_that_the_sampler_makes(images, devices, batch, micro, repeats, drop_last):
    if drop_last and batch > images:
        return
    samplers = [Sampler(images, Batches(batch, micro, 0, r, devices, drop_last, repeats)) for r in range(devices)]
    steps = samplers[0].steps_per_epoch
    for max_steps in (1, None):
        made = make_plan(images, steps, devices, epochs=3, max_steps=max_steps, batch_size=batch,
                         micro_batch_size=micro, drop_last=drop_last)  # fmt: skip
        tickets = [t for s in samplers for step in range(max_steps or steps) for t in s.micro_batches(0, step)]
        assert made.held(repeats) == {len(ticket.indices) * repeats for ticket in tickets}


@pytest.mark.parametrize(("classes", "given", "message"), [
    ({"cat": 9, "dog": 9}, ["data.num_classes=3"], "data.num_classes=3, but data.name=folder holds 2 classes"),
    ({"cat": 9, "dog": 0}, [], "the class dog has no image among the"),
    ({".": 9}, [], "task=finetune needs labels, and the training images of data.name=folder have none"),
])  # fmt: skip
def test_labels_that_will_not_do_are_named(tmp_path, classes, given, message):
    root = tmp_path / "data"
    if "." in classes:
        folder_of(root, {"all": classes["."]})
    else:
        folder_of(root, classes)
    command = [*TINY_FINETUNE, "data=folder", f"data.root={root}", "data.fraction=1", *given]
    assert message in said(*command, directory=tmp_path / "run")


def test_a_few_label_subset_that_loses_a_class_is_named(tmp_path):
    message = said(*TINY_FINETUNE, "data.fraction=0.003", "task.batch_size=2", directory=tmp_path)
    assert "has no image among the 4 training images that data.fraction and data.per_class leave" in message


def shards_of(root: Path, classes: list[str]) -> None:
    """Two grey images of each class, 10 times as bright as the number of its first letter in the alphabet."""
    labels = np.repeat(np.arange(len(classes)), 2)
    bright = [10 * (ord(classes[label][0]) - ord("a")) for label in labels]
    pixels = torch.tensor(bright, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)
    pack.pack(Arrays(pixels, labels, classes, "made"), root, pack.Form(size=None, quality=90), per_shard=3, workers=1)


@pytest.mark.parametrize("classes", [["ant", "cow"], ["cow", "bee", "ant"], ["ant", "bee", "cow"]])
def test_validation_images_that_number_their_classes_otherwise_are_matched_by_name(tmp_path, classes):
    shards_of(tmp_path / "train", ["ant", "bee", "cow"])
    shards_of(tmp_path / "val", classes)
    cfg = composed("task=knn", "data=shards", f"data.root={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}")
    train_set, val_set = both_sets(cfg)
    check_classes(cfg, train_set, val_set)
    assert val_set.classes == train_set.classes and len(val_set) == 2 * len(classes)
    for source in (train_set, val_set):
        labels = labels_of(source).tolist()
        assert [source[k][1] for k in range(len(source))] == labels
        assert [round(float(source[k][0].float().mean()) / 10) for k in range(len(source))] == labels
        box = source.region(0, lambda height, width: (0, 0, 8, 8))
        assert box[1] == labels[0] and box[0].shape == (3, 8, 8)


def test_validation_images_of_classes_that_none_is_learned_of_are_named(tmp_path):
    shards_of(tmp_path / "train", ["ant", "bee"])
    shards_of(tmp_path / "val", ["ant", "elk"])
    command = [*TINY_FINETUNE, "data=shards", f"data.root={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}"]
    message = said(*command, "data.fraction=1", "task.batch_size=2", directory=tmp_path / "run")
    assert "are of classes that no training image is of: elk (1 of 2). Their names must be the same." in message


@pytest.mark.parametrize("task", ["linprobe", "knn", "evaluate", "visualize", "export"])
def test_init_is_asked_for_where_a_task_needs_it(tmp_path, task):
    base = TINY if task in ("linprobe", "visualize") else TINY_OTHER
    more = ["task.batch_size=32"] if task == "linprobe" else []
    message = said(*base, f"task={task}", *more, directory=tmp_path)
    assert message.startswith(f"task={task} needs init=: name a run's directory")


def test_a_checkpoint_of_another_size_truncated_or_with_code_is_refused(pretrained, tmp_path):
    big = said(*TINY_FINETUNE, f"init={pretrained}", "model.embed_dim=64", directory=tmp_path / "a")
    assert "with embed_dim 32, but the model has embed_dim 64. Set model.embed_dim=32" in big

    newest = checkpoints.newest_valid(pretrained)
    assert newest is not None
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((newest / "model.safetensors").read_bytes()[:-100])
    assert "is truncated" in said(*TINY_FINETUNE, f"init={cut}", directory=tmp_path / "b")

    torch.save({"model": {"w": torch.zeros(1)}, "hook": logging.Handler}, tmp_path / "code.pth")
    assert "it carries code" in said(*TINY_FINETUNE, f"init={tmp_path / 'code.pth'}", directory=tmp_path / "c")


def test_partial_fine_tuning_without_a_start_or_of_odd_fractions_is_refused(pretrained, tmp_path):
    assert "set init, or task.finetune_blocks=null" in said(
        *TINY_FINETUNE, "task.finetune_blocks=1", directory=tmp_path / "a"
    )
    message = said(*TINY_FINETUNE, f"init={pretrained}", "task.finetune_blocks=0.3", directory=tmp_path / "b")
    assert message == "task.finetune_blocks must be a multiple of 0.5 and at most model.depth=2, got 0.3."
