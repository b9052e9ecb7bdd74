"""Export to Hugging Face's ViTMAE and ViT: their names and config, written without importing transformers."""

import json
import logging
import re
from pathlib import Path

import safetensors.torch
from torch import nn

from mae.errors import UserError
from mae.models.layers import LAYER_NORM_EPS
from mae.models.mae import MaskedAutoencoder
from mae.models.targets import PixelTarget
from mae.models.vit import EncoderSizes
from mae.weights.export_card import Facts, card
from mae.weights.export_files import staged
from mae.weights.export_state import Architecture, architecture, weights
from mae.weights.huggingface import BLOCK_LAYERS, OTHER_LAYERS
from mae.weights.names import State

PAPERS_MASK_RATIO = 0.75  # for weights that do not say their own
log = logging.getLogger(__name__)


def to_huggingface(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """A folder for `from_pretrained`: of ViTMAEForPreTraining, or of ViTForImageClassification.

    Raises UserError where transformers has no such network (a mean of patch tokens, or an image that is no
    square for ViTMAE), or cannot prepare such images.
    """
    net, folder = architecture(model), Path(path).expanduser()
    config = _config(model, net, facts)
    if isinstance(model, MaskedAutoencoder):
        kind = "ViTMAEForPreTraining"
        if (model.decoder_name, model.mask_tokens) != ("self", "decoder"):
            raise UserError(
                f"Hugging Face's ViTMAE has the paper's decoder alone, and this model has model.decoder="
                f"{model.decoder_name} model.mask_tokens={model.mask_tokens}: export its encoder to timm instead "
                "(task.format=timm)."
            )
        if not isinstance(model.target, PixelTarget):
            raise UserError(
                "Hugging Face's ViTMAE predicts pixels, and this decoder does not: export to timm instead "
                "(task.format=timm), which takes the encoder alone."
            )
        if len({*net.encoder.img_size}) > 1 or len({*net.encoder.patch_size}) > 1:
            raise UserError(
                "Hugging Face's ViTMAE takes square images and patches only: export to timm instead (task.format=timm)."
            )
    else:
        kind = "ViTForImageClassification"
        _check_classifier(net)
    processor = _processor(net.encoder, facts)
    usage = f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained({folder.name!r})"
    if processor is None:
        height, width = net.encoder.img_size
        reason = f"images must be resized to cover {int(height / facts.crop)} x {int(width / facts.crop)} (height x "
        reason += f"width) and the centre {height} x {width} cut out, which no processor of transformers does"
        log.warning("no preprocessor_config.json is written: %s", reason)
        usage += f"\n# {reason}"
    text = card(model, facts, "transformers", usage)
    with staged(folder) as stage:
        state = huggingface_names(weights(model, fold=True))
        safetensors.torch.save_file(state, stage / "model.safetensors", metadata={"format": "pt"})
        (stage / "config.json").write_text(json.dumps(config | {"architectures": [kind]}, indent=2) + "\n")
        if processor:
            (stage / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        (stage / "README.md").write_text(text)
        names = sorted(file.name for file in stage.iterdir())
    return [folder / name for name in names]


def _check_classifier(net: Architecture) -> None:
    if net.global_pool != "token":
        raise UserError(
            "Hugging Face's ViTForImageClassification reads the class token, this model the mean of the patch "
            "tokens. Export to timm (task.format=timm), whose folder transformers' AutoModelForImageClassification "
            "loads too, or fine-tune with the class token (global_pool=token)."
        )
    if not net.class_token:
        raise UserError("Hugging Face's ViT needs a class token, which this model lacks: use task.format=timm.")


def huggingface_names(state: State) -> State:
    """The reference's names to those of transformers 4, queries, keys and values apart."""
    renamed: State = {}
    for name, tensor in state.items():
        if match := re.match(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)$", name):
            decoder, number, layer, kind = match.groups()
            block = f"decoder.decoder_layers.{number}" if decoder else f"vit.encoder.layer.{number}"
            qkv = layer == "attn.qkv"
            pieces = zip(("attn.q", "attn.k", "attn.v"), tensor.chunk(3), strict=True) if qkv else [(layer, tensor)]
            renamed |= {f"{block}.{BLOCK_LAYERS[ours][0]}.{kind}": piece.contiguous() for ours, piece in pieces}
        else:
            stem, _, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
            theirs = OTHER_LAYERS.get(stem)
            stem = f"decoder.{stem}" if theirs is None else theirs if stem == "head" else f"vit.{theirs}"
            renamed[f"{stem}.{kind}" if kind else stem] = tensor
    return renamed


def _config(model: nn.Module, net: Architecture, facts: Facts) -> dict[str, object]:
    """What ViTMAEConfig and ViTConfig share, and what one of them has alone."""
    size, decoder = net.encoder, net.decoder
    config: dict[str, object] = {
        "hidden_size": size.embed_dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": size.hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": _one(size.img_size),
        "patch_size": _one(size.patch_size),
        "num_channels": size.in_chans,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    if isinstance(model, MaskedAutoencoder) and decoder is not None:
        return config | {
            "model_type": "vit_mae",
            "decoder_hidden_size": decoder.width,
            "decoder_num_hidden_layers": decoder.depth,
            "decoder_num_attention_heads": decoder.num_heads,
            "decoder_intermediate_size": decoder.hidden,
            "mask_ratio": PAPERS_MASK_RATIO if facts.mask_ratio is None else facts.mask_ratio,
            "norm_pix_loss": model.norm_pix_loss,
        }
    names = facts.classes or [f"LABEL_{i}" for i in range(net.num_classes)]
    return config | {
        "model_type": "vit",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _processor(size: EncoderSizes, facts: Facts) -> dict[str, object] | None:
    """As evaluation prepares images: resized to cover, the centre cropped.

    None where the size is no square: transformers' processors stretch an image to any other size.
    Raises UserError for 16-bit images, and where their type is not known.
    """
    height, width = size.img_size
    if facts.top is None:
        raise UserError(
            "Hugging Face's image processor needs to know the type of the images, and none can be read: name the "
            "folder that they lie in now (data.root=DIR)."
        )
    if facts.top == 65535:
        raise UserError(
            "Hugging Face's image processors cannot prepare 16-bit images: values overflow when they are resized. "
            "Choose task.format=timm, reference or safetensors."
        )
    if height != width:
        return None
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": int(height / facts.crop)},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_convert_rgb": size.in_chans == 3 and facts.top == 255,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": facts.top != 1,
        "rescale_factor": 1 / facts.top,
        "do_normalize": True,
        "image_mean": facts.mean,
        "image_std": facts.std,
    }


def _one(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)
