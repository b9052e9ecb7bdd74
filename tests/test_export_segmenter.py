"""Every exported segmenter is loaded by the other library, and computes the same at any size of image."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_export import FACTS, images, same, same_by_scale, scramble, vit
from torch import nn

from mae.errors import UserError
from mae.models.segmenter import Segmenter, segmenter
from mae.tasks.segment_evaluate import window_settings
from mae.weights.export import export
from mae.weights.export_graphs import MeansOfBins
from mae.weights.load import load_pretrained
from mae.weights.read import read_pretrained

SIZES: dict[str, Any] = dict(patch_size=8, in_chans=3, embed_dim=16, depth=4, num_heads=2, mlp_ratio=2.0)
WINDOWS = replace(FACTS, config={"task": {"name": "segment", "eval_size": 40, "eval_stride": 0.5}})


def tiny(head: Any = "linear", img_size: Any = 32, **changes) -> Segmenter:
    sizes: dict[str, Any] = SIZES | {"img_size": img_size, "num_classes": 5, "drop_path": 0.0} | changes
    model = scramble(segmenter(**sizes, head=head))
    generator = torch.Generator().manual_seed(1)
    nn.init.normal_(model.pos_embed, std=0.5, generator=generator)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.5, 0.5, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 2.0, generator=generator)
    return model


def loaded_at(path, head, img_size) -> Segmenter:
    """The exported file in a model for another size of image: its positions are interpolated on loading."""
    model = tiny(head, img_size)
    load_pretrained(model, read_pretrained(str(path)), head="require")
    return model.eval()


@torch.no_grad()
def test_images_of_any_size_are_computed_as_by_the_same_weights_loaded_for_that_size(tmp_path):
    model = tiny()
    path = export(model, format="safetensors", path=str(tmp_path), facts=WINDOWS)[0]
    assert window_settings(read_pretrained(str(path))) == (40, 0.5)
    square, oblong = images((32, 32)), images((24, 56))
    expected = model(square), loaded_at(path, "linear", [24, 56])(oblong)
    model.any_size = True
    for pictures, logits in zip((square, oblong), expected, strict=True):
        same(model(pictures), logits, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", [3, 7, 12])
def test_means_of_bins_are_those_of_adaptive_pooling(side):
    pictures = images((side, side + 2))
    for bins in (1, 2, 3, 6):
        same(MeansOfBins(bins)(pictures), nn.AdaptiveAvgPool2d(bins)(pictures))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"depth": 12}, {"img_size": [32, 64], "in_chans": 4, "depth": 24}])
def test_segmentation_models_loads_a_dpt_and_gives_the_same_logits(tmp_path, changes):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = tiny("dpt", **changes)
    paths = export(model, format="smp", path=str(tmp_path / "net"), facts=FACTS)
    assert sorted(path.name for path in paths) == ["README.md", "config.json", "model.safetensors"]
    peer = smp.from_pretrained(str(tmp_path / "net")).eval()
    pictures = images(model.patch_embed.img_size, model.patch_embed.proj.in_channels)
    same_by_scale(peer(pictures), model(pictures), 1e-5)
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["_model_class"] == "DPT" and config["classes"] == 5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "dpt", "upernet"])
def test_graphs_take_images_of_any_size(tmp_path, head):
    runtime = pytest.importorskip("onnxruntime")
    if head != "linear":
        pytest.importorskip("segmentation_models_pytorch")
    model = tiny(head)
    export(model, format="onnx", path=str(tmp_path / "net.onnx"), facts=FACTS)
    export(model, format="torch_export", path=str(tmp_path / "program"), facts=FACTS)
    path = export(model, format="safetensors", path=str(tmp_path / "plain"), facts=FACTS)[0]
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    program = torch.export.load(tmp_path / "program" / "model.pt2").module()
    for number, size in ((1, [64, 64]), (2, [64, 96]), (3, [128, 64])):
        pictures = images(size, n=number)
        expected = loaded_at(path, head, size)(pictures)
        same_by_scale(torch.from_numpy(session.run(None, {"image": pictures.numpy()})[0]), expected, 1e-5)
        same_by_scale(program(pictures), expected, 1e-5)


@pytest.mark.parametrize("format", ["timm", "huggingface", "reference", "smp"])
def test_formats_that_hold_no_segmenter_say_which_do(tmp_path, format):
    with pytest.raises(UserError, match="choose safetensors, onnx or torch_export") as caught:
        export(tiny(), format=format, path=str(tmp_path), facts=FACTS)
    assert f"task.format={format} holds" in str(caught.value)


def test_smp_holds_segmenters_of_timm_s_depths_alone(tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(UserError, match=r"holds encoders of 12, 24, 32 blocks, and this one has 4: choose"):
        export(tiny("dpt"), format="smp", path=str(tmp_path), facts=FACTS)
    with pytest.raises(UserError, match=r"holds segmenters of task\.head=dpt alone: choose another format"):
        export(vit(), format="smp", path=str(tmp_path), facts=FACTS)
