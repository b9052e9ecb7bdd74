"""Compilation of blocks: how many graphs a run needs, and when. Dynamo's counters tell, whatever the backend."""

import functools
import json
from typing import Any

import pytest
import torch
from conftest import TINY_PRETRAIN, run_here

from mae.models.layers import Block
from mae.perf import compile as compilation
from mae.perf import micro_batch
from mae.runs.files import read_json_lines
from mae.tasks.pretrain import Pretrain

COMPILED = [*TINY_PRETRAIN, "task.compile=blocks", "task.warmup_epochs=0"]


@pytest.fixture
def graphs(monkeypatch):
    """Dynamo's counters, reset; blocks compile with a backend that runs what dynamo traced, in no time."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    traced = functools.partial(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(Block, "compile", lambda self, mode, **how: traced(self, **how))
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_auto_tries_sizes_before_it_compiles_and_compiles_the_one_it_finds(tmp_path, monkeypatch, graphs):
    forward, sizes = Pretrain.forward, []

    def limited(self, batch):
        sizes.append((len(batch["image"]), graphs()))
        if len(batch["image"]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch)

    monkeypatch.setattr(Pretrain, "forward", limited)
    auto = ["task.batch_size=720", "task.micro_batch_size=auto", "task.max_steps=1", "task.eval_every_epochs=100"]
    assert run_here(tmp_path, *COMPILED, *auto) == 0
    assert json.loads((tmp_path / micro_batch.MICRO_BATCH_FILE).read_text())["micro_batch_size"] == 6
    tried = [count for size, count in sizes if size > 6]
    assert len(tried) >= 15 and max(tried) == 0
    assert 0 < graphs() < 10
    assert "switched off" not in (tmp_path / "log.txt").read_text()


def test_a_run_compiles_nothing_after_its_trial(tmp_path, monkeypatch, graphs):
    after_trial: list[int] = []
    compiled = compilation.compile_at

    def noted(*args: Any) -> Any:
        size = compiled(*args)
        after_trial.append(graphs())
        return size

    monkeypatch.setattr(compilation, "compile_at", noted)
    odd = ["task.batch_size=48", "data.fraction=0.1", "task.epochs=2", "task.eval_every_epochs=1"]
    odd += ["task.eval_mask_ratios=[0.5]", "task.knn_every_epochs=1", "task.num_images=3"]  # 143 images: 48, 48, 47
    assert run_here(tmp_path, *COMPILED, *odd) == 0
    assert after_trial == [graphs()] and graphs() > 0
    text = (tmp_path / "log.txt").read_text()
    assert f"compiled {graphs()} graphs in " in text


def test_a_size_that_does_not_fit_once_compiled_gives_way_to_a_smaller_one(tmp_path, monkeypatch, graphs):
    forward = Pretrain.forward

    def limited(self, batch):
        if len(batch["image"]) > (8 if graphs() else 16):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        loss = forward(self, batch)
        if len(batch["image"]) > 8 and graphs():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(Pretrain, "forward", limited)
    assert run_here(tmp_path, *COMPILED, "task.micro_batch_size=auto", "task.max_steps=1") == 0
    assert json.loads((tmp_path / micro_batch.MICRO_BATCH_FILE).read_text())["micro_batch_size"] == 8
    derived = next(r for r in read_json_lines(tmp_path / "metrics.jsonl") if "derived/accumulation" in r)
    assert derived["derived/micro_batch_size"] == 8 and graphs() > 0


@pytest.mark.slow
def test_inductor_compiles_a_run_s_graphs_once(tmp_path):
    """As above, with inductor itself on the CPU."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    assert run_here(tmp_path, *COMPILED, "task.max_steps=3", "data.fraction=0.1") == 0
    text = (tmp_path / "log.txt").read_text()
    assert "switched off" not in text and f"compiled {counters['stats']['unique_graphs']} graphs in " in text
    torch._dynamo.reset()
