"""Whole runs with every decoder: the same bits after a restart, the same numbers on two ranks, compiled or in bf16."""

import functools
import json

import pytest
import torch
from conftest import TINY, TINY_PRETRAIN, run_here
from test_decoders import KINDS, autoencoder, batch
from test_distributed import losses, on_ranks, trained
from test_engine import lines, weights
from torch._dynamo.utils import counters

from mae import checkpoint
from mae.perf.graphs import compile_blocks

NEW = [
    ["model.decoder=cross", "task.predict_ratio=0.25"],
    ["model.mask_tokens=encoder"],
    ["model.decoder=linear", "model.mask_tokens=encoder"],
]


@pytest.mark.parametrize(("decoder", "mask_tokens"), KINDS)
def test_accumulated_gradients_are_those_of_the_whole_batch(decoder, mask_tokens):
    model = autoencoder(decoder, mask_tokens)
    images, noise = batch(model, 4)
    params = [p for p in model.parameters() if p.requires_grad]
    whole = torch.autograd.grad(model(images, 0.6, noise, 0.5).loss, params)
    halves = [model(images[half], 0.6, noise[half], 0.5).loss / 2 for half in (slice(0, 2), slice(2, 4))]
    for a, b in zip(whole, torch.autograd.grad(halves[0] + halves[1], params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("decoder", "mask_tokens"), KINDS)
def test_bf16_is_close_to_float32(decoder, mask_tokens):
    model = autoencoder(decoder, mask_tokens).float()
    images, noise = (t.float() for t in batch(model))
    params = [p for p in model.parameters() if p.requires_grad]
    exact = model(images, 0.6, noise).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, 0.6, noise).loss
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    ours, theirs = (torch.cat([g.flatten() for g in torch.autograd.grad(x, params)]) for x in (loss, exact))
    assert torch.cosine_similarity(ours, theirs, 0) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "mask_tokens"), KINDS)
def test_compiled_blocks_compute_the_same(decoder, mask_tokens):
    torch._dynamo.reset()
    model = autoencoder(decoder, mask_tokens).float()
    images, noise = (t.float() for t in batch(model))
    params = [p for p in model.parameters() if p.requires_grad]
    plain = model(images, 0.6, noise).loss
    expected = torch.autograd.grad(plain, params)
    compile_blocks(model, None)
    before = counters["stats"]["unique_graphs"]
    compiled = model(images, 0.6, noise).loss
    kinds = {"self": 3, "cross": 2, "linear": 1}[decoder]  # an encoder block, a decoder block, the last of `self`
    assert counters["stats"]["unique_graphs"] - before == kinds
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=0)
    for a, b in zip(torch.autograd.grad(compiled, params), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", NEW, ids=["cross", "self-encoder", "linear"])
def test_a_resumed_run_and_two_ranks_are_the_whole_run(tmp_path, overrides):
    often = [*TINY_PRETRAIN, *overrides, "checkpoint.every_epochs=0.2", "checkpoint.keep=100"]
    assert run_here(tmp_path / "whole", *often) == 0
    run_here(tmp_path / "cut", *often)
    run = tmp_path / "cut"
    for path in checkpoint.checkpoints_of(run)[2:]:  # as if it had been killed after step 2
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (run / "summary.json").unlink()
    run_here(run, *often)
    assert weights(run) == weights(tmp_path / "whole") and lines(run) == lines(tmp_path / "whole")
    assert list((run / "images").glob("reconstruction_*.png"))
    model = [override for override in overrides if override.startswith("model.")]
    assert run_here(tmp_path / "pictures", "task=visualize", f"init={run}", *TINY, *model, "task.num_images=2") == 0
    pictures = json.loads((tmp_path / "pictures" / "summary.json").read_text())["pictures"]
    assert any("reconstruction" in path for path in pictures)
    for world in (1, 2):
        on_ranks(world, tmp_path / str(world), functools.partial(trained, overrides=[*TINY_PRETRAIN, *overrides]))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-6)
