"""The residual stream in half precision, by task.residual_dtype."""

from typing import Any

import pytest
import torch
from conftest import TINY_PRETRAIN, composed, run_here
from torch import Tensor, nn

from mae.errors import UserError
from mae.models.layers import blocks_of, set_checkpointing, set_residual_dtype
from mae.models.vit import classifier
from mae.perf.activations import saved_for_backward
from mae.runs.files import read_json_lines
from mae.tools.planned_model import activation_bytes, model_on_meta


def small_classifier() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "in_chans": 3, "embed_dim": 32, "depth": 4}
    more: dict[str, Any] = {"num_heads": 2, "mlp_ratio": 4.0, "num_classes": 5, "drop_path": 0.0, "global_pool": "avg"}
    return classifier(**sizes, **more)


def learnt(stream: torch.dtype | None, checkpointing: Any) -> tuple[list[torch.dtype], int, dict[str, Tensor]]:
    """What the blocks return, the bytes that autograd saves, and the gradients of a step under autocast."""
    model, dtypes = small_classifier(), []
    set_checkpointing(model, checkpointing)
    set_residual_dtype(model, stream)
    for block in blocks_of(model):
        block.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with saved_for_backward(model.parameters()) as saved, torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(images).float(), torch.arange(8) % 5)
    loss.backward()
    return dtypes, sum(saved.values()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", ["none", "light", "blocks"])
def test_blocks_store_sums_in_half_and_gradients_stay_near(checkpointing):
    plain_types, plain_bytes, expected = learnt(None, checkpointing)
    types, size, grads = learnt(torch.bfloat16, checkpointing)
    assert plain_types == [torch.float32] * 4 and types == [torch.bfloat16] * 3 + [torch.float32]
    assert size == plain_bytes if checkpointing == "none" else size < plain_bytes  # PyTorch keeps the norm's own input
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).norm() <= 0.05 * expected[name].norm(), name


def test_norms_are_computed_in_float32(monkeypatch):
    inputs: list[torch.dtype] = []
    norm = torch.native_layer_norm
    monkeypatch.setattr(torch, "native_layer_norm", lambda x, *rest: inputs.append(x.dtype) or norm(x, *rest))
    learnt(torch.bfloat16, "light")
    assert len(inputs) >= 8 and set(inputs) == {torch.float32}


def test_without_autocast_a_model_computes_as_if_nothing_were_set():
    model, images = small_classifier(), torch.rand(2, 3, 16, 16)
    expected = model(images)
    set_residual_dtype(model, torch.bfloat16)
    assert torch.equal(model(images), expected)


def test_the_plan_counts_the_smaller_activations():
    size = {}
    for stream in ("float32", "bf16"):
        overrides = [
            "model=vit_tiny",
            "data.img_size=64",
            "model.patch_size=8",
            "task.precision=bf16",
            f"task.residual_dtype={stream}",
        ]
        cfg = composed(*overrides, "device=cpu")
        size[stream] = activation_bytes(cfg, model_on_meta(cfg), torch.bfloat16, torch.device("cuda"), 8)
    assert 0.7 < size["bf16"] / size["float32"] < 0.95


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_full_precision_with_a_half_stream_is_refused(precision):
    with pytest.raises(UserError, match=f"residual_dtype=bf16 needs task.precision=bf16 or auto: .* with {precision}"):
        composed(*TINY_PRETRAIN, "task.residual_dtype=bf16", f"task.precision={precision}")


def test_a_device_whose_number_format_is_not_bf16_refuses_a_half_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("mae.device.has_bf16", lambda _: False)
    with pytest.raises(
        UserError, match=r"on this device task\.precision=auto is another: use .*residual_dtype=float32"
    ):
        run_here(tmp_path, *TINY_PRETRAIN, "task.residual_dtype=bf16", "task.precision=auto")


@pytest.mark.slow
def test_a_half_stream_learns_as_float32_does(tmp_path):
    """60 steps on the digits: the difference of the curves lies within what another seed makes."""
    base = [*TINY_PRETRAIN, "model.depth=6", "task.precision=bf16", "task.epochs=12", "optimizer.base_lr=2e-3"]
    curves = {}
    for name, more in {"float32": [], "bf16": ["task.residual_dtype=bf16"], "other": ["seed=1"]}.items():
        assert run_here(tmp_path / name, *base, *more) == 0
        rows = read_json_lines(tmp_path / name / "metrics.jsonl")
        curves[name] = torch.tensor([row["loss"] for row in rows if "loss" in row])
    rounding = (curves["bf16"] - curves["float32"]).abs().mean() / curves["float32"].mean()
    noise = (curves["other"] - curves["float32"]).abs().mean() / curves["float32"].mean()
    assert len(curves["bf16"]) == 60 and 0 < rounding < noise and rounding < 0.01
