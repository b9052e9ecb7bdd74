"""A trained task of one's own: a file, its YAML and an entry of the registry; and what its loss may return."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, composed, copy_program, run_copy, run_here

from mae.config.build import build
from mae.data import SOURCES
from mae.data.subsets import reduced
from mae.runs.files import read_json_lines
from mae.tasks import registry
from mae.tasks.pretrain import Pretrain

TASK = '''"""Classification with a scaled softmax."""

from collections.abc import Mapping
from typing import Annotated

import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from mae.config.build import call
from mae.data.source import Source
from mae.models.vit import classifier
from mae.tasks.classify import Classify


class Scaled(Classify):
    """Learn the labels, with logits divided by a temperature."""

    def __init__(self, cfg: DictConfig, val_set: Source, *, temperature: Annotated[float, "(0, inf)"]):
        super().__init__(cfg, val_set)
        self.model = call(classifier, cfg.model, num_classes=len(self.classes), drop_path=0.0, global_pool="avg")
        self.temperature = temperature

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = self.model(self.images(batch)) / self.temperature
        return {"loss": F.cross_entropy(logits.float(), batch["label"]), "mean_label": batch["label"].float().mean()}
'''
YAML = """# @package _global_
defaults:
  - shared/training@task
  - _self_
  - override /augmentation: linprobe
task:
  name: scaled
  epochs: 5
  warmup_epochs: 0
  batch_size: 48
  drop_last: false
  eval_every_epochs: 1
  temperature: 2.0
"""
ENTRY = """    "scaled": TaskEntry(
        "tasks.scaled:Scaled",
        "scaled",
        "Trains on scaled labels.",
        trains=True,
        stage=True,
        needs_labels=True,
        classifier=True,
        metric=TOP1,
    ),
"""
OVERRIDES = [*TINY, "task.epochs=2"]


def mean_label() -> float:
    """Of the training images."""
    cfg = composed(*TINY)
    source = reduced(build(SOURCES, cfg.data, "train"), cfg.data.fraction, cfg.data.per_class, cfg.seed)
    assert source.labels is not None and len(source.labels) == 144
    return float(source.labels.mean())


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of this one with a new task in it."""
    copy = copy_program(tmp_path_factory.mktemp("repository"))
    (copy / "mae" / "tasks" / "scaled.py").write_text(TASK)
    (copy / "conf" / "task" / "scaled.yaml").write_text(YAML)
    entries = copy / "mae" / "tasks" / "registry.py"
    entries.write_text(entries.read_text().replace("\nTASKS = {\n", f"\nTASKS = {{\n{ENTRY}"))
    return copy


@pytest.mark.slow
def test_a_trained_task_is_a_file_its_yaml_and_an_entry_of_the_registry(repository):
    """It trains on two ranks, and its scalar is logged as the mean over the window and the ranks."""
    done = run_copy(
        repository, "task=scaled", *OVERRIDES, "task.log_every_steps=3", "launcher.processes=2", "output_dir=two"
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((repository / "two" / "summary.json").read_text())
    assert summary["task"] == "scaled" and {"top1", "top5", "loss", "best_top1"} <= summary.keys()
    assert done.stdout.splitlines()[-1].startswith("top1 ")
    rows = [row for row in read_json_lines(repository / "two" / "metrics.jsonl") if "mean_label" in row]
    assert [row["step"] for row in rows] == [3, 6]  # an epoch is three steps of 48 images
    assert [row["mean_label"] for row in rows] == pytest.approx([mean_label()] * 2)
    assert (repository / "two" / "checkpoints" / "best").exists() and (repository / "two" / "per_class.csv").exists()

    report = (repository / "two" / "report.html").read_text()
    assert "mean_label" in report and "top-1 %" in report
    planned = run_copy(repository, "task=scaled", *OVERRIDES, "dry_run=true")
    assert planned.returncode == 0 and "scaled vit_nano on digits" in planned.stdout
    refused = run_copy(repository, "task=scaled", *OVERRIDES, "task.temperature=0")
    assert refused.returncode == 1 and "task.temperature must be greater than 0, got 0.0." in refused.stderr


def with_scalar(batch_scalars: list[float]):
    """A pre-training loss that also returns the mean of each micro-batch's noise."""
    loss = Pretrain.loss

    def recorded(self, batch):
        value = batch["noise"].mean()
        if self.training and torch.is_grad_enabled():
            batch_scalars.append(float(value * batch["weight"]))
        return {**loss(self, batch), "noise_mean": value}

    return recorded


def test_scalars_are_means_over_the_log_window_and_the_loss_stays_as_it_was(tmp_path, monkeypatch):
    command = [*TINY, "task.batch_size=32", "task.epochs=2", "task.warmup_epochs=1", "task.micro_batch_size=16"]
    command += ["task.log_every_steps=4", "task.max_steps=8"]
    assert run_here(tmp_path / "plain", *command) == 0
    values: list[float] = []
    monkeypatch.setattr(Pretrain, "loss", with_scalar(values))
    assert run_here(tmp_path / "scalar", *command) == 0
    plain, scalar = (
        [row for row in read_json_lines(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("plain", "scalar")
    )
    assert [row["loss"] for row in plain] == [row["loss"] for row in scalar]
    assert [row["step"] for row in scalar] == [4, 8] and len(values) == 2 * 8 - 1  # the epoch's fifth step holds 16
    windows = values[:8], values[8:]
    assert [row["noise_mean"] for row in scalar] == pytest.approx([sum(window) / 4 for window in windows])


def test_every_task_of_the_registry_has_its_yaml_and_can_be_imported():
    names = {path.stem for path in (ROOT / "conf" / "task").glob("*.yaml")}
    assert names == set(registry.TASKS)
    for name, entry in registry.TASKS.items():
        assert callable(registry.load_task(name)), entry.path
