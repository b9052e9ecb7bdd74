"""Signals of a pre-training run: the rank of its features, and a linear probe that learns beside the encoder."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_PRETRAIN, composed, run_here
from test_distributed import on_ranks, trained
from test_step import trial_of

from mae import checkpoint
from mae.config.build import build
from mae.data import SOURCES
from mae.distributed.ranks import Ranks
from mae.models.masking import order_by_noise
from mae.runs import checkpoints, files
from mae.tasks.base import build_task
from mae.tasks.online_probe import OnlineProbe
from mae.tasks.rankme import EPSILON, RankMe, effective_rank
from mae.weights.parts import BATCH_NORM_EPS

PROBE = [*TINY_PRETRAIN, "task.online_probe=true", "task.rankme=30", "task.epochs=4", "checkpoint.every_epochs=2"]
PROBE += ["task.online_probe_lr=0.01"]


def column(run: Path, key: str) -> list[float]:
    return [row[key] for row in files.read_json_lines(run / "metrics.jsonl") if key in row]


def digest(run: Path) -> str:
    path = checkpoints.newest_valid(run)
    assert path is not None
    return checkpoint.weights_digest(checkpoint.read_weights(path))


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("probed") / "run"
    assert run_here(run, *PROBE, "checkpoint.keep=9") == 0
    return run


# ---------------------------------------------------------------- rank


def test_effective_rank_is_the_paper_s():
    feature = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(10.0 ** -torch.arange(6.0))
    values = np.linalg.svd(feature.numpy().astype(np.float64), compute_uv=False)
    shares = values / values.sum() + EPSILON
    assert effective_rank(feature) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    assert effective_rank(torch.eye(7)) == pytest.approx(7, rel=1e-5)
    assert effective_rank(torch.ones(9, 4)) == pytest.approx(1, rel=1e-4)
    assert effective_rank(torch.zeros(9, 4)) == pytest.approx(1, rel=1e-4)  # a network that has collapsed
    assert math.isnan(effective_rank(torch.tensor([[1.0, 2.0], [math.nan, 0.0]])))


def test_features_of_all_ranks_count_once_in_the_data_set_s_order():
    feature = torch.randn(21, 5)
    ranks = [RankMe(10, 21, 5) for _ in range(2)]
    for rank, collected in enumerate(ranks):
        for start in (rank, rank + 8, rank + 16):
            rows = torch.arange(start, min(start + 8, 21), 2)
            collected.add(rows, feature[rows])
    together = Ranks(torch.device("cpu"))
    together.gather = lambda _: [collected.rows for collected in ranks]  # type: ignore[method-assign]
    chosen = torch.arange(10) * 21 // 10
    assert ranks[0].result(together) == {"val/rankme": effective_rank(feature[chosen])}


def test_fewer_images_than_the_features_are_wide_are_a_warning(caplog):
    RankMe(8, 100, 32)
    assert "task.rankme: 8 validation images bound the rank of features 32 wide" in caplog.text


# ---------------------------------------------------------------- the probe by itself


def test_the_probe_takes_adam_s_steps_on_normalised_features():
    random = torch.Generator().manual_seed(0)
    probe, weight = OnlineProbe(5, 3, lr=0.01), torch.zeros(3, 6, requires_grad=True)
    adam, mean, variance = torch.optim.Adam([weight], lr=0.01), torch.zeros(5), torch.ones(5)
    for step in range(1, 15):
        feature = torch.randn(8, 5, generator=random) * 3 + 1
        label = torch.randint(3, (8,), generator=random)
        normal = F.pad((feature - mean) / (variance + BATCH_NORM_EPS).sqrt(), (0, 1), value=1.0)
        loss = F.cross_entropy(normal @ weight.T, label)
        weight.grad = torch.autograd.grad(loss, weight)[0]
        adam.step()
        losses = [probe.learn(feature[k : k + 4], label[k : k + 4], torch.tensor(0.5)) for k in (0, 4)]
        probe.learn(feature[:1], label[:1], torch.tensor(0.0))  # a stand-in
        probe.step(torch.tensor(0.0))
        assert sum(losses) / 2 == pytest.approx(loss.item(), rel=1e-5)
        mean = mean.lerp(feature.mean(0), max(1 / step, 0.1))
        variance = variance.lerp(feature.var(0, correction=0), max(1 / step, 0.1))
    torch.testing.assert_close(probe.weight, weight.detach())
    torch.testing.assert_close((probe.mean, probe.variance), (mean, variance))


@pytest.mark.parametrize(("feature", "skipped"), [(float("nan"), 0.0), (1.0, 1.0)])
def test_a_step_that_is_skipped_leaves_the_probe_as_it_is(feature, skipped):
    probe = OnlineProbe(2, 2, lr=0.1)
    probe.learn(torch.ones(2, 2), torch.tensor([0, 1]), 1.0)
    probe.step(torch.tensor(0.0))
    before = {name: value.clone() for name, value in probe.state_dict().items()}
    probe.learn(torch.full((2, 2), feature), torch.tensor([0, 1]), 1.0)
    probe.step(torch.tensor(skipped))
    for name, value in probe.state_dict().items():
        assert torch.equal(value, before[name]), name
    probe.learn(torch.ones(2, 2), torch.tensor([0, 1]), 1.0)
    probe.step(torch.tensor(0.0))
    assert probe.steps == 2 and probe.weight.isfinite().all()


def test_a_trial_step_leaves_the_probe_as_it_is():
    cfg = composed(*PROBE)
    task: Any = build_task(cfg, build(SOURCES, cfg.data, "val"))
    trial_of(cfg, task).step(4)
    assert not any(value.any() for name, value in task.probe.state_dict().items() if name != "variance")


@pytest.mark.parametrize(
    ("decoder", "mask_tokens"), [("self", "decoder"), ("self", "encoder"), ("cross", "decoder"), ("linear", "encoder")]
)
def test_the_probe_reads_the_visible_patches_tokens_whatever_decodes(decoder, mask_tokens):
    cfg = composed(*PROBE, f"model.decoder={decoder}", f"model.mask_tokens={mask_tokens}")
    task: Any = build_task(cfg, build(SOURCES, cfg.data, "val"))
    batch = trial_of(cfg, task).batch(4)
    learnt: list[torch.Tensor] = []
    task.probe.learn = lambda feature, *_: learnt.append(feature) or feature.sum()
    loss = task.train().loss(batch)["loss"]
    num_visible = int(task.model.num_patches * 0.25)
    visible = order_by_noise(batch["noise"], num_visible)[0][:, :num_visible]
    if mask_tokens == "decoder":
        patches = task.model.patchify(task.images(batch))
        tokens = task.model.encode(patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1])), visible)
        torch.testing.assert_close(learnt[0], tokens[:, 1:].mean(1).detach())
    assert learnt[0].shape == (4, 32) and not learnt[0].requires_grad and loss.requires_grad


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("more", [[], ["task.clip_grad=0.1", "task.micro_batch_size=8"]])
def test_the_probe_changes_no_bit_of_the_encoder(probed, tmp_path, more):
    assert run_here(tmp_path / "without", *PROBE, *more, "task.online_probe=false", "task.rankme=null") == 0
    if more:
        assert run_here(tmp_path / "with", *PROBE, *more) == 0
    ours, plain = tmp_path / "with" if more else probed, tmp_path / "without"
    assert digest(ours) == digest(plain)
    for key in ("loss", "grad_norm", "val/loss"):
        assert column(ours, key) == column(plain, key) != []
    assert column(ours, "online_loss") and column(ours, "val/rankme")
    assert not column(plain, "online_loss") and not column(plain, "val/rankme")


def test_the_probe_learns_and_its_signals_are_logged_and_summed_up(probed):
    losses, top1 = column(probed, "online_loss"), column(probed, "val/online_top1")
    assert losses[0] == pytest.approx(math.log(10), rel=1e-5) and sum(losses[-5:]) < 5 * losses[0]
    summary = json.loads((probed / "summary.json").read_text())
    assert summary["val_online_top1"] == top1[-1] and summary["val_rankme"] == column(probed, "val/rankme")[-1]
    assert 1 <= summary["val_rankme"] <= 30
    page = (probed / "report.html").read_text()
    assert "online probe, top-1 %" in page and "RankMe" in page and "val/online_top1" in page


def test_a_resumed_probe_has_the_same_bits(probed, tmp_path):
    run = tmp_path / "run"
    assert run_here(run, *PROBE, "checkpoint.keep=9") == 0
    (run / "summary.json").unlink()
    for path in checkpoints.checkpoints_of(run)[1:]:
        (path / "manifest.json").unlink()
    assert run_here(run, *PROBE, "checkpoint.keep=9") == 0
    assert column(run, "online_loss") == column(probed, "online_loss")
    assert column(run, "val/online_top1") == column(probed, "val/online_top1")
    assert column(run, "val/rankme") == column(probed, "val/rankme")
    states = [checkpoint.read_trainer(checkpoints.checkpoints_of(r)[-1])["task"]["probe"] for r in (run, probed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]) and states[0]["steps"] == 20


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_one_rank_equals_two(tmp_path, sharding):
    for world in (1, 2):
        overrides = [*PROBE, "task.epochs=2", f"launcher.sharding={sharding if world > 1 else 'none'}"]
        on_ranks(world, tmp_path / str(world), functools.partial(trained, overrides=overrides))
    one, two = (tmp_path / str(world) / "run" for world in (1, 2))
    for key in ("online_loss", "val/rankme", "loss"):
        assert column(one, key) == pytest.approx(column(two, key), rel=1e-4)
    assert column(one, "val/online_top1") == pytest.approx(column(two, "val/online_top1"), abs=0.6)  # of 359 images


def test_a_probe_of_images_without_labels_is_refused(tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for k in range(40):
            Image.new("RGB", (16, 16), (k, 0, 0)).save(tmp_path / "data" / split / f"{k}.png")
    folder = ["data=folder", f"data.root={tmp_path / 'data'}", "data.fraction=1.0"]
    with pytest.raises(ValueError, match="task.online_probe=true learns from labels, false needs none: .*have none"):
        run_here(tmp_path / "run", *PROBE, *folder)
