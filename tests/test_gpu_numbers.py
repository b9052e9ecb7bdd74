"""Acceptance suite, checks 1 to 6, 16 and 18: a GPU computes what the CPU does. See docs/gpu.md."""

import copy
import itertools
import json
import sys
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import TINY_PRETRAIN, composed
from gpu_suite import (
    AUTO,
    DEVICE,
    ON_GPU,
    SMALL_PRETRAIN,
    SUITE,
    distance,
    gradient,
    graphs,  # noqa: F401
    lines,
    losses,
    own_settings,  # noqa: F401
    trained,
)
from test_step import trial_of

from mae import device, optim
from mae.config.build import build, call
from mae.data import SOURCES
from mae.models.layers import ON_GPU_ONLY, Kernel, attention, set_checkpointing
from mae.models.mae import MaskedAutoencoder
from mae.perf.activations import saved_for_backward
from mae.runs import files
from mae.tasks.base import build_task

pytestmark = SUITE

MODEL: dict[str, Any] = dict(img_size=64, patch_size=8, in_chans=3, embed_dim=192, depth=4, num_heads=3, mlp_ratio=4.0)
DECODER: dict[str, Any] = dict(decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4, norm_pix_loss=True)
DECODER |= dict(decoder="self", mask_tokens="decoder")
FORMATS = {
    "fp32": ("highest", torch.float32, 1e-5),
    "tf32": ("high", torch.float32, 2e-3),
    "bf16": ("high", torch.bfloat16, 2e-2),
}


def autoencoder(**sizes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(**MODEL | DECODER | sizes)


def images_and_noise(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 64, 64, generator=generator), torch.rand(count, 64, generator=generator)


def test_01_environment_and_attention_backend_are_printed(tmp_path, capsys):
    assert len(trained(tmp_path, *SMALL_PRETRAIN, "task.precision=auto", "task.max_steps=1")) == 2
    record = files.read_json_lines(tmp_path / "environment.jsonl")[-1]
    picked = device.pick(DEVICE)
    name, cuda = device.description(picked)
    assert (record["device"], record.get("cuda")) == (name, cuda)
    assert record["attention"] in get_args(Kernel)
    dtype = device.number_format("auto", picked)
    with capsys.disabled():
        sys.stdout.write(f"\n{device.model_name(picked)}, {dtype}: {json.dumps(record)}\n")


@pytest.mark.parametrize("name", FORMATS)
def test_02_loss_and_gradients_are_those_of_the_cpu(name):
    precision, dtype, tolerance = FORMATS[name]
    model = autoencoder()
    expected = model(*masked(images_and_noise(4), "cpu")).loss
    expected.backward()
    other = copy.deepcopy(model).to(DEVICE)
    other.zero_grad()
    torch.set_float32_matmul_precision(precision)
    with device.autocast(dtype, torch.device(DEVICE)):
        actual = other(*masked(images_and_noise(4), DEVICE)).loss
    actual.backward()
    assert distance(actual, expected) < tolerance
    assert distance(gradient(other), gradient(model)) < tolerance


def masked(inputs: tuple[torch.Tensor, torch.Tensor], where: str) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Arguments of the model's forward pass, on a device."""
    return inputs[0].to(where), 0.75, inputs[1].to(where)


KERNELS = [kernel for kernel in get_args(Kernel) if kernel != "math" and (ON_GPU or kernel not in ON_GPU_ONLY)]


@pytest.mark.parametrize("width", [32, 64, 80])
@pytest.mark.parametrize("kernel", KERNELS)
def test_03_every_attention_kernel_computes_what_math_does(kernel: Kernel, width: int):
    """147 queries of masked patches and 197 keys, as in the last block of the decoder."""
    dtype, tolerance = (torch.bfloat16, 2e-2) if ON_GPU else (torch.float32, 1e-5)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, 4, width) for tokens in (147, 197, 197)]
    inputs = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    if kernel == "cudnn" and not cudnn_serves(inputs):
        pytest.skip("cuDNN's attention does not serve this card")
    kernels: list[Kernel] = [kernel, "math"]
    results = []
    for name, values in zip(kernels, (inputs, [x.float() for x in inputs]), strict=True):
        q, k, v = leaves = [x.detach().requires_grad_() for x in values]
        out = attention(q, k, v, name)
        out.float().square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for actual, expected in zip(*results, strict=True):
        assert distance(actual, expected) < tolerance


def cudnn_serves(inputs: list[torch.Tensor]) -> bool:
    q, k, v = (x.transpose(1, 2) for x in inputs)
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    return torch.backends.cuda.can_use_cudnn_attention(params)


def test_04_checkpointing_changes_no_number_and_orders_memory():
    model, (images, ratio, noise) = autoencoder().to(DEVICE), masked(images_and_noise(16), DEVICE)
    sizes, gradients = [], []
    for what in ("none", "light", "blocks"):
        set_checkpointing(model, what)
        model.zero_grad()
        if ON_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(images, ratio, noise).loss.backward()
            sizes.append(torch.cuda.max_memory_allocated() - before)
        else:
            with saved_for_backward(model.parameters()) as saved:
                loss = model(images, ratio, noise).loss
            loss.backward()
            sizes.append(sum(saved.values()))
        gradients.append(gradient(model))
    assert sizes[0] > sizes[1] > sizes[2]
    assert all(distance(other, gradients[0]) < 1e-5 for other in gradients[1:])


# 143 images in steps of 32 and a last one of 15, validation, pictures, k-NN, a second mask ratio
ODD = ["task.epochs=4", "task.max_steps=20", "task.warmup_epochs=0", "task.eval_every_epochs=1", "task.num_images=3"]
ODD += ["task.knn_every_epochs=1", "task.eval_mask_ratios=[0.5]"]


@pytest.mark.parametrize("compile", ["blocks", "model"])
def test_05_compiled_steps_are_plain_steps_and_nothing_compiles_after_the_trial(tmp_path, graphs, compile):  # noqa: F811
    plain = trained(tmp_path / "plain", *SMALL_PRETRAIN, *ODD)
    assert graphs() == 0 and len(plain) == 24
    compiled = trained(tmp_path / compile, *SMALL_PRETRAIN, *ODD, f"task.compile={compile}")
    assert compiled == pytest.approx(plain, rel=1e-3)
    log = (tmp_path / compile / "log.txt").read_text()
    assert "switched off" not in log and graphs() > 0 and f"compiled {graphs()} graphs in " in log


def test_06_cuda_graphs_are_compiled_blocks_with_validation_and_knn(tmp_path, graphs):  # noqa: F811
    every = [*SMALL_PRETRAIN, *ODD, f"device={AUTO}", "task.max_steps=10"]
    rows = {}
    for compile in ("blocks", "graphs"):
        trained(tmp_path / compile, *every, f"task.compile={compile}")
        assert "switched off" not in (tmp_path / compile / "log.txt").read_text()
        rows[compile] = lines(tmp_path / compile)
    assert losses(tmp_path / "graphs") == pytest.approx(losses(tmp_path / "blocks"), rel=1e-3)
    accuracies = [[row["val/knn_20"] for row in rows[name] if "val/knn_20" in row] for name in rows]
    assert len(accuracies[0]) == 2 and accuracies[0] == pytest.approx(accuracies[1], abs=0.5)


DTYPES = [torch.uint8, torch.uint16, torch.float32]


@pytest.mark.parametrize(("dtype", "channels"), itertools.product(DTYPES, [1, 3, 5]))
def test_16_images_of_every_type_and_number_of_channels_train(dtype, channels):
    cfg = composed(*TINY_PRETRAIN, f"data.in_chans={channels}", "data=scientific", "data.root=.", "data.img_size=16")
    task = build_task(cfg, build(SOURCES, composed(*TINY_PRETRAIN).data, "val"))
    batch = trial_of(cfg, task).batch(4)
    top = 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)
    noise = np.random.default_rng(0).random((4, channels, 16, 16)) * top
    batch |= {"image": torch.from_numpy(noise).to(dtype), "flip": torch.tensor([True, False, True, False])}
    expected = task(batch)["loss"]
    task.to(DEVICE)
    actual = task(device.send(batch, torch.device(DEVICE)))["loss"]
    actual.backward()
    assert distance(actual, expected) < 1e-5
    assert gradient(task).isfinite().all()


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_18_optimizers_take_the_cpu_s_steps(name):
    cfg = composed(*TINY_PRETRAIN, f"optimizer={name}")
    small = dict(embed_dim=48, depth=1, decoder_embed_dim=16, decoder_depth=1)  # Muon is slow on a CPU
    results = []
    for where in ("cpu", DEVICE):
        model = autoencoder(**small).to(where)
        optimizer = build(optim.OPTIMIZERS, cfg.optimizer, call(optim.param_groups, cfg.optimizer, model))
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
                for p in group["params"]:
                    p.grad = torch.randn(p.shape, generator=generator).to(where)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters() if p.requires_grad]))
    assert distance(results[1], results[0]) < 1e-4
    start = torch.cat([p.detach().flatten() for p in autoencoder(**small).parameters() if p.requires_grad])
    assert distance(results[0], start) > 1e-3
