"""Sharded weights from the start on: the bits of whole ones, and no device that ever holds them whole."""

import dataclasses
import functools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, TINY_PRETRAIN, composed, run_here
from test_distributed import on_ranks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mae import checkpoint, training
from mae.config.build import call
from mae.distributed import fsdp
from mae.distributed.ranks import start
from mae.models.layers import blocks_of
from mae.models.vit import classifier
from mae.tasks.batches import both_sets
from mae.tracking.base import Tracker
from mae.weights.parts import drop_class_token

DEEP = [*TINY_PRETRAIN, "model.depth=12", "model.embed_dim=96", "model.num_heads=4"]  # a block is a small part of it


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations within allocate, as long as they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if type(leaf) is torch.Tensor and not leaf.is_meta:
                self.add(leaf.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or not size:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def held(rank: int, folder: Path) -> dict[str, int]:
    """Bytes that the start of a sharded run held at a time, and in the end, beside those of whole weights."""
    cfg = composed(*DEEP, "launcher.sharding=full")
    ranks = start("cpu", timeout_s=100, rendezvous_timeout_s=100, sharding="full")
    train_set, val_set = both_sets(cfg)
    torch.manual_seed(cfg.seed)
    with Alive() as alive:
        task = training.initial_task(cfg, ranks, train_set, val_set, None, torch.float32)
    sizes = {
        "whole": sum(4 * p.numel() for p in task.parameters()),
        "block": sum(4 * p.numel() for p in blocks_of(task)[0].parameters()),
        "most": alive.most,
        "now": alive.now,
    }
    ranks.close()
    return sizes


@pytest.mark.slow
def test_no_rank_but_the_first_ever_holds_the_whole_model(tmp_path):
    first, second = on_ranks(2, tmp_path, held)
    assert second["most"] < 0.5 * second["whole"] + 2 * second["block"] < 0.7 * second["whole"]
    assert first["most"] < first["whole"] + 2 * first["block"]  # its host's, which shards replace block by block
    for sizes in (first, second):
        assert sizes["now"] < 0.55 * sizes["whole"]


def starts(rank: int, folder: Path, cases: dict[str, list[str]]) -> dict[str, list[str]]:
    """Digests of the weights with which runs of whole and of sharded weights begin."""
    ranks = start("cpu", timeout_s=100, rendezvous_timeout_s=100, sharding="none")
    digests = {name: [begun(folder / name, ranks, sharding, over) for sharding in ("none", "full")]
               for name, over in cases.items()}  # fmt: skip
    ranks.close()
    return digests


def begun(folder: Path, ranks: Any, sharding: str, overrides: list[str]) -> str:
    """The digest of a run's weights at its start, and again from the checkpoint that it then saves."""
    cfg, run = composed(*overrides, f"launcher.sharding={sharding}"), folder / sharding
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    ranks = dataclasses.replace(ranks, sharding=sharding)
    digests = []
    for _ in range(2):
        t = call(training.set_up, cfg.task, run, cfg, ranks, Tracker())
        assert any(isinstance(p, DTensor) for p in t.task.parameters()) == (sharding == "full")
        states = fsdp.gathered([t.task.model.state_dict(), t.task.trained.state_dict(), t.optimizer.state_dict()])
        tensors = {str(i): leaf for i, leaf in enumerate(tree_leaves(states)) if isinstance(leaf, torch.Tensor)}
        digests.append(checkpoint.weights_digest(tensors))
        with torch.no_grad():  # as after a step
            for group in t.optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            t.optimizer.step()
        t.save()
        t.saver.wait()
        t.loader.close()
        ranks.barrier()
    return " ".join(digests)


@pytest.mark.slow
def test_sharded_weights_begin_and_go_on_with_the_bits_of_whole_ones(tmp_path):
    assert run_here(tmp_path / "init", *TINY_PRETRAIN, "task.max_steps=1", "seed=7") == 0
    init = f"init={tmp_path / 'init'}"
    cases = {
        "pretrain": TINY_PRETRAIN,
        "fitted": [*TINY_PRETRAIN, "target=pca", "target.components=5"],
        "teacher": [*TINY_PRETRAIN, "target=features", f"target.teacher={tmp_path / 'init'}"],
        "probed": [*TINY_PRETRAIN, "task.online_probe=true", "task.rankme=20", init],
        "average": [*TINY, "task=finetune", "task.ema_decay=0.9", "task.batch_size=32", "task.drop_path=0.1", init],
        "linprobe": [*TINY, "task=linprobe", "task.batch_size=32", init],
        "double": [*TINY_PRETRAIN, "task.precision=fp64"],
        "bare": [*TINY, "task=finetune", "task.batch_size=32", f"init={bare_file(tmp_path)}"],
    }
    first, second = on_ranks(2, tmp_path, functools.partial(starts, cases=cases))
    assert first == second
    for name, (whole, sharded) in first.items():
        assert whole == sharded, name
    assert len({whole for whole, _ in first.values()}) == len(cases)


def bare_file(folder: Path) -> Path:
    """Weights of a network without a class token."""
    cfg = composed(*TINY, "task=finetune")
    model = call(classifier, cfg.model, num_classes=10, drop_path=0.0, global_pool="avg")
    drop_class_token(model)
    torch.save(model.state_dict(), folder / "bare.pth")
    return folder / "bare.pth"
