"""Every exported file is loaded by the other library and computes the same."""

import json
import sys
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import TINY, TINY_PRETRAIN, of_type, run_here
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.data.prepare import Prepare
from mae.data.transforms import CenterCrop
from mae.models.mae import MaskedAutoencoder
from mae.models.positions import resize_pos_embed
from mae.models.vit import classifier
from mae.weights.export import EXPORT_FORMATS, export, timm_model
from mae.weights.export_card import Facts, run_facts
from mae.weights.export_state import architecture
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
FACTS = Facts(
    name="vit_nano",
    source="a test",
    mean=[0.485, 0.456, 0.406],
    std=[0.229, 0.224, 0.225],
    classes=["ant", "bee", "cat", "dog", "elk"],
    config={"task": {"name": "finetune", "epochs": 3, "mask_ratio": 0.5}, "data": {"name": "digits", "root": "/x"}},
    summary={"top1": 91.25, "checkpoint": "runs/x/checkpoints/step_00000010"},
    mask_ratio=0.5,
)
UNLABELLED = Facts("mae", "a test", [0.5] * 3, [0.5] * 3, mask_ratio=0.75, norm_pix_loss=True)


def autoencoder(**changes) -> MaskedAutoencoder:
    return scramble(MaskedAutoencoder(**(SIZES | DECODER | changes)))


def vit(**changes) -> VisionTransformer:
    extra: dict[str, Any] = dict(num_classes=5, drop_path=0.1, global_pool="avg")
    return scramble(classifier(**(SIZES | extra | changes)))


def probe():
    model = vit(global_pool="token")
    norm = nn.BatchNorm1d(24, affine=False, eps=1e-6)
    model.add_module("head", nn.Sequential(norm, model.head))
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return model.eval()


def scramble(model: Network) -> Network:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "pos_embed" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + ("norm" in name and "weight" in name))
    return model.eval()


def images(size=(16, 16), chans=3, n=2):
    return torch.randn(n, chans, *size, generator=torch.Generator().manual_seed(7))


def same(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same_by_scale(a, b, tolerance=1e-6):
    """Equal to a part of the largest output: a head joined with its BatchNorm rounds once more."""
    scale = b.abs().max()
    same(a / scale, b / scale, tolerance)


def oblong():
    return vit(img_size=[16, 24], patch_size=[4, 8], in_chans=1)


def looked_at(model, n):
    size = architecture(model).encoder
    return images(size.img_size, size.in_chans, n)


def same_bits(model, state):
    ours = model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())


# ---------------------------------------------------------------- timm


@pytest.mark.parametrize(
    ("changes", "size", "chans"),
    [
        ({}, (16, 16), 3),
        ({"global_pool": "token"}, (16, 16), 3),
        ({"img_size": [16, 24], "in_chans": 1, "mlp_ratio": 2.0, "patch_size": [4, 8]}, (16, 24), 1),
        ({"in_chans": 5}, (16, 16), 5),
    ],
)
def test_timm_classifier(tmp_path, changes, size, chans):
    model = vit(**changes)
    facts = Facts("vit", "a test", [0.5] * chans, [0.2] * chans, FACTS.classes)
    export(model, format="timm", path=str(tmp_path / "net"), facts=facts)
    config = json.loads((tmp_path / "net/config.json").read_text())
    assert config["label_names"] == FACTS.classes and config["num_classes"] == 5
    assert config["pretrained_cfg"]["input_size"] == [chans, *size] and config["pretrained_cfg"]["std"] == facts.std
    assert config["pretrained_cfg"]["first_conv"] == ("patch_embed.proj" if chans == 3 else None)
    whole: Any = timm.create_model(f"local-dir:{tmp_path}/net", pretrained=True).eval()
    assert whole.pretrained_cfg["mean"] == [0.5] * chans
    named = timm.create_model(
        config["architecture"],
        num_classes=5,
        checkpoint_path=str(tmp_path / "net/model.safetensors"),
        **config["model_args"],
    ).eval()
    for other in (whole, named):
        same_bits(model, other.state_dict())
        same(other.double()(images(size, chans).double()), model.double()(images(size, chans).double()))
        model.float()


def test_timm_encoder_of_an_autoencoder(tmp_path):
    model = autoencoder()
    export(model, format="timm", path=str(tmp_path), facts=UNLABELLED)
    other = of_type(VisionTransformer, timm.create_model(f"local-dir:{tmp_path}", pretrained=True)).eval()
    fine = images().double()  # in float32 the two round differently by up to 1.4e-6 on some processors
    same(other.double().forward_features(fine), model.double().forward_features(fine))
    assert other.num_classes == 0
    found = read_pretrained(str(tmp_path))
    assert found.kind == "timm, pretrained (encoder only)" and found.sizes.get("num_heads") == 3
    same_bits(model, found.state)


def test_timm_names_of_the_papers_models():
    """ViT-B, -L and -H are timm's own: nothing but the pooling needs to be said."""
    for name, (width, depth, heads, patch) in {
        "vit_base_patch16_224": (768, 12, 12, 16),
        "vit_large_patch16_224": (1024, 24, 16, 16),
        "vit_huge_patch14_224": (1280, 32, 16, 14),
    }.items():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=10, global_pool="avg")
        net = architecture(model)
        size = net.encoder
        assert (size.embed_dim, size.depth, size.num_heads, size.patch_size[0]) == (
            width,
            depth,
            heads,
            patch,
        )
        assert timm_model(net) == (name, {"global_pool": "avg"})


def test_timm_linear_probe_is_folded(tmp_path):
    model = probe()
    export(model, format="timm", path=str(tmp_path), facts=FACTS)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    same_by_scale(other(images()), model(images()))


def test_timm_folder_is_read_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = vit()
    export(model, format="timm", path=str(tmp_path), facts=FACTS)
    other = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert other.config.id2label[1] == "bee"
    same(other(images()).logits, model(images()))


# ---------------------------------------------------------------- Hugging Face


def load(kind, folder):
    """The model, once transformers has found every tensor and no other."""
    transformers = pytest.importorskip("transformers")
    model, loading = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    return model.eval()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_hugging_face_vitmae(tmp_path, norm_pix_loss):
    model = autoencoder(norm_pix_loss=norm_pix_loss)
    facts = Facts("mae", "a test", [0.5] * 3, [0.5] * 3, mask_ratio=0.5)
    export(model, format="huggingface", path=str(tmp_path), facts=facts)
    other = load("ViTMAEForPreTraining", tmp_path)
    noise = torch.rand(2, 16)
    same(other(images(), noise=noise).loss, model(images(), 0.5, noise).loss)
    same(other.vit(images(), noise=noise).last_hidden_state.shape[1], 9)
    back = autoencoder()
    load_pretrained(back, read_pretrained(str(tmp_path)), need_decoder=True)
    same_bits(back, model.state_dict())


@pytest.mark.parametrize("make", [lambda: vit(global_pool="token"), probe])
def test_hugging_face_classifier(tmp_path, make):
    model = make()
    export(model, format="huggingface", path=str(tmp_path), facts=FACTS)
    other = load("ViTForImageClassification", tmp_path)
    assert other.config.id2label[0] == "ant"
    same_by_scale(other(images()).logits, model(images()))
    transformers = pytest.importorskip("transformers")
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == FACTS.mean and processor["size"] == {"shortest_edge": int(16 / 0.875)}
    pixels = np.random.default_rng(0).integers(
        0, 256, (20, 27, 3), np.uint8
    )  # odd rests they crop a pixel further left
    prepared = transformers.AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(pixels), return_tensors="pt")
    crop = CenterCrop(img_size=16, crop_fraction=0.875)(torch.from_numpy(pixels).permute(2, 0, 1))
    ours = Prepare(mean=FACTS.mean, std=FACTS.std)(crop[None])
    torch.testing.assert_close(prepared["pixel_values"], ours, atol=1.01 / 255 / 0.224, rtol=0)  # a step of a byte


def test_hugging_face_classifier_that_is_no_square(tmp_path):
    model = vit(global_pool="token", img_size=[16, 24])
    export(model, format="huggingface", path=str(tmp_path), facts=FACTS)
    same(load("ViTForImageClassification", tmp_path)(images((16, 24))).logits, model(images((16, 24))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (vit, "mean of the patch tokens. Export to timm"),
        (lambda: autoencoder(img_size=[16, 24]), "square images"),
    ],
)
def test_what_hugging_face_has_no_network_for(tmp_path, make, message):
    facts = UNLABELLED
    with pytest.raises(ValueError, match=message):
        export(make(), format="huggingface", path=str(tmp_path / "net"), facts=facts)
    assert not (tmp_path / "net").exists()


# ---------------------------------------------------------------- plain files


@pytest.mark.parametrize("make", [autoencoder, vit, probe])
def test_reference_and_safetensors_keep_every_bit(tmp_path, make):
    model = make()
    facts = UNLABELLED if isinstance(model, MaskedAutoencoder) else FACTS
    export(model, format="reference", path=str(tmp_path / "mae.pth"), facts=facts)
    export(model, format="safetensors", path=str(tmp_path / "net"), facts=facts)
    states = (
        torch.load(tmp_path / "mae.pth", weights_only=True)["model"],
        safetensors.torch.load_file(tmp_path / "net/model.safetensors"),
    )
    for state in states:
        assert state.keys() == model.state_dict().keys()
        same_bits(model, state)
    for path in (tmp_path / "mae.pth", tmp_path / "net"):
        back = make()
        assert not load_pretrained(back, read_pretrained(str(path))).fresh
    assert (tmp_path / "mae.md").exists() and (tmp_path / "net/README.md").exists()


@pytest.mark.parametrize("format", ["reference", "safetensors", "timm"])
@pytest.mark.parametrize("make", [autoencoder, vit])
def test_an_export_says_its_grid_and_heads(tmp_path, format, make):
    """16 x 4 patches are as many as 8 x 8: a model of another grid interpolates from the right one."""
    model = make(img_size=[64, 16])
    nn.init.normal_(model.pos_embed)
    facts = UNLABELLED if isinstance(model, MaskedAutoencoder) else FACTS
    path = export(model, format=format, path=str(tmp_path / "net"), facts=facts)[0].parent
    path = path / "model.pth" if format == "reference" else path
    for size, grid in (([64, 16], (16, 4)), ([32, 32], (8, 8)), ([16, 64], (4, 16))):
        other = make(img_size=size)
        report = load_pretrained(other, read_pretrained(str(path)))
        assert torch.equal(other.pos_embed, resize_pos_embed(model.pos_embed, (16, 4), grid))
        assert "was taken as" not in str(report) and "Assumed" not in str(report)
    with pytest.raises(ValueError, match=r"Set model\.num_heads=3"):
        load_pretrained(make(img_size=[64, 16], num_heads=2), read_pretrained(str(path)))
    if format != "timm" and isinstance(model, MaskedAutoencoder):
        assert read_pretrained(str(path)).norm_pix_loss is True and read_pretrained(str(path)).mask_ratio == 0.75


@pytest.mark.parametrize("format", ["reference", "safetensors"])
def test_an_export_says_nothing_of_pixels_or_ratio_that_its_weights_do_not(tmp_path, format):
    facts = replace(UNLABELLED, mask_ratio=None, norm_pix_loss=None)
    path = export(autoencoder(), format=format, path=str(tmp_path / "net"), facts=facts)[0].parent
    pretrained = read_pretrained(str(path / "model.pth" if format == "reference" else path))
    assert pretrained.norm_pix_loss is None and pretrained.mask_ratio is None


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize("make", [autoencoder, probe, oblong])
def test_onnx(tmp_path, make):
    runtime = pytest.importorskip("onnxruntime")
    model = make()
    mae = isinstance(model, MaskedAutoencoder)
    export(model, format="onnx", path=str(tmp_path / "net.onnx"), facts=UNLABELLED if mae else FACTS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.md", "net.onnx"]
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    for n in (1, 4):
        given = looked_at(model, n)
        found = torch.from_numpy(session.run(None, {"image": given.numpy()})[0])
        with torch.no_grad():
            same_by_scale(found, model.forward_features(given) if mae else model(given))


@pytest.mark.parametrize("make", [vit, autoencoder, probe, oblong])
def test_torch_export(tmp_path, make):
    model = make()
    mae = isinstance(model, MaskedAutoencoder)
    export(model, format="torch_export", path=str(tmp_path), facts=UNLABELLED if mae else FACTS)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for n in (1, 4):
        given = looked_at(model, n)
        same(program(given), model.forward_features(given) if mae else model(given))


@pytest.mark.parametrize("package", ["onnxruntime", "onnx"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"package {package}: pip install 'mae-experiments\[export\]'"):
        export(vit(), format="onnx", path=str(tmp_path / "net"), facts=FACTS)
    assert not (tmp_path / "net").exists()


# ---------------------------------------------------------------- files and cards


def test_nothing_is_overwritten_and_the_same_export_is_no_error(tmp_path):
    model = vit()
    for format in ("timm", "reference", "safetensors"):
        for _ in range(2):
            export(model, format=format, path=str(tmp_path / format), facts=FACTS)
    with torch.no_grad():
        of_type(nn.Linear, model.head).bias.add_(1)
    before = (tmp_path / "timm/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds another model.safetensors, which is not overwritten"):
        export(model, format="timm", path=str(tmp_path / "timm"), facts=FACTS)
    assert (tmp_path / "timm/model.safetensors").read_bytes() == before
    assert sorted(file.name for file in (tmp_path / "timm").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        export(vit(), format="timm", path=str(tmp_path / "net"), facts=FACTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["reference", "safetensors"])
def test_a_decoder_that_is_not_the_weights_own_is_left_out(tmp_path, format):
    facts = replace(UNLABELLED, encoder_only=True)
    path = export(autoencoder(), format=format, path=str(tmp_path / "net"), facts=facts)[0]
    found = read_pretrained(str(path))
    assert not found.has_decoder and "encoder only" in found.kind and "norm.weight" in found.state
    assert "This file holds the encoder alone." in next(tmp_path.rglob("README.md")).read_text()


def test_the_crop_of_evaluation_is_told_to_timm(tmp_path):
    export(vit(), format="timm", path=str(tmp_path), facts=replace(FACTS, crop=0.9))
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["crop_pct"] == 0.9


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="task.format=tim is not known: choose one of timm, huggingface"):
        export(vit(), format="tim", path=str(tmp_path), facts=FACTS)
    with pytest.raises(ValueError, match="5 class names for 7 logits"):
        export(vit(num_classes=7), format="timm", path=str(tmp_path), facts=FACTS)
    with pytest.raises(ValueError, match="not a Linear"):
        export(nn.Linear(2, 2), format="timm", path=str(tmp_path), facts=FACTS)
    (tmp_path / "file").write_text("here first")
    with pytest.raises(ValueError, match="is a file where a folder is needed"):
        export(vit(), format="timm", path=str(tmp_path / "file"), facts=FACTS)


@pytest.mark.parametrize("format", [name for name in EXPORT_FORMATS if name != "smp"])
def test_card(tmp_path, format):
    model = vit(global_pool="token", depth=1)
    paths = export(model, format=format, path=str(tmp_path / "net"), facts=FACTS)
    assert all(path.is_file() for path in paths) and len(paths) == len(list((tmp_path / "net").iterdir()))
    text = (tmp_path / "net/README.md").read_text()
    for line in (
        "| top1 | 91.25 |",
        "| task.epochs | 3 |",
        "| data.name | digits |",
        "5 classes: ant, bee",
        "mean [0.485",
    ):
        assert line in text
    assert "/x" not in text and "step_00000010" not in text  # places of the machine that trained


def test_facts_of_a_run(tmp_path):
    assert run_facts(None, None) == {}
    (tmp_path / "config.yaml").write_text("task: {name: pretrain}\n")
    assert run_facts(tmp_path, 10) == {"config": {"task": {"name": "pretrain"}}, "summary": {}}
    summary = {"val_loss": 0.5, "checkpoint": "checkpoints/step_00000020"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert run_facts(tmp_path, 20)["summary"] == run_facts(tmp_path, None)["summary"] == summary
    assert not run_facts(tmp_path, 10)["summary"]  # of an earlier checkpoint


def test_an_onnx_export_says_what_it_read_and_wrote_and_nothing_of_its_own_work(tmp_path, capfd):
    pytest.importorskip("onnxscript")
    assert run_here(tmp_path / "run", *TINY_PRETRAIN, "task.max_steps=1") == 0
    capfd.readouterr()
    size = [one for one in TINY if "precision" not in one]
    command = [*size, "task=export", f"init={tmp_path / 'run'}", "task.format=onnx", f"task.path={tmp_path / 'm.onnx'}"]
    assert run_here(tmp_path / "export", *command) == 0
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and "recognised as ours" in said[0] and said[1].startswith("wrote "), said
