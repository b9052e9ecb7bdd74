"""The autoencoder against the reference, a plain forward, transformers and its own formulas."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mae.models.layers import set_attention_kernel
from mae.models.mae import MaskedAutoencoder
from mae.models.vit import classifier
from mae.tools.cost import Flops, forward_flops

GOLDEN = Path(__file__).parent / "golden"
TINY: dict[str, Any] = dict(
    img_size=32,
    patch_size=8,
    in_chans=3,
    embed_dim=32,
    depth=2,
    num_heads=4,
    mlp_ratio=4.0,
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
    norm_pix_loss=True,
    decoder="self",
    mask_tokens="decoder",
)
DECODER: dict[str, Any] = dict(
    mlp_ratio=4.0,
    decoder_embed_dim=512,
    decoder_depth=8,
    decoder_num_heads=16,
    norm_pix_loss=True,
    decoder="self",
    mask_tokens="decoder",
)
BASE: dict[str, Any] = dict(img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12)
LARGE: dict[str, Any] = dict(img_size=224, patch_size=16, in_chans=3, embed_dim=1024, depth=24, num_heads=16)
HUGE: dict[str, Any] = dict(img_size=224, patch_size=14, in_chans=3, embed_dim=1280, depth=32, num_heads=16)


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_model(config):
    """The model of a golden figure, its weights filled by formula, in float64."""
    config = {key: value for key, value in config.items() if key in TINY}
    model = MaskedAutoencoder(**config, decoder="self", mask_tokens="decoder").double()
    for idx, (name, param) in enumerate(sorted(model.named_parameters())):
        if "pos_embed" in name:
            continue
        value = 0.05 * torch.sin(0.37 * torch.arange(param.numel(), dtype=torch.float64) + 1.3 * idx)
        *_, layer, last = ["", *name.split(".")]
        param.data.copy_((value + (last == "weight" and "norm" in layer)).view_as(param))
    return model


def golden_batch(config, step=0):
    n, size, phase = config["batch"], config["img_size"], config["phase"]
    k = torch.arange(n * 3 * size**2, dtype=torch.float64)
    images = torch.sin(0.011 * k + phase + step) + 0.5 * torch.cos(0.0007 * k * k + phase)
    j = torch.arange(n * (size // config["patch_size"]) ** 2, dtype=torch.float64)
    noise = (0.6180339887498949 * j + 0.1 * phase + 0.37 * step) % 1
    return images.view(n, 3, size, size), noise.view(n, -1)


@pytest.mark.parametrize("figure", golden("forward"), ids=["norm_pix", "pixels"])
@pytest.mark.parametrize("kernel", ["plain", "fused", None])
def test_forward_and_gradients_are_the_reference_s(figure, kernel):
    config = figure["config"]
    model = golden_model(config)
    set_attention_kernel(model, kernel)
    images, noise = golden_batch(config)
    loss, mask = model(images, config["mask_ratio"], noise)
    loss.backward()
    assert loss.item() == pytest.approx(figure["loss"], rel=1e-9)
    assert mask.sum(1).tolist() == [figure["masked_per_image"]] * config["batch"]
    assert (mask[0] == 0).nonzero().flatten().tolist() == figure["kept_first_image"]
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert norms == pytest.approx(figure["grad_norms"], rel=1e-9)
    assert math.hypot(*norms.values()) == pytest.approx(figure["grad_norm_total"], rel=1e-9)
    pred, same_mask = model.predict(images, config["mask_ratio"], noise)
    assert torch.equal(mask, same_mask)
    assert pred.sum().item() == pytest.approx(figure["pred_sum"], rel=1e-9)
    assert pred[mask == 1].abs().mean().item() == pytest.approx(figure["pred_abs_mean_masked"], rel=1e-9)
    by_pictures = ((pred - model.target(images, model.patchify(images))) ** 2).mean(-1)[mask == 1].mean()
    assert by_pictures.item() == pytest.approx(figure["loss"], rel=1e-9)


def test_six_steps_follow_the_reference():
    figure = golden("trajectory")
    config = figure["config"]
    model = golden_model(config)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": config["weight_decay"]},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=tuple(config["betas"]))
    for step in figure["steps"]:
        for group in optimizer.param_groups:
            group["lr"] = step["lr"]
        images, noise = golden_batch(config, step["step"])
        loss = model(images, config["mask_ratio"], noise).loss
        assert loss.item() == pytest.approx(step["loss"], rel=1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def plain_loss(model, images, mask_ratio, noise):
    """The paper's method in the obvious way: nothing saved, everything put back in order."""
    length, batch = model.num_patches, torch.arange(len(images))[:, None]
    x = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    shuffle = noise.argsort(dim=1)
    kept = shuffle[:, : int(length * (1 - mask_ratio))]
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x[batch, kept]], 1)
    for block in model.blocks:
        x = plain_block(block, x)
    x = model.decoder_embed(model.norm(x))
    removed = length - kept.shape[1]
    tokens = torch.cat([x[:, 1:], model.mask_token.expand(len(x), removed, -1)], 1)[batch, shuffle.argsort(1)]
    x = torch.cat([x[:, :1], tokens], 1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = plain_block(block, x)
    pred = model.decoder_pred(model.decoder_norm(x))[:, 1:]
    mask = torch.ones_like(noise).scatter(1, kept, 0)
    patch = model.patch_size
    target = F.unfold(images, patch, stride=patch).transpose(1, 2)  # values in the order channel, row, column
    target = target.unflatten(-1, (model.in_chans, -1)).transpose(-1, -2).flatten(-2)
    if model.norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


def plain_block(block, x):
    n, heads = x.shape[1], block.attn.num_heads
    qkv = block.attn.qkv(block.norm1(x)).view(len(x), n, 3, heads, -1).permute(2, 0, 3, 1, 4)
    weights = (qkv[0] @ qkv[1].transpose(-1, -2) / math.sqrt(qkv.shape[-1])).softmax(-1)
    x = x + block.attn.proj((weights @ qkv[2]).transpose(1, 2).reshape(len(x), n, -1))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_pix_loss": False, "in_chans": 1},
        {"img_size": [16, 40], "patch_size": [4, 8], "in_chans": 5, "mlp_ratio": 2.5},
        {"decoder_depth": 1, "decoder_embed_dim": 24},
    ],
)
@pytest.mark.parametrize("kernel", ["plain", "fused", None])
def test_savings_change_neither_loss_nor_gradients(changes, kernel):
    torch.manual_seed(0)
    config: dict[str, Any] = {**TINY, **changes}
    model = MaskedAutoencoder(**config).double()
    set_attention_kernel(model, kernel)
    images = torch.randn(3, config["in_chans"], *model.img_size, dtype=torch.float64)
    noise = torch.rand(3, model.num_patches, dtype=torch.float64)
    params = [p for p in model.parameters() if p.requires_grad]
    ours, plain = model(images, 0.6, noise).loss, plain_loss(model, images, 0.6, noise)
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=0)
    for a, b in zip(torch.autograd.grad(ours, params), torch.autograd.grad(plain, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(
    ("size", "tensors", "params", "classifier_params"),
    [
        (BASE, 254, 111_907_840, 86_567_656),
        (LARGE, 398, 329_541_888, 304_326_632),
        (HUGE, 494, 657_074_508, 632_045_800),
    ],
    ids=["base", "large", "huge"],
)
def test_sizes_are_the_reference_s(size, tensors, params, classifier_params):
    with torch.device("meta"):
        model = MaskedAutoencoder(**size, **DECODER)
        head = classifier(**size, mlp_ratio=4.0, num_classes=1000, drop_path=0.1, global_pool="avg")
    assert (len(model.state_dict()), sum(p.numel() for p in model.parameters())) == (tensors, params)
    assert sum(p.numel() for p in head.parameters()) == classifier_params
    if size is BASE:
        assert len(head.state_dict()) == 152


@pytest.mark.parametrize("size", [LARGE, HUGE], ids=["large", "huge"])
def test_large_models_take_a_step(size):
    take_a_step({**size, "img_size": 2 * size["patch_size"], "depth": 1}, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [LARGE, HUGE], ids=["large", "huge"])
def test_whole_large_models_take_a_step(size):
    take_a_step({**size, **({"img_size": 28} if size is HUGE else {})}, 0.75)


def take_a_step(size, mask_ratio):
    model = MaskedAutoencoder(**size, **DECODER)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    images, noise = torch.randn(1, 3, *model.img_size), torch.rand(1, model.num_patches)
    before = model(images, mask_ratio, noise).loss
    before.backward()
    optimizer.step()
    assert model(images, mask_ratio, noise).loss < before


def formula(mask_ratio):
    """Multiply-adds of ViT-B/16's encoder and decoder, written out: two operations each."""

    def block(dim, tokens, queries):  # keys and values of all tokens, the rest of those that go on
        return 2 * dim**2 * tokens + queries * (2 * dim**2 + 2 * dim * 4 * dim + 2 * dim * tokens)

    visible = int(196 * (1 - mask_ratio))
    encoder = visible * 768 * 768 + 12 * block(768, 1 + visible, 1 + visible)
    decoder = (1 + visible) * 768 * 512 + (196 - visible) * 512 * 768
    decoder += 7 * block(512, 197, 197) + block(512, 197, 196 - visible)
    return 2 * encoder, 2 * decoder


def test_counted_flops_are_those_of_the_formula():
    with torch.device("meta"):
        model = MaskedAutoencoder(**BASE, **DECODER)
        head = classifier(**BASE, mlp_ratio=4.0, num_classes=1000, drop_path=0.1, global_pool="avg")
    for mask_ratio in (0.75, 0.5):
        assert forward_flops(model, mask_ratio) == Flops(*formula(mask_ratio))
    assert forward_flops(head, None) == Flops(formula(0.0)[0], 0)
    for kernel in ("plain", "fused"):
        set_attention_kernel(model, kernel)
        assert forward_flops(model, 0.75).total == 19_067_219_968


def test_training_takes_three_times_the_operations_of_a_forward_pass():
    with torch.device("meta"):
        model = MaskedAutoencoder(**{**BASE, **DECODER, "depth": 2, "decoder_depth": 3})
        images = torch.empty(2, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(images, 0.75).loss.backward()
    assert 3 * 2 * forward_flops(model, 0.75).total == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_base_model_costs_what_the_notes_say():
    with torch.device("meta"):
        model = MaskedAutoencoder(**BASE, **DECODER)
    assert 3 * forward_flops(model, 0.75).total == pytest.approx(57.14e9, rel=2e-3)


def test_transformers_has_the_same_loss():
    transformers = pytest.importorskip("transformers", reason="the peer's package is not installed")
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128, decoder_hidden_size=16, decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2, decoder_intermediate_size=64, norm_pix_loss=True,
            mask_ratio=0.75, layer_norm_eps=1e-6,
        )
    )  # fmt: skip
    torch.manual_seed(0)
    ours = MaskedAutoencoder(**TINY)
    copy_into_transformers(ours.state_dict(), theirs.state_dict())
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    expected = theirs(images, noise=noise).loss.item()
    assert ours(images, 0.75, noise).loss.item() == pytest.approx(expected, rel=1e-5)


TRANSFORMERS_NAMES = {  # of version 5, in the order they are replaced; q, k and v are separate there
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.embeddings.": "",
    "vit.layers.": "blocks.",
    "vit.layernorm": "norm",
    "decoder.decoder_layers.": "decoder_blocks.",
    "decoder.": "",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
}


def copy_into_transformers(ours, theirs):
    for name, tensor in theirs.items():
        key = name
        for old, new in TRANSFORMERS_NAMES.items():
            key = key.replace(old, new)
        if separate := re.search(r"attention\.([qkv])_proj", key):
            key = key.replace(separate[0], "attn.qkv")
            tensor.copy_(ours[key].chunk(3)["qkv".index(separate[1])])
        else:
            tensor.copy_(ours[key])
