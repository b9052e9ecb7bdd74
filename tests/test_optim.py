"""Groups, layer decay and the schedule against closed forms and the reference's figures."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY_PRETRAIN, run_here
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mae import optim
from mae.errors import UserError
from mae.models.vit import classifier

GOLDEN = Path(__file__).parent / "golden"


def vit_base() -> nn.Module:
    with torch.device("meta"):
        return classifier(
            img_size=224,
            patch_size=16,
            in_chans=3,
            embed_dim=768,
            depth=12,
            num_heads=12,
            mlp_ratio=4.0,
            num_classes=1000,
            drop_path=0.1,
            global_pool="avg",
        )


@pytest.mark.parametrize("layer_decay", [0.65, 0.75])
def test_layer_decay_groups_are_the_reference_s(layer_decay):
    golden = json.loads((GOLDEN / "layer_decay_vit_base.json").read_text())[str(layer_decay)]
    groups = optim.param_groups(
        vit_base(), weight_decay=0.05, layer_decay=layer_decay, no_decay=["pos_embed", "cls_token"]
    )
    measured = [
        {
            "lr_scale": g["lr_scale"],
            "weight_decay": g["weight_decay"],
            "tensors": len(g["params"]),
            "numel": sum(p.numel() for p in g["params"]),
        }
        for g in groups
    ]
    assert len(groups) == 28
    for ours, theirs in zip(measured, golden, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


def test_an_exemption_names_a_parameter(tmp_path):
    with pytest.raises(UserError, match=r"optimizer.no_decay=mask_tokn names no parameter of the model. Did you mean"):
        run_here(tmp_path / "misspelt", *TINY_PRETRAIN, "optimizer.no_decay=[mask_tokn]")
    assert (
        run_here(tmp_path / "run", *TINY_PRETRAIN, "optimizer.no_decay=[mask_token,cls_token]", "task.max_steps=1") == 0
    )


def test_pretraining_decays_tokens_unless_told_otherwise():
    model = nn.ParameterDict({"cls_token": nn.Parameter(torch.ones(1, 1, 4)), "bias": nn.Parameter(torch.ones(4))})
    for exempt, decayed in ([], 1), (["cls_token"], 0):
        groups = optim.param_groups(model, weight_decay=0.05, layer_decay=None, no_decay=exempt)
        assert sum(len(g["params"]) for g in groups if g["weight_decay"]) == decayed
        assert all(g["lr_scale"] == 1.0 for g in groups)


def test_frozen_parameters_are_in_no_group():
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    groups = optim.param_groups(layer, weight_decay=0.1, layer_decay=None, no_decay=[])
    assert [p.shape for g in groups for p in g["params"]] == [(3,)]


@given(
    batch=st.integers(1, 10_000),
    epochs=st.floats(1, 1000),
    warmup=st.floats(0, 1),
    base_lr=st.floats(1e-6, 10),
    floor=st.floats(0, 0.9),
    at=st.floats(0, 1),
)
def test_schedule_against_its_closed_form(batch, epochs, warmup, base_lr, floor, at):
    peak = base_lr * batch / 256
    schedule = optim.Schedule(batch, epochs, warmup * epochs, base_lr=base_lr, min_lr=floor * peak)
    epoch = at * epochs
    lr = schedule.lr(epoch)
    if epoch < warmup * epochs:
        assert lr == pytest.approx(peak * epoch / (warmup * epochs))
    elif warmup < 0.999:
        angle = math.pi * (epoch - warmup * epochs) / (epochs - warmup * epochs)
        assert lr == pytest.approx(floor * peak + (peak - floor * peak) * (1 + math.cos(angle)) / 2, abs=1e-9 * peak)
    assert 0 <= lr <= peak * (1 + 1e-9)


def test_schedule_starts_at_zero_peaks_after_warm_up_and_ends_at_the_floor():
    schedule = optim.Schedule(512, 10, 2, base_lr=1e-3, min_lr=1e-5)
    assert [schedule.lr(0), schedule.lr(1), schedule.lr(2)] == pytest.approx([0, 1e-3, 2e-3])
    assert schedule.lr(10) == pytest.approx(1e-5)


def test_min_lr_is_scaled_by_a_group_s_layer_too():
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr_scale": 0.5}], lr=0.0)
    optim.Schedule(256, 10, 0, base_lr=1.0, min_lr=0.2).set(optimizer, 10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_lars_against_its_formula():
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = optim.lars(groups, momentum=0.9, trust_coefficient=0.001)
    for group in optimizer.param_groups:
        group["lr"] = 2.0
    expected_w, expected_b, mu_w, mu_b = weight.detach().clone(), bias.detach().clone(), 0, 0
    for _ in range(3):
        weight.grad, bias.grad = torch.tensor([[0.6, 0.8]]), torch.tensor([0.5])
        update = weight.grad + 0.1 * expected_w
        mu_w = 0.9 * mu_w + 0.001 * expected_w.norm() / update.norm() * update
        mu_b = 0.9 * mu_b + bias.grad
        expected_w, expected_b = expected_w - 2 * mu_w, expected_b - 2 * mu_b
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected_w)
    torch.testing.assert_close(bias.detach(), expected_b)


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_step_that_the_device_skips_leaves_no_trace(name, bad):
    """The first or the second of three is not finite: weights are bit for bit those of the other two alone."""
    from conftest import composed

    from mae.config.build import build

    cfg = composed(f"optimizer={name}").optimizer
    gradients = [torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    ends = []
    for skipping in (False, True):
        torch.manual_seed(0)
        weight, bias = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8, 4)[0])
        groups = optim.param_groups(
            nn.ParameterDict({"w": weight, "b": bias}), weight_decay=0.1, layer_decay=None, no_decay=[]
        )
        optimizer = build(optim.OPTIMIZERS, cfg, groups)
        assert optimizer._step_supports_amp_scaling
        steps = [(gradient, 0.0) for gradient in gradients]
        if skipping:
            steps.insert(bad, (torch.full((2, 8, 4), torch.nan), 1.0))
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for gradient, skipped in steps:
            weight.grad, bias.grad = gradient[0].clone(), gradient[1, 0].clone()
            if skipping:
                optimizer.found_inf = torch.tensor(skipped)  # type: ignore[attr-defined]
            optimizer.step()
        ends.append([weight.detach(), bias.detach(), *(v for s in optimizer.state.values() for v in s.values())])
    for plain, skipped in zip(*ends, strict=True):
        assert torch.equal(plain, skipped)


def test_sgd_takes_up_a_state_that_was_saved_where_it_was_not_fused():
    weight = nn.Parameter(torch.ones(4))
    made = optim.sgd([{"params": [weight]}], momentum=0.9, nesterov=False)
    state = made.state_dict()
    for group in state["param_groups"]:
        group["fused"] = None
    made.load_state_dict(state)
    weight.grad = torch.ones(4)
    made.found_inf = torch.zeros(())  # type: ignore[attr-defined]  # which torch's other ways refuse
    made.step()


@pytest.mark.parametrize("its_own", [True, False])
def test_muon_warns_where_its_bfloat16_is_emulated(its_own, monkeypatch, caplog):
    monkeypatch.setattr(optim, "has_bf16", lambda _: its_own)
    optim.muon([{"params": [nn.Parameter(torch.zeros(4, 4))]}], betas=[0.9, 0.95], momentum=0.95)
    assert ("optimizer=muon computes in bfloat16, for which this cpu has no arithmetic" in caplog.text) is not its_own


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_every_optimizer_lowers_a_loss_and_its_state_survives_a_save(name):
    from conftest import composed

    from mae.config.build import build

    torch.manual_seed(0)
    cfg = composed(f"optimizer={name}").optimizer
    x, y = torch.randn(64, 8), torch.randn(64, 4)

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Linear(8, 4)
        groups = optim.param_groups(model, weight_decay=0.0, layer_decay=None, no_decay=[])
        return model, build(optim.OPTIMIZERS, cfg, groups)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        for group in optimizer.param_groups:
            group["lr"] = 1.0 if name == "lars" else 0.01
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    model, optimizer = make()
    losses = [step(model, optimizer) for _ in range(20)]
    assert losses[-1] < losses[0]
    other, restored = make()
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the tensors
    step(model, optimizer)
    step(other, restored)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
