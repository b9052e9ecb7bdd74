"""Export of a segmenter to segmentation-models-pytorch, written without importing it."""

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from mae.errors import UserError
from mae.models.decode_heads import DPTHead
from mae.models.segmenter import Segmenter
from mae.weights.export_card import Facts, card
from mae.weights.export_files import staged
from mae.weights.export_state import Architecture, architecture, timm_model, weights

# blocks -> a network of timm that has so many; smp.DPT passes on every other size, but not this one
NAMES_BY_DEPTH = {12: "vit_base_patch16_224", 24: "vit_large_patch16_224", 32: "vit_huge_patch14_224"}


def check_segmenter(model: nn.Module, format: str) -> None:
    """Raises UserError where a format holds no segmenters, or segmentation-models-pytorch has no such network."""
    plain = "choose safetensors, onnx or torch_export"
    if not isinstance(model, Segmenter):
        raise UserError("task.format=smp holds segmenters of task.head=dpt alone: choose another format.")
    if format == "smp" and not isinstance(model.decode_head, DPTHead):
        raise UserError(
            "task.format=smp holds segmenters of task.head=dpt alone: segmentation-models-pytorch has other heads on "
            f"other encoders only, so {plain}."
        )
    if format in ("timm", "huggingface", "reference"):
        raise UserError(f"task.format={format} holds no segmenters: {plain}, or for task.head=dpt smp.")


def to_smp(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """A folder for `smp.from_pretrained`: `model.safetensors`, `config.json` with `smp.DPT`'s arguments, and a card."""
    assert isinstance(model, Segmenter)
    net, folder = architecture(model), Path(path).expanduser()
    name, arguments = _timm_encoder(net)
    arguments |= {"global_pool": "", "num_classes": 0}
    config = {
        "_model_class": "DPT",
        "encoder_name": f"tu-{name}",
        "encoder_weights": None,
        "encoder_depth": len(model.decode_head.blocks),
        "encoder_output_indices": list(model.decode_head.blocks),
        "in_channels": arguments.pop("in_chans", 3),
        "classes": net.num_classes,
    }
    state = {
        name.removeprefix("decode_head.") if name.startswith("decode_head.") else f"encoder.model.{name}": tensor
        for name, tensor in weights(model, fold=False).items()
    }
    # timm's network has a last norm, which no block before it reads
    width = net.encoder.embed_dim
    state |= {"encoder.model.norm.weight": torch.ones(width), "encoder.model.norm.bias": torch.zeros(width)}
    usage = f'import segmentation_models_pytorch as smp\n\nmodel = smp.from_pretrained("{folder.name}").eval()'
    with staged(folder) as stage:
        safetensors.torch.save_file(state, stage / "model.safetensors", metadata={"format": "pt"})
        (stage / "config.json").write_text(json.dumps(config | arguments, indent=2) + "\n")
        (stage / "README.md").write_text(card(model, facts, "segmentation-models-pytorch", usage))
    return [folder / file for file in ("README.md", "config.json", "model.safetensors")]


def _timm_encoder(net: Architecture) -> tuple[str, dict[str, object]]:
    """timm's name of the encoder and its arguments. Raises UserError where smp.DPT cannot have as many blocks."""
    name, arguments = timm_model(net)
    depth = arguments.pop("depth", None)
    if depth is None:
        return name, arguments
    if net.encoder.depth not in NAMES_BY_DEPTH:
        raise UserError(
            f"task.format=smp holds encoders of {', '.join(map(str, NAMES_BY_DEPTH))} blocks, and this one has "
            f"{net.encoder.depth}: choose safetensors, onnx or torch_export."
        )
    return NAMES_BY_DEPTH[net.encoder.depth], arguments
