"""What models are made of: masking, patches, position embeddings, attention, classifiers, plain errors."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import of_type
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from mae.models import recompute
from mae.models.decoders import DECODERS, Decoder
from mae.models.layers import Block, DropPath, attention, set_attention_kernel, set_checkpointing
from mae.models.mae import MaskedAutoencoder
from mae.models.masking import order_by_noise
from mae.models.positions import resize_pos_embed, sincos_pos_embed
from mae.models.vit import classifier
from mae.perf.graphs import compile_blocks

MODEL: dict[str, Any] = dict(
    img_size=[16, 24],
    patch_size=[4, 8],
    in_chans=5,
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
CLASSIFIER: dict[str, Any] = dict(
    img_size=32,
    patch_size=8,
    in_chans=3,
    embed_dim=32,
    depth=4,
    num_heads=4,
    mlp_ratio=4.0,
    num_classes=7,
    drop_path=0.3,
    global_pool="avg",
)


def test_position_embedding_is_the_reference_s():
    rows, large = sincos_pos_embed(32, (4, 4)), sincos_pos_embed(768, (14, 14))
    figure = json.loads((Path(__file__).parent / "golden" / "pos_embed.json").read_text())
    assert rows[1, :8].tolist() == pytest.approx(figure["grid4_dim32_row1_first8"], rel=1e-9)
    assert rows[2].tolist() == pytest.approx(figure["grid4_dim32_row2"], rel=1e-9)
    assert rows[5].tolist() == pytest.approx(figure["grid4_dim32_row5"], rel=1e-9)
    assert large.sum().item() == pytest.approx(figure["grid14_dim768_sum"], rel=1e-9)
    assert large[100, :6].tolist() == pytest.approx(figure["grid14_dim768_row100_first6"], rel=1e-9)
    assert not rows[0].any()


def test_position_embedding_of_a_rectangle_is_a_cut_of_the_square_s():
    square = sincos_pos_embed(32, (5, 5))[1:].view(5, 5, 32)
    assert torch.equal(sincos_pos_embed(32, (2, 5))[1:].view(2, 5, 32), square[:2])
    assert torch.equal(sincos_pos_embed(32, (5, 3))[1:].view(5, 3, 32), square[:, :3])


def test_position_embedding_is_resized_but_for_the_class_row():
    embed = torch.randn(1, 1 + 4 * 6, 8)
    assert torch.equal(resize_pos_embed(embed, (4, 6), (4, 6)), embed)
    larger = resize_pos_embed(embed, (4, 6), (8, 6))
    assert larger.shape == (1, 1 + 8 * 6, 8) and torch.equal(larger[:, 0], embed[:, 0])
    assert torch.allclose(resize_pos_embed(torch.ones(1, 5, 4), (2, 2), (5, 3)), torch.ones(1, 16, 4))
    with pytest.raises(ValueError, match="25 rows"):
        resize_pos_embed(embed, (5, 5), (8, 6))


@settings(max_examples=60)
@given(st.data())
def test_masking_takes_each_patch_exactly_once(data):
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 64))
    keep = data.draw(st.integers(1, length))
    value = st.sampled_from([0.0, 0.25, 0.5]) if data.draw(st.booleans()) else st.floats(0, 1, width=32)  # ties
    noise = torch.tensor(data.draw(st.lists(st.lists(value, min_size=length, max_size=length),
                                            min_size=batch, max_size=batch)))  # fmt: skip
    order, mask = order_by_noise(noise, keep)
    assert torch.equal(order.sort(dim=1).values, torch.arange(length).expand(batch, -1))
    assert mask.sum(1).tolist() == [length - keep] * batch
    assert not mask.gather(1, order[:, :keep]).any() and mask.gather(1, order[:, keep:]).all()
    sorted_noise = noise.gather(1, order)
    assert (sorted_noise[:, 1:] >= sorted_noise[:, :-1]).all()


@settings(max_examples=30)
@given(
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    p=st.integers(1, 4),
    q=st.integers(1, 4),
    channels=st.integers(1, 5),
)
def test_patches_go_back_to_the_image(h, w, p, q, channels):
    sizes: dict[str, Any] = dict(img_size=[h * p, w * q], patch_size=[p, q], in_chans=channels, norm_pix_loss=False)
    model = MaskedAutoencoder(**{**MODEL, **sizes, "depth": 1, "decoder_depth": 1})
    images = torch.randn(2, channels, h * p, w * q)
    patches = model.patchify(images)
    assert patches.shape == (2, h * w, p * q * channels)
    assert torch.equal(model.unpatchify(patches), images)
    assert torch.equal(patches[0, -1].view(p, q, channels).permute(2, 0, 1), images[0, :, -p:, -q:])


def test_rectangles_of_five_channels_train_and_predict():
    model = MaskedAutoencoder(**MODEL)
    images = torch.randn(2, 5, 16, 24)
    assert model.grid_size == (4, 3) and model.num_patches == 12
    loss, mask = model(images, 0.75)
    loss.backward()
    assert mask.shape == (2, 12) and mask.sum(1).tolist() == [9, 9]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert (
        model.predict(images, 0.0).pred.shape
        == model.target(images, model.patchify(images)).shape
        == (2, 12, 4 * 8 * 5)
    )
    assert model.forward_features(images).shape == (2, 13, 32)


def test_encoder_of_whole_images_is_timm_s():
    model = MaskedAutoencoder(**MODEL).eval()
    names = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
    theirs = VisionTransformer(**{key: MODEL[key] for key in names}, num_classes=0, global_pool="").eval()
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if k in theirs.state_dict()})
    images = torch.randn(2, 5, 16, 24)
    torch.testing.assert_close(model.forward_features(images), theirs(images))


@pytest.mark.parametrize("queries", [1, 5])
def test_kernels_compute_the_same(queries):
    q, k, v = torch.randn(2, queries, 3, 8), torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8)
    torch.testing.assert_close(attention(q, k, v, "plain"), attention(q, k, v, "fused"))


@pytest.mark.parametrize(("dtype", "tiles"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)])
def test_autocast_stays_near_float32(dtype, tiles, monkeypatch):
    monkeypatch.setattr(recompute, "TILES", tiles)
    torch.manual_seed(0)
    model = MaskedAutoencoder(**{**MODEL, "in_chans": 3})
    images, noise = torch.randn(4, 3, 16, 24), torch.rand(4, 12)
    expected = model(images, 0.75, noise).loss
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = model(images, 0.75, noise).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    params = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(loss, params), torch.autograd.grad(expected, params), strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= 0.05 * b.norm()


@pytest.mark.slow
def test_compiles_whole():
    torch.manual_seed(0)
    model = MaskedAutoencoder(**{**MODEL, "depth": 1, "decoder_depth": 1})
    set_attention_kernel(model, "plain")
    images, noise = torch.randn(2, 5, 16, 24), torch.rand(2, 12)
    params = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(images, 0.75, noise).loss, params)
    for block in [*model.blocks, *of_type(nn.ModuleList, model.decoder_blocks)]:
        block.compile(backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(model(images, 0.75, noise).loss, params)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_blocks_get_no_gradient_and_pass_one_on():
    model = MaskedAutoencoder(**MODEL)
    model.blocks[1].requires_grad_(False)
    model(torch.randn(2, 5, 16, 24), 0.75).loss.backward()
    assert all(p.grad is None for p in model.blocks[1].parameters())
    assert all(p.grad is not None for p in model.blocks[0].parameters())


@pytest.mark.parametrize("what", ["none", "blocks"])
def test_checkpointing_changes_no_gradient(what):
    torch.manual_seed(0)
    model = MaskedAutoencoder(**MODEL).double()
    images, noise = torch.randn(2, 5, 16, 24, dtype=torch.float64), torch.rand(2, 12)
    params = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(images, 0.75, noise).loss, params)
    set_checkpointing(model, what)
    for a, b in zip(torch.autograd.grad(model(images, 0.75, noise).loss, params), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_classifier_is_timm_s(pool):
    torch.manual_seed(0)
    ours = classifier(**{**CLASSIFIER, "global_pool": pool, "drop_path": 0.0})
    names = {key: value for key, value in CLASSIFIER.items() if key not in ("drop_path", "global_pool")}
    theirs = VisionTransformer(**names, global_pool=pool)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    a, b = ours(images), theirs(images)
    torch.testing.assert_close(a, b)
    for x, y in zip(grads(a, ours), grads(b, theirs), strict=True):
        torch.testing.assert_close(x, y)
    set_attention_kernel(ours, "plain")
    torch.testing.assert_close(ours(images), b)


def grads(output, model):
    return torch.autograd.grad(output.square().sum(), [*model.parameters()])


def test_classifier_starts_as_the_reference_s():
    model = classifier(**{**CLASSIFIER, "num_classes": 5000})
    head = of_type(nn.Linear, model.head)
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.05) and not head.bias.any()
    drops = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert drops == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert torch.isfinite(model.train()(torch.randn(3, 3, 32, 32))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_leaves_samples_out_as_often_as_asked_and_scales_the_rest(dtype):
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 3, 2, dtype=dtype)
    kept = drop.train()(x)
    assert kept.dtype == dtype and torch.equal(kept[:, :1, :1].expand_as(kept), kept)  # a sample whole or not at all
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75, dtype=dtype).item()}
    assert (kept[:, 0, 0] > 0).float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert drop.eval()(x) is x and not drop.state_dict()


@pytest.mark.parametrize("checkpointing", ["none", "light", "blocks"])
@pytest.mark.parametrize("rate", [0.01, 0.5, 0.99])
def test_a_sample_whose_branch_is_left_out_is_not_sent_through_it(rate, checkpointing):
    block = Block(16, 2, qkv_bias=True, drop_path=rate).double().train()
    block.checkpointing = checkpointing
    x, seen = torch.randn(8, 5, 16, dtype=torch.float64, requires_grad=True), []
    block.attn.proj.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    inputs = [x, *block.parameters()]

    def results(forward):
        torch.manual_seed(3)
        out = forward()
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    skipping, whole = results(lambda: block(x)), results(lambda: in_full(block, x))
    torch.manual_seed(3)
    kept = int(block.drop_path1.random_samples(x).sum())
    assert seen == [kept] * (1 + (checkpointing == "blocks")) + [8]
    assert {0.01: kept == 8, 0.5: 0 < kept < 8, 0.99: kept == 0}[rate]
    for ours, expected in zip(skipping, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-12)  # the rate is a float32


def in_full(block, x):
    """Every branch computed for every sample, then left out or scaled."""
    x = x + block.drop_path1(block._attend(x, 0))
    return x + block.drop_path2(block._mlp(x))


@pytest.mark.slow
def test_compiled_blocks_of_all_rates_of_drop_path_are_one_graph():
    torch._dynamo.reset()
    blocks = nn.Sequential(*(Block(16, 2, drop_path=rate) for rate in (0.1, 0.2, 0.3, 0.4))).train()
    compile_blocks(blocks, None)
    before = counters["stats"]["unique_graphs"]
    blocks(torch.randn(3, 5, 16, requires_grad=True)).sum().backward()
    assert counters["stats"]["unique_graphs"] - before == 1


def test_autoencoder_starts_as_the_reference_s():
    torch.manual_seed(0)
    model = MaskedAutoencoder(**{**MODEL, "embed_dim": 256, "decoder_embed_dim": 128})
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert module.weight.abs().max().item() == pytest.approx(bound, rel=0.01), name
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6 and (module.weight == 1).all() and not module.bias.any()
    proj = model.patch_embed.proj
    bound = (6 / (256 + proj.weight[0].numel())) ** 0.5
    assert proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert proj.bias is not None and proj.bias.any()
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not model.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 5}, "model.patch_size 5 x 5 does not divide model.img_size 16 x 24"),
        ({"img_size": [16]}, r"model.img_size must be .* got \[16\]"),
        ({"patch_size": 0}, "model.patch_size must be"),
        ({"num_heads": 5}, "model.num_heads 5 does not divide model.embed_dim 32"),
        ({"decoder_num_heads": 0}, "model.decoder_num_heads 0 does not divide model.decoder_embed_dim 16"),
        ({"embed_dim": 30, "num_heads": 3}, "4 divides, got 30"),
        ({"decoder_depth": 0}, "model.decoder_depth must be at least 1"),
        ({"patch_size": 1, "in_chans": 1}, "more than one value"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        MaskedAutoencoder(**{**MODEL, **changes})


@pytest.mark.parametrize(
    ("shape", "ratio", "words"),
    [
        ((2, 3, 16, 24), 0.75, "model.in_chans"),
        ((2, 5, 24, 16), 0.75, "5 x 24 x 16"),
        ((2, 5, 16, 24), 0.99, "keeps 0 of 12"),
        ((2, 5, 16, 24), 0.0, "removes none"),
    ],
)
def test_images_and_ratios_that_do_not_fit_are_refused(shape, ratio, words):
    with pytest.raises(ValueError, match=words):
        MaskedAutoencoder(**MODEL)(torch.randn(shape), ratio)


class MeanDecoder(Decoder):
    """Position and mask token through one matrix: what a decoder needs at least."""

    def __init__(self, embed_dim, depth, outputs, sizes):
        super().__init__(embed_dim, depth, outputs, sizes)
        self.decoder_embed = nn.Linear(embed_dim, sizes.width)
        self.decoder_pred = nn.Linear(sizes.width, outputs)

    def forward(self, tokens, sequence):
        context = self.decoder_embed(tokens).mean(1, keepdim=True)
        return self.decoder_pred(context + sequence.mask_token + sequence.position(sequence.first))


def test_a_decoder_is_one_class_of_a_table_and_its_layers_are_the_models(monkeypatch):
    monkeypatch.setitem(DECODERS, "self", MeanDecoder)
    model = copy.deepcopy(MaskedAutoencoder(**MODEL)).double()
    assert not any(name.startswith("decoder.") for name in model.state_dict())
    assert model.decoder_keys() == {name for name in model.state_dict() if name.startswith(("decoder_", "mask_token"))}
    assert model.decoder.decoder_pred is model.decoder_pred
    model(torch.randn(2, 5, 16, 24, dtype=torch.float64), 0.75).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.predict(torch.randn(2, 5, 16, 24, dtype=torch.float64), 0.5).pred.shape == (2, 12, 4 * 8 * 5)


def test_a_decoders_parameters_lie_in_its_layers(monkeypatch):
    class Scaled(MeanDecoder):
        def __init__(self, *args, **keys):
            super().__init__(*args, **keys)
            self.decoder_scale = nn.Parameter(torch.ones(1))

    monkeypatch.setitem(DECODERS, "self", Scaled)
    with pytest.raises(AssertionError, match="lie in its layers"):
        MaskedAutoencoder(**MODEL)


def test_no_host_sync_on_cuda():
    """A fake device raises where the program would wait for the GPU or mix devices."""
    model, head = MaskedAutoencoder(**MODEL), classifier(**CLASSIFIER)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to("cuda")
        head.to("cuda")
        images, squares = torch.empty(2, 5, 16, 24, device="cuda"), torch.empty(2, 3, 32, 32, device="cuda")
        loss, mask = model(images, 0.75)
        logits = head.train()(squares)
    assert loss.device.type == mask.device.type == logits.device.type == "cuda"
