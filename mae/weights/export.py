"""Exports: the same weights as files of timm, Hugging Face, the reference, safetensors, ONNX, torch.export and smp.

Every function takes (model, path, facts), writes whole files or none, and returns their paths. Weights keep
their bits, except that a linear probe's BatchNorm is folded into its matrix where the format has none.
"""

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from mae.errors import UserError
from mae.models.layers import LAYER_NORM_EPS
from mae.models.mae import MaskedAutoencoder
from mae.models.segmenter import Segmenter
from mae.models.targets import PixelTarget
from mae.models.vit import Classifier
from mae.runs.checkpoints import PROBED_LAYER
from mae.weights.export_card import Facts, card
from mae.weights.export_files import sort_metadata, staged, target_of
from mae.weights.export_graphs import to_onnx, to_torch_export
from mae.weights.export_huggingface import to_huggingface
from mae.weights.export_smp import check_segmenter, to_smp
from mae.weights.export_state import Architecture, architecture, encoder_weights, timm_model, weights
from mae.weights.heads import EVAL_WINDOWS
from mae.weights.metadata import section
from mae.weights.names import State

LIBRARY = "mae-experiments"  # in files of ours that have no config.json


def export(model: nn.Module, *, format: str, path: str, facts: Facts) -> list[Path]:
    """Writes `model` in a format of `EXPORT_FORMATS`. Raises UserError where that is not possible."""
    if format not in EXPORT_FORMATS:
        raise UserError(f"task.format={format} is not known: choose one of {', '.join(EXPORT_FORMATS)}.")
    if isinstance(model, Classifier) and format in ("timm", "huggingface", "reference"):
        _check_probe(model, format)
    if isinstance(model, Segmenter) or format == "smp":
        check_segmenter(model, format)
    classes = architecture(model).num_classes
    if facts.classes and classes and len(facts.classes) != classes:
        raise UserError(f"{len(facts.classes)} class names for {classes} logits: they must agree.")
    return EXPORT_FORMATS[format](model, path, facts)


def _check_probe(model: Classifier, format: str) -> None:
    """Raises UserError for a probe whose input the networks of other libraries do not have."""
    if model.reads_patches or model.layer is not None:
        what = "an attentive probe" if model.reads_patches else f"a probe of block {model.layer}"
        raise UserError(
            f"task.format={format} cannot express {what}: choose onnx, torch_export or safetensors, or export the "
            "encoder (init= the run that was probed)."
        )


# ---------------------------------------------------------------- timm


def to_timm(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """A folder in timm's hub format: `model.safetensors`, `config.json` with the `pretrained_cfg`, and a card.

    Of a masked autoencoder the encoder is exported, with `norm` and no head. `timm.create_model` loads it as
    `"local-dir:FOLDER"`, or by name with `checkpoint_path=` and the arguments that the card shows.
    """
    net, folder = architecture(model), Path(path).expanduser()
    name, arguments = timm_model(net)
    settings = "".join(f", {key}={value!r}" for key, value in arguments.items())
    usage = (
        f'import timm\n\nmodel = timm.create_model("local-dir:{folder.name}", pretrained=True)\n'
        f"# or: timm.create_model({name!r}, num_classes={net.num_classes}{settings},\n"
        f'#                       checkpoint_path="{folder.name}/model.safetensors")'
    )
    with staged(folder) as stage:
        safetensors.torch.save_file(encoder_weights(model), stage / "model.safetensors", metadata={"format": "pt"})
        config = _timm_config(name, arguments, net, facts)
        (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (stage / "README.md").write_text(card(model, facts, "timm", usage, encoder_alone=True))
    return [folder / file for file in ("README.md", "config.json", "model.safetensors")]


def _timm_config(name: str, arguments: dict[str, object], net: Architecture, facts: Facts) -> dict[str, object]:
    config: dict[str, object] = {
        "architecture": name,
        "num_classes": net.num_classes,
        "num_features": net.encoder.embed_dim,
        "global_pool": net.global_pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "mae",
            "custom_load": False,
            "input_size": [net.encoder.in_chans, *net.encoder.img_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": facts.crop,
            "crop_mode": "center",
            "mean": facts.mean,
            "std": facts.std,
            "num_classes": net.num_classes,
            "pool_size": None,
            # older versions of timm adapt this layer to any number of channels but 3, though the file has the right one
            "first_conv": "patch_embed.proj" if net.encoder.in_chans == 3 else None,
            "classifier": "head",
        },
    }
    if facts.classes and net.num_classes:
        config["label_names"] = facts.classes
    return config


# ---------------------------------------------------------------- plain files


def to_reference(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """The reference's own file: `{"model": state dict}` under its names, a `.pth`; `args` holds what no tensor says."""
    folder, name, readme = target_of(path, "model.pth")
    usage = f'import torch\n\nstate = torch.load("{name}", weights_only=True)["model"]'
    with staged(folder) as stage, (stage / name).open("wb") as file:
        torch.save({"model": _own(model, facts), "args": description(model, facts)}, file)
        (stage / readme).write_text(card(model, facts, "pytorch", usage))
    return [folder / name, folder / readme]


def to_safetensors(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """The reference's names in a `.safetensors` file, whose metadata holds what no tensor says."""
    folder, name, readme = target_of(path, "model.safetensors")
    usage = f'from safetensors.torch import load_file\n\nstate = load_file("{name}")'
    with staged(folder) as stage:
        text = {key: json.dumps(value) for key, value in description(model, facts).items()}
        safetensors.torch.save_file(_own(model, facts), stage / name, metadata={"format": "pt"} | text)
        sort_metadata(stage / name)
        (stage / readme).write_text(card(model, facts, "pytorch", usage))
    return [folder / name, folder / readme]


def _own(model: nn.Module, facts: Facts) -> State:
    """The tensors that come from the exported weights: without a decoder that does not."""
    return encoder_weights(model) if facts.encoder_only else weights(model, fold=False)


def description(model: nn.Module, facts: Facts) -> dict[str, object]:
    """What no tensor says of a model, in numbers and text: for the formats that have no config of their own."""
    encoder = architecture(model).encoder
    stated: dict[str, object] = {"library": LIBRARY, "layer_norm_eps": LAYER_NORM_EPS, "hidden_act": "gelu"}
    stated |= {"img_size": list(encoder.img_size), "patch_size": list(encoder.patch_size)}
    stated |= {"num_heads": encoder.num_heads, "mean": list(facts.mean), "std": list(facts.std)}
    stated |= {"rescale_factor": 1 / facts.top} if facts.top else {}
    stated |= {"crop_pct": facts.crop} | ({"classes": facts.classes} if facts.classes else {})
    if isinstance(model, Classifier) and model.layer is not None:
        stated[PROBED_LAYER] = model.layer
    if isinstance(model, Segmenter):
        task = section(facts.config, "task")
        stated |= {key: task[key] for key in EVAL_WINDOWS if task.get(key) is not None}
    if isinstance(model, MaskedAutoencoder) and not facts.encoder_only:
        stated |= {"decoder_num_heads": model.decoder.sizes.num_heads}
        stated |= {"decoder": model.decoder_name, "mask_tokens": model.mask_tokens}
        stated |= {} if isinstance(model.target, PixelTarget) else {"target": model.target.settings}
        known = {"norm_pix_loss": facts.norm_pix_loss, "mask_ratio": facts.mask_ratio}
        stated |= {key: value for key, value in known.items() if value is not None}
    return stated


EXPORT_FORMATS = {
    "timm": to_timm,
    "huggingface": to_huggingface,
    "reference": to_reference,
    "safetensors": to_safetensors,
    "onnx": to_onnx,
    "torch_export": to_torch_export,
    "smp": to_smp,
}
