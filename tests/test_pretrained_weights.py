"""Every layout of a checkpoint that `init=` takes, built from scratch and compared with a plain re-computation."""

import argparse
import hashlib
import json
import math
import pickle
from typing import Any, TypeVar

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from conftest import of_type
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.models.mae import MaskedAutoencoder
from mae.models.positions import resize_pos_embed
from mae.models.vit import classifier
from mae.weights import files
from mae.weights.layouts import sinusoid
from mae.weights.load import load_pretrained
from mae.weights.read import read_pretrained

Network = TypeVar("Network", bound=nn.Module)
SIZES: dict[str, Any] = dict(img_size=16, patch_size=4, in_chans=3, embed_dim=24, depth=2, num_heads=3, mlp_ratio=4.0)
DECODER: dict[str, Any] = dict(
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
    norm_pix_loss=True,
    decoder="self",
    mask_tokens="decoder",
)
EPS = 1e-6


def autoencoder(**changes) -> MaskedAutoencoder:
    return MaskedAutoencoder(**(SIZES | DECODER | changes)).eval()


def vit(**changes) -> VisionTransformer:
    extra: dict[str, Any] = dict(num_classes=5, drop_path=0.0, global_pool="avg")
    return classifier(**(SIZES | extra | changes)).eval()


def scramble(model: Network, seed: int = 0) -> Network:
    """Random numbers in every learned tensor, so that a wrong or swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "pos_embed" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + ("norm" in name and "weight" in name))
    return model


def table_of(model: MaskedAutoencoder | VisionTransformer) -> torch.Tensor:
    """The position embeddings."""
    assert model.pos_embed is not None
    return model.pos_embed


def images(n: int = 2, size=(16, 16), chans: int = 3) -> torch.Tensor:
    return torch.randn(n, chans, *size, generator=torch.Generator().manual_seed(7))


def reference_file(path, state, **extra):
    """What the reference's scripts save, `argparse.Namespace` included."""
    args = argparse.Namespace(model="mae_vit", input_size=16, lr=None, output_dir="out")
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": args, **extra}, path)
    return str(path)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- a plain transformer to compare with


def attend(x, q, k, v, heads):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def linear(x, s, name):
    return F.linear(x, s[f"{name}.weight"], s.get(f"{name}.bias"))


def norm(x, s, name, eps=EPS):
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def patches(x, p=4):
    """Values of a patch in the order row, column, channel."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)


# ---------------------------------------------------------------- ours


def write_run(run, model, step=10, config=None):
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    safetensors.torch.save_file(dict(model.state_dict()), folder / "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    stored = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"step": step, "epoch": 1.0, "files": {"model.safetensors": stored}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.yaml").write_text(config or "model: {img_size: 16, num_heads: 3}\n")
    return folder


def test_ours(tmp_path):
    model = scramble(autoencoder())
    folder = write_run(tmp_path, model)
    for path in (tmp_path, folder, folder / "model.safetensors"):
        found = read_pretrained(str(path))
        assert found.kind == "ours, pretrained (encoder and decoder)"
        assert found.meta.step == 10 and found.sizes.get("num_heads") == 3 and found.has_decoder
        other = autoencoder()
        report = load_pretrained(other, found, need_decoder=True)
        assert not report.fresh and not report.unused
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path):
    write_run(tmp_path, scramble(autoencoder()), step=10)
    newest = write_run(tmp_path, scramble(autoencoder(), 1), step=20) / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8])
    found = read_pretrained(str(tmp_path))
    assert found.meta.step == 10 and "step_00000020 was passed over" in found.notes[0]
    with pytest.raises(ValueError, match=r"damaged: model\.safetensors is truncated"):
        read_pretrained(str(newest))
    (tmp_path / "checkpoints/step_00000010/manifest.json").unlink()
    with pytest.raises(ValueError, match="run without a whole checkpoint"):
        read_pretrained(str(tmp_path))


# ---------------------------------------------------------------- the reference


def test_reference_full(tmp_path):
    model = scramble(autoencoder())
    found = read_pretrained(reference_file(tmp_path / "mae_pretrain_full.pth", model.state_dict()))
    assert found.kind == "reference, pretrained (encoder and decoder)" and found.meta.epoch == 3
    other = autoencoder()
    load_pretrained(other, found, need_decoder=True)
    noise = torch.rand(2, 16)
    assert torch.equal(other(images(), 0.75, noise).loss, model(images(), 0.75, noise).loss)


def test_reference_encoder_only(tmp_path):
    model = scramble(autoencoder())
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder_", "mask_token"))}
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit.pth")
    found = read_pretrained(str(tmp_path / "mae_pretrain_vit.pth"))
    assert found.kind == "reference, pretrained (encoder only)" and not found.has_decoder and found.head is None
    other = autoencoder()
    with pytest.raises(ValueError, match=r"no decoder.*_full\.pth and mae_visualize_vit_\*\.pth"):
        load_pretrained(other, found, need_decoder=True)
    report = load_pretrained(other, found)
    assert torch.equal(other.forward_features(images()), model.forward_features(images()))
    assert "holds no decoder: ours starts afresh" in str(report)
    net = vit()  # norm is dropped, fc_norm and head are new (reference, fine-tuning)
    report = load_pretrained(net, found)
    assert report.fresh == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert set(report.unused) == {"norm.weight", "norm.bias"}
    with pytest.raises(ValueError, match="cannot be evaluated: it holds no classifier"):
        load_pretrained(net, found, head="require")


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_reference_fine_tuned(tmp_path, pool):
    model = scramble(vit(global_pool=pool))
    found = read_pretrained(reference_file(tmp_path / "mae_finetuned_vit.pth", model.state_dict()))
    where = {"avg": "mean of the patch tokens", "token": "class token"}[pool]
    assert found.kind == f"reference, classifier of 5 classes ({where})"
    other = vit(global_pool=pool)
    assert not load_pretrained(other, found, head="require").fresh
    assert torch.equal(other(images()), model(images()))
    more = vit(global_pool=pool, num_classes=7)
    report = load_pretrained(more, found)
    assert report.fresh == ["head.weight", "head.bias"]
    assert "classifier knows 5 classes, the model has 7" in str(report)
    with pytest.raises(ValueError, match="knows 5 classes, the model has 7"):
        load_pretrained(more, found, head="require")
    assert "head.weight" in load_pretrained(other, found, head="fresh").fresh


def test_a_head_that_reads_other_tokens_is_not_taken(tmp_path):
    found = read_pretrained(reference_file(tmp_path / "file.pth", scramble(vit(global_pool="token")).state_dict()))
    report = load_pretrained(vit(global_pool="avg"), found)
    assert "global_pool=token" in str(report) and "head.weight" in report.fresh
    with pytest.raises(ValueError, match="reads the class token"):
        load_pretrained(vit(global_pool="avg"), found, head="require")


def probe() -> VisionTransformer:
    model, norm = vit(global_pool="token"), nn.BatchNorm1d(24, affine=False, eps=EPS)
    model.add_module("head", nn.Sequential(norm, model.head))
    scramble(model)
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return model.eval()


def test_reference_linear_probe(tmp_path):
    model = probe()
    found = read_pretrained(reference_file(tmp_path / "probe.pth", model.state_dict()))
    assert found.kind == "reference, linear probe of 5 classes (class token)"
    other = probe()
    load_pretrained(other, found, head="require")
    assert torch.equal(other(images()), model(images()))
    plain = vit(global_pool="token")
    assert "folded" in str(load_pretrained(plain, found, head="require"))
    same(plain(images()), model(images()), 1e-6)


# ---------------------------------------------------------------- timm


def test_timm_files_and_names(tmp_path, monkeypatch):
    net: dict[str, Any] = dict(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5, global_pool="avg"
    )
    model = scramble(timm.create_model("vit_tiny_patch16_224", **net)).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "vit.safetensors")
    monkeypatch.setattr(files.timm, "create_model", lambda name, pretrained: model)
    for path in (str(tmp_path / "vit.pth"), str(tmp_path / "vit.safetensors"), "timm:vit_base_patch16_224.mae"):
        found = read_pretrained(path)
        assert found.kind == "timm, classifier of 5 classes (mean of the patch tokens)"
        other = vit()
        load_pretrained(other, found, head="require")
        same(other(images()), model(images()))
    with pytest.raises(ValueError, match="Did you mean timm:vit_base_patch16_224"):
        read_pretrained("timm:vit_base_patch16_244.mae")


def test_timm_without_network(monkeypatch):
    def offline(name, pretrained):
        raise OSError("no route to host")

    monkeypatch.setattr(files.timm, "create_model", offline)
    with pytest.raises(ValueError, match="could not be fetched"):
        read_pretrained("timm:vit_base_patch16_224.mae")


def test_layer_scale_and_missing_biases_are_folded(tmp_path):
    """A timm ViT with LayerScale, no qkv bias and no class row in its table: the same function without them."""
    net: dict[str, Any] = dict(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5, global_pool="avg"
    )
    net |= dict(init_values=0.1, qkv_bias=False, no_embed_class=True)
    model = scramble(timm.create_model("vit_tiny_patch16_224", **net)).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    other = vit()
    load_pretrained(other, read_pretrained(str(tmp_path / "vit.pth")), head="require")
    same(other(images()), model(images()))


@pytest.mark.parametrize("size", [(16, 24), (24, 16)])
def test_a_class_row_is_known_where_it_makes_the_rows_a_square(tmp_path, size):
    """4 x 6 patches with a class row are 25 rows, as many as 5 x 5 patches without one (`no_embed_class`)."""
    model = scramble(vit(img_size=list(size)))
    torch.nn.init.normal_(table_of(model))
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    write_run(tmp_path / "run", model, config=f"model: {{img_size: {list(size)}, num_heads: 3}}\n")
    for name in ("bare.pth", "run"):
        other = vit(img_size=list(size))
        load_pretrained(other, read_pretrained(str(tmp_path / name)), head="require")
        assert torch.equal(table_of(other), table_of(model))
        same(other(images(size=size)), model(images(size=size)))
    square = vit()  # the run says its grid, whatever the model's is
    load_pretrained(square, read_pretrained(str(tmp_path / "run")), head="require")
    grid = (size[0] // 4, size[1] // 4)
    assert torch.equal(table_of(square), resize_pos_embed(table_of(model), grid, (4, 4)))


# ---------------------------------------------------------------- Hugging Face


OLD_NAMES = {  # of transformers 4, which the hub's files have
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "vit.layers": "vit.encoder.layer",
}


def old_names(state):
    for new, old in OLD_NAMES.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    return state


def hf_config(kind, **changes):
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)
    sizes |= dict(image_size=16, patch_size=4, layer_norm_eps=EPS)
    return getattr(transformers, kind)(**(sizes | changes))


def test_hugging_face_vitmae(tmp_path):
    config = hf_config(
        "ViTMAEConfig",
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        norm_pix_loss=True,
    )
    from transformers import ViTMAEForPreTraining

    model = scramble(ViTMAEForPreTraining(config)).eval()
    model.save_pretrained(tmp_path / "saved")
    torch.save(dict(model.state_dict()), tmp_path / "new_names.bin")
    torch.save(old_names(model.state_dict()), tmp_path / "pytorch_model.bin")
    noise = torch.rand(2, 16)
    expected = model(images(), noise=noise).loss
    for path in ("saved", "saved/model.safetensors", "new_names.bin", "", "pytorch_model.bin"):
        found = read_pretrained(str(tmp_path / path))
        assert found.kind == "Hugging Face ViTMAE, pretrained (encoder and decoder)"
        other = autoencoder()
        assert not load_pretrained(other, found, need_decoder=True).fresh
        same(other(images(), 0.75, noise).loss, expected, 1e-6)


def test_hugging_face_encoder_only_and_eps(tmp_path):
    config = hf_config("ViTMAEConfig", mask_ratio=0.0, layer_norm_eps=1e-12)
    from transformers import ViTMAEModel

    model = scramble(ViTMAEModel(config)).eval()
    model.save_pretrained(tmp_path)
    found = read_pretrained(str(tmp_path))
    assert found.kind == "Hugging Face ViT, pretrained (encoder only)"
    other = autoencoder()
    assert "eps 1e-12" in str(load_pretrained(other, found))
    order = torch.arange(16.0).expand(2, -1)
    same(other.forward_features(images()), model(images(), noise=order).last_hidden_state, 1e-4)


def test_hugging_face_classifier(tmp_path):
    config = hf_config("ViTConfig", num_labels=5)
    from transformers import ViTForImageClassification

    model = scramble(ViTForImageClassification(config)).eval()
    model.save_pretrained(tmp_path)
    found = read_pretrained(str(tmp_path))
    assert found.kind == "Hugging Face ViT, classifier of 5 classes (class token)"
    other = vit(global_pool="token")
    load_pretrained(other, found, head="require")
    same(other(images()), model(images()).logits, 1e-6)


def test_hugging_face_shards(tmp_path):
    state = old_names(scramble_hf_state())
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        safetensors.torch.save_file({n: state[n] for n in held}, tmp_path / file)
    index = {"weight_map": {n: file for file, held in parts.items() for n in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_pretrained(str(tmp_path)).sizes["depth"] == 2
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks model-00002"):
        read_pretrained(str(tmp_path))


def scramble_hf_state():
    config = hf_config("ViTConfig", num_labels=5)
    from transformers import ViTForImageClassification

    return dict(scramble(ViTForImageClassification(config)).state_dict())


# ---------------------------------------------------------------- shiyuwuCASIA/MAE-repo


def seed_block(state, name, dim, make):
    for part, shape in {
        "enc_self_attn.W_Q": (dim, dim),
        "enc_self_attn.W_K": (dim, dim),
        "enc_self_attn.W_V": (dim, dim),
        "enc_self_attn.proj": (dim, dim),
        "enc_ffn.fc.0": (4 * dim, dim),
        "enc_ffn.fc.2": (dim, 4 * dim),
    }.items():
        state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"] = make(*shape), make(shape[0])
    for part in ("layernorm1", "layernorm2"):
        state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"] = 1 + make(dim), make(dim)


def seed_table(side, dim):
    """Row first, sine and cosine in turn, no class row: (1, side * side, dim)."""
    rate = 10000.0 ** -(torch.arange(0, dim // 2, 2).float() / (dim // 2))
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    table = torch.zeros(side * side, dim)
    for start, position in ((0, row), (dim // 2, col)):
        angle = position.reshape(-1, 1) * rate
        table[:, start : start + dim // 2 : 2] = angle.sin()
        table[:, start + 1 : start + dim // 2 : 2] = angle.cos()
    return table[None]


def seed_state(dim=24, wide=16, classes=0):
    generator = torch.Generator().manual_seed(3)

    def make(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    state = {"cls_token": make(1, 1, dim), "pos_embed": seed_table(4, dim)}
    state |= {"patch_embed.proj.weight": make(dim, 48), "patch_embed.proj.bias": make(dim)}
    for i in range(2):
        seed_block(state, f"blocks.{i}", dim, make)
    if classes:
        state |= {"fc_norm.weight": 1 + make(dim), "fc_norm.bias": make(dim)}
        return state | {"mlp_head.weight": make(classes, dim), "mlp_head.bias": make(classes)}
    state |= {"encode_norm.weight": 1 + make(dim), "encode_norm.bias": make(dim)}
    state |= {"decoder_embed.weight": make(wide, dim), "decoder_embed.bias": make(wide)}
    for i in range(2):
        seed_block(state, f"decoder.encoder_list.{i}", wide, make)
    state |= {"decoder_pos_embed": seed_table(4, wide), "decoder_mask_token": make(1, 1, wide)}
    state |= {"decoder_pred.0.weight": 1 + make(wide), "decoder_pred.0.bias": make(wide)}
    return state | {"decoder_pred.1.weight": make(48, wide), "decoder_pred.1.bias": make(48)}


def seed_blocks(x, s, name, heads):
    for i in range(2):
        at = f"{name}.{i}"
        y = norm(x, s, f"{at}.layernorm1")
        q, k, v = (linear(y, s, f"{at}.enc_self_attn.W_{part}") for part in "QKV")
        x = x + linear(attend(y, q, k, v, heads), s, f"{at}.enc_self_attn.proj")
        y = F.gelu(linear(norm(x, s, f"{at}.layernorm2"), s, f"{at}.enc_ffn.fc.0"))
        x = x + linear(y, s, f"{at}.enc_ffn.fc.2")
    return x


def seed_encode(s, x, keep=None):
    """The seed's own computation on its own state dict: tokens (B, 1 + K, D), not yet normalised."""
    tokens = linear(patches(x), s, "patch_embed.proj") + s["pos_embed"]
    if keep is not None:
        tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
    tokens = torch.cat([s["cls_token"].expand(len(x), -1, -1), tokens], 1)
    return seed_blocks(tokens, s, "blocks", 3)


def test_seed_pretrained(tmp_path):
    state = seed_state()
    path = tmp_path / "mae_vit_base_patch16_checkpoint_400.pth"
    args = argparse.Namespace(input_resolution=16, patch_size=4, channel=3, device=torch.device("cpu"))
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 400, "args": args}, path)
    found = read_pretrained(str(path))
    assert found.kind == "MAE-repo (shiyuwuCASIA), pretrained (encoder and decoder)"
    assert found.state["pos_embed"].shape == (1, 17, 24) and not found.state["pos_embed"][:, 0].any()
    assert found.state["patch_embed.proj.weight"].shape == (24, 3, 4, 4)
    model = autoencoder(norm_pix_loss=False)
    report = load_pretrained(model, found, need_decoder=True)
    assert not report.fresh and not report.unused and "class row of zeros" in str(report)
    expected = norm(seed_encode(state, images()), state, "encode_norm")
    same(model.forward_features(images()), expected)
    same(model(images(), 0.75, noise := torch.rand(2, 16)).loss, seed_loss(state, images(), noise))


def seed_loss(s, x, noise):
    keep, order = noise.argsort(1)[:, :4], noise.argsort(1)
    latent = linear(norm(seed_encode(s, x, keep), s, "encode_norm"), s, "decoder_embed")
    masks = s["decoder_mask_token"].expand(len(x), 12, -1)
    back = order.argsort(1)[..., None].expand(-1, -1, latent.shape[-1])
    tokens = torch.cat([latent[:, 1:], masks], 1).gather(1, back) + s["decoder_pos_embed"]
    y = seed_blocks(torch.cat([latent[:, :1], tokens], 1), s, "decoder.encoder_list", 2)
    pred = linear(norm(y, s, "decoder_pred.0"), s, "decoder_pred.1")[:, 1:]
    mask = torch.ones(2, 16).scatter(1, keep, 0.0)
    return (((pred - patches(x)) ** 2).mean(-1) * mask).sum() / mask.sum()


def test_seed_fine_tuned(tmp_path):
    state = seed_state(classes=5)
    torch.save({"model": state, "epoch": 100}, tmp_path / "vit.pth")
    found = read_pretrained(str(tmp_path / "vit.pth"))
    assert found.kind == "MAE-repo (shiyuwuCASIA), classifier of 5 classes (mean of the patch tokens)"
    model = vit()
    load_pretrained(model, found, head="require")
    pooled = norm(seed_encode(state, images())[:, 1:].mean(1), state, "fc_norm")
    same(model(images()), linear(pooled, state, "mlp_head"))


# ---------------------------------------------------------------- pengzhiliang/MAE-pytorch


def peng_block(state, name, dim, make):
    state |= {f"{name}.attn.q_bias": make(dim), f"{name}.attn.v_bias": make(dim)}
    state[f"{name}.attn.qkv.weight"] = make(3 * dim, dim)
    for part, shape in {"attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}.items():
        state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"] = make(*shape), make(shape[0])
    for part in ("norm1", "norm2"):
        state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"] = 1 + make(dim), make(dim)


def peng_state(classes=0, dim=24, wide=16):
    generator = torch.Generator().manual_seed(5)

    def make(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    at, state = ("" if classes else "encoder."), {}
    state |= {f"{at}patch_embed.proj.weight": make(dim, 3, 4, 4), f"{at}patch_embed.proj.bias": make(dim)}
    for i in range(2):
        peng_block(state, f"{at}blocks.{i}", dim, make)
    if classes:
        state |= {"fc_norm.weight": 1 + make(dim), "fc_norm.bias": make(dim)}
        return state | {"head.weight": make(classes, dim), "head.bias": make(classes)}
    state |= {"encoder.norm.weight": 1 + make(dim), "encoder.norm.bias": make(dim), "mask_token": make(1, 1, wide)}
    for i in range(2):
        peng_block(state, f"decoder.blocks.{i}", wide, make)
    state |= {"decoder.norm.weight": 1 + make(wide), "decoder.norm.bias": make(wide)}
    state |= {"decoder.head.weight": make(48, wide), "decoder.head.bias": make(48)}
    return state | {"encoder_to_decoder.weight": make(wide, dim)}


def peng_encode(s, x, at=""):
    table = torch.zeros(16, 24)
    for j in range(24):
        angle = torch.arange(16.0) / 10000 ** (2 * (j // 2) / 24)
        table[:, j] = angle.cos() if j % 2 else angle.sin()
    tokens = F.conv2d(x, s[f"{at}patch_embed.proj.weight"], s[f"{at}patch_embed.proj.bias"], stride=4)
    x = tokens.flatten(2).transpose(1, 2) + table
    for i in range(2):
        b = f"{at}blocks.{i}"
        bias = torch.cat([s[f"{b}.attn.q_bias"], torch.zeros(24), s[f"{b}.attn.v_bias"]])
        q, k, v = F.linear(norm(x, s, f"{b}.norm1"), s[f"{b}.attn.qkv.weight"], bias).chunk(3, -1)
        x = x + linear(attend(x, q, k, v, 3), s, f"{b}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, s, f"{b}.norm2"), s, f"{b}.mlp.fc1")), s, f"{b}.mlp.fc2")
    return x


def test_mae_pytorch_fine_tuned(tmp_path):
    state = peng_state(classes=5)
    found = read_pretrained(reference_file(tmp_path / "checkpoint-99.pth", state))
    assert (
        found.kind == "MAE-pytorch (pengzhiliang), classifier of 5 classes (mean of the patch tokens), no class token"
    )
    model = vit()
    report = load_pretrained(model, found, head="require")
    assert "without a class token: the model does without its own" in str(report)
    pooled = norm(peng_encode(state, images()).mean(1), state, "fc_norm")
    same(model(images()), linear(pooled, state, "head"))


def test_mae_pytorch_pretrained(tmp_path):
    state = peng_state()
    found = read_pretrained(reference_file(tmp_path / "checkpoint-399.pth", state))
    assert found.kind == "MAE-pytorch (pengzhiliang), pretrained (encoder and decoder), no class token"
    bare = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=0, class_token=False,
        global_pool="avg", fc_norm=False,
    ).eval()  # fmt: skip
    load_pretrained(bare, found)
    same(bare.forward_features(images()), norm(peng_encode(state, images(), "encoder."), state, "encoder.norm"))
    model = autoencoder()
    before = model.cls_token.clone()
    report = load_pretrained(model, found, need_decoder=True)
    assert report.fresh == ["cls_token"] and torch.equal(model.cls_token, before)
    assert "the model's own starts afresh" in str(report) and not of_type(nn.Linear, model.decoder_embed).bias.any()
    assert torch.equal(model.pos_embed[:, 1:], sinusoid(16, 24)) and not model.pos_embed[:, 0].any()
    assert torch.equal(model.decoder_pos_embed[:, 1:], sinusoid(16, 16))


def test_a_frozen_encoder_does_without_the_class_token_that_its_file_lacks(tmp_path):
    state = peng_state()
    found = read_pretrained(reference_file(tmp_path / "checkpoint-399.pth", state))
    model = vit().requires_grad_(False)
    load_pretrained(model, found, head="fresh")
    assert model.cls_token is None and not table_of(model).requires_grad
    pooled = peng_encode(state, images(), "encoder.").mean(1)
    same(model.forward_features(images()).mean(1), pooled)
    with pytest.raises(ValueError, match="without a class token: read its patches, with task.global_pool=avg"):
        load_pretrained(vit(global_pool="token"), found, head="fresh")


@pytest.mark.parametrize("token", [False, True])
def test_a_mean_of_normed_tokens_is_not_taken_for_a_class_token(tmp_path, token):
    """timm's `*_gap_*`, `fc_norm=False`: no tensor tells it, but no class token is there or the config says it."""
    net: dict[str, Any] = dict(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5, global_pool="avg"
    )
    model = timm.create_model("vit_tiny_patch16_224", **net, fc_norm=False, class_token=token)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "global_pool": "avg", "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="its classifier reads the mean of tokens after their norm, and none here"):
        load_pretrained(vit(global_pool="token"), found, head="require")
    assert "The head starts afresh: its classifier reads the mean" in str(
        load_pretrained(vit(global_pool="avg"), found)
    )


# ---------------------------------------------------------------- other image sizes


@pytest.mark.parametrize("size", [[32, 16], [24, 40], [8, 8]])
def test_positions_are_interpolated(tmp_path, size):
    model = scramble(autoencoder())
    found = read_pretrained(reference_file(tmp_path / "file.pth", model.state_dict()))
    grid = (size[0] // 4, size[1] // 4)
    expected = resize_pos_embed(model.pos_embed.detach(), (4, 4), grid)
    for other in (vit(img_size=size), autoencoder(img_size=size)):
        report = load_pretrained(other, found)
        assert torch.equal(table_of(other).detach(), expected)
        assert f"interpolated from 4 x 4 to {grid[0]} x {grid[1]} patches" in str(report)


def test_positions_of_a_table_that_is_no_square(tmp_path):
    wide = scramble(autoencoder(img_size=[8, 24]))
    write_run(tmp_path / "run", wide, config="model: {img_size: [8, 24]}\n")
    net = vit(img_size=[24, 8])  # as many patches, another grid
    assert "from 2 x 6 to 6 x 2" in str(load_pretrained(net, read_pretrained(str(tmp_path / "run"))))
    same(table_of(net), resize_pos_embed(wide.pos_embed, (2, 6), (6, 2)))
    safetensors.torch.save_file(wide.state_dict(), tmp_path / "bare.safetensors")
    found = read_pretrained(str(tmp_path / "bare.safetensors"))
    assert "interpolated" not in str(load_pretrained(vit(img_size=[8, 24]), found))
    with pytest.raises(ValueError, match="12 patches, which is no square"):
        load_pretrained(vit(), found)


@pytest.mark.parametrize("size", [[64, 16], [16, 64], [8, 32], [36, 16]])
def test_a_table_of_a_square_number_of_rows_fits_the_models_own_grid(tmp_path, size):
    """16 x 4 patches are as many as 8 x 8: without a stated grid the model's is taken, and the report says so."""
    model = scramble(autoencoder(img_size=size))
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    other = autoencoder(img_size=size)
    nn.init.zeros_(other.pos_embed)
    report = load_pretrained(other, read_pretrained(str(tmp_path / "bare.pth")), need_decoder=True)
    assert torch.equal(other.pos_embed, model.pos_embed) and torch.equal(
        other.decoder_pos_embed, model.decoder_pos_embed
    )
    rows, side = model.num_patches, math.isqrt(model.num_patches)
    expected = f"Its pos_embed of {rows} patches was taken as {size[0] // 4} x {size[1] // 4}, the model's grid; "
    assert expected + f"the file does not say whether it was {side} x {side}." in str(report)
    square = autoencoder(img_size=side * 4)  # says nothing of it: a square is what most files are
    assert "taken as" not in str(load_pretrained(square, read_pretrained(str(tmp_path / "bare.pth"))))


@pytest.mark.parametrize("size", [(8, 24), (64, 16), (20, 52)])
def test_a_table_without_a_class_row_is_known_by_the_models_grid(tmp_path, size):
    """timm's `no_embed_class`, whatever the number of rows; 5 x 13 patches are as many as 8 x 8 and a class row."""
    net: dict[str, Any] = dict(
        patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5, global_pool="avg", no_embed_class=True
    )
    model = scramble(of_type(VisionTransformer, timm.create_model("vit_tiny_patch16_224", img_size=size, **net))).eval()
    nn.init.normal_(table_of(model))
    torch.save({"state_dict": model.state_dict(), "args": {"img_size": list(size)}}, tmp_path / "vit.pth")
    other = vit(img_size=list(size))
    load_pretrained(other, read_pretrained(str(tmp_path / "vit.pth")), head="require")
    same(other(images(size=size)), model(images(size=size)))


# ---------------------------------------------------------------- what does not fit, and what is no checkpoint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 48}, "embed_dim 24, but the model has embed_dim 48. Set model.embed_dim=24"),
        ({"depth": 3}, "depth 2, but the model has depth 3"),
        ({"patch_size": 8}, "Set model.patch_size=4"),
        ({"in_chans": 1}, "Set model.in_chans=3"),
        ({"mlp_ratio": 2.0}, "Set model.mlp_ratio=4"),
    ],
)
def test_another_size(tmp_path, changes, message):
    found = read_pretrained(reference_file(tmp_path / "file.pth", scramble(autoencoder()).state_dict()))
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        load_pretrained(vit(**changes), found)


def test_heads_are_compared_where_the_run_tells(tmp_path):
    write_run(tmp_path, scramble(autoencoder()), config="model: {num_heads: 6}\n")
    with pytest.raises(ValueError, match=r"Set model\.num_heads=6"):
        load_pretrained(vit(), read_pretrained(str(tmp_path)))


def test_another_decoder(tmp_path):
    found = read_pretrained(reference_file(tmp_path / "file.pth", scramble(autoencoder()).state_dict()))
    model = autoencoder(decoder_depth=1)
    with pytest.raises(ValueError, match=r"set model\.decoder_depth=2"):
        load_pretrained(model, found, need_decoder=True)
    assert "another size (model.decoder_depth=2): ours starts afresh" in str(load_pretrained(model, found))


def test_a_tensor_too_few_or_too_many(tmp_path):
    state = scramble(autoencoder()).state_dict()
    del state["blocks.1.mlp.fc1.weight"]
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"lacks 1 tensors that the model needs, blocks\.1\.mlp\.fc1\.weight"):
        load_pretrained(model, read_pretrained(reference_file(tmp_path / "few.pth", state)))
    state = scramble(autoencoder()).state_dict() | {"reg_token": torch.zeros(1, 4, 24)}
    with pytest.raises(ValueError, match="another kind of network.*reg_token"):
        load_pretrained(model, read_pretrained(reference_file(tmp_path / "many.pth", state)))
    state = scramble(autoencoder()).state_dict() | {"norm.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match="norm.bias is 3 and should be 24"):
        load_pretrained(autoencoder(), read_pretrained(reference_file(tmp_path / "shape.pth", state)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Runs:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_refused_and_not_run(tmp_path, capsys, legacy):
    path = tmp_path / "code.pth"
    torch.save({"model": {"x": torch.ones(1)}, "args": Runs()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"code\.pth is refused: it carries code \(.*print\)"):
        read_pretrained(str(path))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(ValueError):
        read_pretrained(str(tmp_path / "plain.pkl"))
    assert "code ran" not in capsys.readouterr().out


def test_no_checkpoint(tmp_path):
    whole = reference_file(tmp_path / "whole.pth", scramble(autoencoder()).state_dict())
    content = (tmp_path / "whole.pth").read_bytes()
    for n in (0, 100, len(content) // 2, len(content) - 10):
        (tmp_path / "cut.pth").write_bytes(content[:n])
        with pytest.raises(ValueError, match=r"cut\.pth is truncated or"):
            read_pretrained(str(tmp_path / "cut.pth"))
    safetensors.torch.save_file({"x": torch.ones(9)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"b\.safetensors is truncated"):
        read_pretrained(str(tmp_path / "b.safetensors"))
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="truncated or"):
        read_pretrained(str(tmp_path / "text.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        read_pretrained(str(tmp_path / "list.pth"))
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="no tensors under names"):
        read_pretrained(str(tmp_path / "empty.pth"))
    torch.save({"conv1.weight": torch.ones(3)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"no vision transformer that is known here.*conv1\.weight"):
        read_pretrained(str(tmp_path / "resnet.pth"))
    for path, message in {
        str(tmp_path / "nowhere"): "does not exist",
        str(tmp_path): "holds no checkpoint",
        "https://example.org/mae.pth": "download the file first",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_pretrained(path)
    assert read_pretrained(whole).meta.args["input_size"] == 16


@pytest.mark.parametrize(
    ("state", "lacking"),
    [
        (lambda: seed_state(), "patch_embed.proj.weight"),
        (lambda: seed_state(), "blocks.1.enc_self_attn.W_K.weight"),
        (lambda: peng_state(), "encoder.patch_embed.proj.weight"),
        (lambda: peng_state(), "encoder.blocks.0.attn.v_bias"),
        (lambda: seed_state() | {"patch_embed.proj.weight": torch.zeros(24, 47)}, "decoder_mask_token"),
    ],
)
def test_an_incomplete_file_of_another_library(tmp_path, state, lacking):
    tensors = state()
    del tensors[lacking]
    torch.save({"model": tensors}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file\.pth( is incomplete|: it is incomplete|: its patches have 47 values)"):
        read_pretrained(str(tmp_path / "file.pth"))


@pytest.mark.parametrize(("text", "message"), [
    ('{"weight_map": ', r"safetensors\.index\.json, which describes a checkpoint, cannot be read: Expecting value"),
    ("{}", r"index\.json does not name the file of each tensor in its weight_map: copy the folder again\."),
    ("[]", "does not name the file of each tensor"),
    ('{"weight_map": {"a": 3}}', "does not name the file of each tensor"),
    ('{"weight_map": {"a": "gone.safetensors"}}', r"lacks gone\.safetensors: copy the whole folder"),
])  # fmt: skip
def test_an_odd_list_of_shards_is_named(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pretrained(str(tmp_path))


def test_class_names_under_odd_numbers_are_passed_over(tmp_path):
    safetensors.torch.save_file(autoencoder().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"id2label": {"\\u00b2": "a"}}')
    assert read_pretrained(str(tmp_path)).meta.classes == []


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = scramble(autoencoder())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["blocks.1.norm1.weight"][3] = state["norm.weight"][0] = value
    torch.save(state, tmp_path / "net.pth")
    other = autoencoder()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    message = r"holds numbers in blocks\.1\.norm1\.weight that are NaN or infinite: its training has diverged\. Name an"
    with pytest.raises(ValueError, match=message):
        load_pretrained(other, read_pretrained(str(tmp_path / "net.pth")))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path, dtype):
    model = scramble(autoencoder())
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    other = autoencoder(img_size=24)
    load_pretrained(other, read_pretrained(reference_file(tmp_path / "half.pth", state)))
    assert other.norm.weight.dtype == torch.float32
    assert torch.equal(other.norm.weight, model.norm.weight.to(dtype).float())
