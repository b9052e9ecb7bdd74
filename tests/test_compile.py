"""Compilation: how many graphs a run needs, and when. Dynamo's counters tell, whatever the backend."""

import functools
import json
import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY, TINY_PRETRAIN, composed, of_type, run_here
from torch._inductor import compile_fx

from mae.config.build import build
from mae.data import SOURCES
from mae.distributed.ranks import Ranks
from mae.models.layers import transformer_block
from mae.models.mae import MaskedAutoencoder
from mae.perf import compile as compilation
from mae.perf import graphs as compile_graphs
from mae.perf import micro_batch
from mae.perf.compile import no_recompilation
from mae.perf.graphs import compile_whole, is_compiled, uncompile
from mae.perf.micro_batch import Trial
from mae.runs.files import read_json_lines
from mae.tasks.base import Autocast, build_task
from mae.tasks.pretrain import Pretrain

COMPILED = [*TINY_PRETRAIN, "task.compile=blocks", "task.warmup_epochs=0"]


@pytest.fixture
def graphs(monkeypatch):
    """Dynamo's counters, reset; what is compiled runs as dynamo traced it, in no time."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compile: Any = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, mode=None, **how: compile(call, **{"backend": "eager"} | how))
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


@pytest.mark.parametrize("level", ["blocks", "model"])
def test_a_run_compiles_nothing_after_its_trial(tmp_path, monkeypatch, graphs, level):
    after_trial: list[int] = []
    compiled = compilation.compile_at

    def noted(*args: Any) -> Any:
        size = compiled(*args)
        after_trial.append(graphs())
        return size

    monkeypatch.setattr(compilation, "compile_at", noted)
    odd = ["task.batch_size=48", "data.fraction=0.1", "task.epochs=2", "task.eval_every_epochs=1"]
    odd += ["task.eval_mask_ratios=[0.5]", "task.knn_every_epochs=1", "task.num_images=3"]  # 143 images: 48, 48, 47
    assert run_here(tmp_path, *COMPILED, *odd, f"task.compile={level}") == 0
    assert after_trial == [graphs()] and (graphs() == 2 if level == "model" else graphs() > 2)
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


@pytest.mark.parametrize(("task", "count"), [("finetune", 2), ("linprobe", 1)])
def test_a_whole_classifier_with_its_loss_is_one_graph_in_training_and_one_in_validation(task, count, graphs):
    cfg = composed(*TINY, f"task={task}", "task.batch_size=4", "augmentation=linprobe", "init=unused")
    task_module = build_task(cfg, build(SOURCES, cfg.data, "val"))
    trial = Trial(cfg, task_module, None, torch.device("cpu"), nullcontext, task_module.example_target)
    task_module.train()
    names, batch = list(task_module.state_dict()), trial.batch(4)
    torch.manual_seed(0)
    np.random.seed(0)
    expected = task_module(batch)["loss"]
    compile_whole(task_module, task_module.trained, task_module.compiled, None, cut=False)
    assert list(task_module.state_dict()) == names
    torch.manual_seed(0)
    np.random.seed(0)
    assert torch.equal(task_module(batch)["loss"], expected)
    trial.step(4)
    assert graphs() == count
    with no_recompilation(task_module.trained):
        trial.step(4)
        trial.step(2)
    assert graphs() == count
    uncompile(task_module, task_module.trained, task_module.compiled)
    assert not is_compiled(task_module.trained) and not {"objective", "encode"} & {*vars(task_module)}


def pretraining() -> tuple[Pretrain, torch.Tensor]:
    """The tiny autoencoder, and images for it."""
    cfg = composed(*TINY_PRETRAIN)
    return of_type(Pretrain, build_task(cfg, build(SOURCES, cfg.data, "val"))), torch.rand(4, 3, 16, 16)


def test_a_graph_is_cut_at_the_buckets_of_data_parallel_and_computes_the_same(monkeypatch, graphs):
    pieces: list[int] = []
    monkeypatch.setattr(compile_graphs, "DDP_BUCKET", 20_000)
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 10_000)
    monkeypatch.setattr(compile_fx, "compile_fx", lambda module, inputs, config_patches: pieces.append(1) or module)
    task, images = pretraining()
    noise = torch.rand(4, task.model.num_patches)
    task.model(images, 0.75, noise).loss.backward()
    expected = {name: p.grad for name, p in task.model.named_parameters()}
    task.zero_grad()
    compile_whole(task, task.model, (), None, cut=True)
    task.model(images, 0.75, noise).loss.backward()
    assert graphs() == 1 and len(pieces) >= 4
    for name, parameter in task.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_replay_does_not_overwrite_what_an_earlier_one_returned(monkeypatch, graphs):
    """CUDA graphs write each replay's outputs to the same memory, as this backend does."""
    begun: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    static: dict[int, torch.Tensor] = {}

    def replayed(module, _):
        def run(*inputs):
            outputs = module(*inputs)
            return tuple(static.setdefault(i, out.clone()).copy_(out) for i, out in enumerate(outputs))

        return run

    compile: Any = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, mode, **how: compile(call, **how | {"backend": replayed}))
    task, images = pretraining()
    compile_whole(task, task.model, (), "reduce-overhead", cut=False)
    noise = torch.rand(2, 4, task.model.num_patches)
    with torch.no_grad():
        first = task.model(images, 0.75, noise[0])
        loss = first.loss.clone()
        assert not torch.equal(task.model(images, 0.75, noise[1]).loss, loss)
    assert torch.equal(first.loss, loss) and len(begun) == 2


def test_a_model_that_does_not_compile_whole_gives_way_to_its_blocks(tmp_path, monkeypatch, graphs):
    forward = MaskedAutoencoder.forward

    def broken(self, *inputs):
        torch._dynamo.graph_break()
        return forward(self, *inputs)

    monkeypatch.setattr(MaskedAutoencoder, "forward", broken)
    assert run_here(tmp_path, *COMPILED, "task.compile=model", "task.max_steps=1") == 0
    text = (tmp_path / "log.txt").read_text()
    assert "task.compile=model gives way to blocks: compiling the whole model failed" in text
    assert "switched off" not in text and f"compiled {graphs()} graphs in " in text and graphs() > 2


def test_auto_compiles_the_whole_model_on_cuda_and_blocks_on_a_cpu_with_amx(monkeypatch):
    task, _ = pretraining()
    wide = transformer_block(384, 6, 4.0)
    half = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)

    def chosen(ranks: Ranks, autocast: Autocast = half, model: torch.nn.Module = wide) -> str | None:
        return compilation.automatic(
            ranks, Trial(task.cfg, task, None, ranks.device, autocast, task.example_target), model
        )

    assert chosen(Ranks(gpu), nullcontext) == "model" and chosen(Ranks(gpu, world=2), nullcontext) == "model"
    assert chosen(Ranks(gpu, world=2, sharding="full"), nullcontext) == "blocks"
    monkeypatch.setenv("CXX", sys.executable)
    for tiles, level in ((False, None), (True, "blocks")):
        monkeypatch.setattr(compilation, "TILES", tiles)
        assert chosen(Ranks(cpu)) == level
    assert chosen(Ranks(cpu), nullcontext) is chosen(Ranks(cpu), half, task.model) is None
    monkeypatch.setenv("CXX", "no_such_compiler")
    assert chosen(Ranks(cpu)) is None


@pytest.mark.parametrize("level", ["model", "graphs"])
def test_a_whole_graph_of_sharded_weights_is_refused(level):
    with pytest.raises(ValueError, match=f"task.compile={level} wants weights that stay where they are: use blocks"):
        composed(*TINY_PRETRAIN[:-1], "device=auto", f"task.compile={level}", "launcher.sharding=full")


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
