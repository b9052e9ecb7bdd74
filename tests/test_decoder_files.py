"""Checkpoints of every decoder: CrossMAE's published layout, our exports, and the decoder of another kind."""

import argparse
import os
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from mae.models.mae import MaskedAutoencoder
from mae.models.vit import classifier
from mae.weights.export import export
from mae.weights.export_card import Facts
from mae.weights.load import load_pretrained
from mae.weights.read import read_pretrained

SIZES: dict[str, Any] = dict(img_size=16, patch_size=4, in_chans=3, embed_dim=24, depth=2, num_heads=3, mlp_ratio=4.0)
FACTS = Facts(name="mae", source="a test", mean=[0.5] * 3, std=[0.5] * 3)
KINDS = [("cross", "decoder"), ("self", "encoder"), ("linear", "encoder")]


def autoencoder(decoder, mask_tokens: Any = "decoder", **changes) -> MaskedAutoencoder:
    decoder_sizes = dict(decoder_embed_dim=16, decoder_depth=3, decoder_num_heads=2, norm_pix_loss=True)
    sizes = {**SIZES, **decoder_sizes, **changes}
    return MaskedAutoencoder(**sizes, decoder=decoder, mask_tokens=mask_tokens).eval()


def crossmae_state() -> dict[str, Tensor]:
    """Tensors as models_cross.py and transformer_utils.py of TonyLianLong/CrossMAE name and shape them."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 24), "pos_embed": (1, 17, 24), "mask_token": (1, 1, 16), "decoder_pos_embed": (1, 17, 16),
        "patch_embed.proj.weight": (24, 3, 4, 4), "patch_embed.proj.bias": (24,), "wfm.linear.weight": (3, 3),
    }  # fmt: skip

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, (weight[0],)

    for block, width, attention in (
        *((f"blocks.{k}", 24, {"attn.qkv": (72, 24), "attn.proj": (24, 24)}) for k in range(2)),
        *(
            (
                f"decoder_blocks.{k}",
                16,
                {f"cross_attn.{n}": s for n, s in {"q": (16, 16), "kv": (32, 24), "proj": (16, 16)}.items()},
            )
            for k in range(3)
        ),
    ):
        for name, shape in {**attention, "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}.items():
            layer(f"{block}.{name}", *shape)
        layer(f"{block}.norm1", width)
        layer(f"{block}.norm2", width)
    for k in range(3):
        layer(f"dec_norms.{k}", 24)
    layer("decoder_norm", 16)
    layer("decoder_pred", 48, 16)
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def crossmae(tmp_path) -> str:
    """A file as CrossMAE's `misc.save_model` writes it."""
    args = argparse.Namespace(
        model="mae_vit_small_patch16", input_size=16, mask_ratio=0.75, kept_mask_ratio=0.25, norm_pix_loss=True,
        weight_fm=True, use_fm=[-1], use_input=True, self_attn=False, decoder_depth=3, cross_mae=True,
    )  # fmt: skip
    content = {"model": crossmae_state(), "optimizer": {"state": {}}, "epoch": 799, "scaler": {}, "args": args}
    torch.save(content, tmp_path / "crossmae.pth")
    return str(tmp_path / "crossmae.pth")


def test_crossmaes_file_is_read_with_its_decoder(crossmae):
    read = read_pretrained(crossmae)
    assert (read.kind, read.norm_pix_loss, read.mask_ratio) == (
        "CrossMAE, pretrained (encoder and decoder)",
        True,
        0.75,
    )
    model = autoencoder("cross")
    report = load_pretrained(model, read, need_decoder=True)
    assert not report.fresh and not report.unused
    assert model.state_dict().keys() == read.state.keys()
    assert all(torch.equal(tensor, read.state[name]) for name, tensor in model.state_dict().items())


def test_its_encoder_is_read_into_a_classifier_and_beside_another_decoder(crossmae):
    read = read_pretrained(crossmae)
    vit = classifier(**SIZES, num_classes=5, drop_path=0.0, global_pool="token").eval()
    assert load_pretrained(vit, read).fresh == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    model = autoencoder("cross")
    load_pretrained(model, read, need_decoder=True)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(vit.forward_features(images), model.forward_features(images), rtol=1e-4, atol=1e-4)
    other = autoencoder("self")
    report = load_pretrained(other, read)
    assert "The file's decoder has another kind (model.decoder=cross): ours starts afresh." in report.notes
    assert not [name for name in report.fresh if name.startswith("blocks.")]
    with pytest.raises(ValueError, match="has a decoder of another kind than the model: set model.decoder=cross"):
        load_pretrained(other, read, need_decoder=True)
    with pytest.raises(ValueError, match="has a decoder of another size than the model: set model.decoder_depth=3"):
        load_pretrained(autoencoder("cross", decoder_depth=2), read, need_decoder=True)


def test_a_decoder_with_further_layers_is_not_taken_for_ours(tmp_path):
    state = crossmae_state()
    state["decoder_blocks.0.norm0.weight"] = torch.ones(16)  # CrossMAE's --self_attn
    torch.save({"model": state}, tmp_path / "self_attn.pth")
    read = read_pretrained(str(tmp_path / "self_attn.pth"))
    assert any(
        "its decoder has another kind" in n or "decoder has another kind" in n
        for n in load_pretrained(autoencoder("cross"), read).notes
    )
    with pytest.raises(ValueError, match="has a decoder of another kind than the model: set model.decoder to the one"):
        load_pretrained(autoencoder("cross"), read, need_decoder=True)


@pytest.mark.parametrize(("decoder", "mask_tokens"), KINDS)
@pytest.mark.parametrize("format", ["reference", "safetensors"])
def test_an_exported_autoencoder_comes_back_whole(tmp_path, decoder, mask_tokens, format):
    model = autoencoder(decoder, mask_tokens)
    export(model, format=format, path=str(tmp_path / "net"), facts=FACTS)
    path = tmp_path / "net" / "model.pth" if format == "reference" else tmp_path / "net"
    read, back = read_pretrained(str(path)), autoencoder(decoder, mask_tokens)
    report = load_pretrained(back, read, need_decoder=True)
    assert not report.fresh and not report.unused
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())
    settings = f"model.decoder={decoder}" + f" model.mask_tokens={mask_tokens}" * (mask_tokens == "encoder")
    with pytest.raises(ValueError) as error:
        load_pretrained(autoencoder("self"), read, need_decoder=True)
    assert str(error.value).endswith(settings.replace("model.decoder=self ", "") + ".")


@pytest.mark.parametrize(("decoder", "mask_tokens"), KINDS)
def test_timm_reads_the_exported_encoder(tmp_path, decoder, mask_tokens, monkeypatch):
    model, images = autoencoder(decoder, mask_tokens), torch.randn(2, 3, 16, 16)
    export(model, format="timm", path=str(tmp_path / "net"), facts=FACTS)
    other: Any = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    torch.testing.assert_close(other.forward_features(images), model.forward_features(images), rtol=1e-4, atol=1e-5)
    monkeypatch.chdir(os.path.dirname(tmp_path))
    with pytest.raises(ValueError) as error:
        export(model, format="huggingface", path=str(tmp_path / "hf"), facts=FACTS)
    assert str(error.value) == (
        "Hugging Face's ViTMAE has the paper's decoder alone, and this model has model.decoder="
        f"{decoder} model.mask_tokens={mask_tokens}: export its encoder to timm instead (task.format=timm)."
    )


@pytest.mark.slow
def test_a_graph_of_a_cross_autoencoders_encoder(tmp_path):
    model, images = autoencoder("cross"), torch.randn(3, 3, 16, 16)
    export(model, format="torch_export", path=str(tmp_path / "net"), facts=FACTS)
    graph = torch.export.load(tmp_path / "net" / "model.pt2").module()
    torch.testing.assert_close(graph(images), model.forward_features(images), rtol=1e-4, atol=1e-5)
