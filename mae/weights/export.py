"""Exports: the same weights as files of timm, Hugging Face, the reference, safetensors, ONNX and torch.export.

Every function takes (model, path, facts), writes whole files or none, and returns their paths. Weights keep
their bits, except that a linear probe's BatchNorm is folded into its matrix where the format has none.
"""

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mae.models.mae import MaskedAutoencoder
from mae.weights.export_card import Facts, card
from mae.weights.export_files import place, sort_metadata, staged
from mae.weights.export_huggingface import to_huggingface
from mae.weights.export_state import State, description, encoder_weights, sizes, weights

TIMM_NAMES = {  # (patch, width, blocks, heads) of timm's plain ViTs
    (16, 192, 12, 3): "vit_tiny_patch16_224",
    (32, 384, 12, 6): "vit_small_patch32_224",
    (16, 384, 12, 6): "vit_small_patch16_224",
    (8, 384, 12, 6): "vit_small_patch8_224",
    (32, 768, 12, 12): "vit_base_patch32_224",
    (16, 768, 12, 12): "vit_base_patch16_224",
    (8, 768, 12, 12): "vit_base_patch8_224",
    (32, 1024, 24, 16): "vit_large_patch32_224",
    (16, 1024, 24, 16): "vit_large_patch16_224",
    (14, 1024, 24, 16): "vit_large_patch14_224",
    (14, 1280, 32, 16): "vit_huge_patch14_224",
}
ONNX_FILE_LIMIT = 1_900_000_000  # bytes: an ONNX file is one protobuf message, of less than 2 GiB


def export(model: nn.Module, *, format: str, path: str, facts: Facts) -> list[Path]:
    """Writes `model` in a format of `FORMATS`. Raises ValueError in plain words where that is not possible."""
    if format not in FORMATS:
        raise ValueError(f"task.format={format} is not known: choose one of {', '.join(FORMATS)}.")
    if facts.classes and len(facts.classes) != sizes(model)["num_classes"] and sizes(model)["num_classes"]:
        raise ValueError(f"{len(facts.classes)} class names for {sizes(model)['num_classes']} logits: they must agree.")
    return FORMATS[format](model, path, facts)


# ---------------------------------------------------------------- timm


def to_timm(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """A folder in timm's hub format: `model.safetensors`, `config.json` with the `pretrained_cfg`, and a card.

    Of a masked autoencoder the encoder is exported, with `norm` and no head. `timm.create_model` loads it as
    `"local-dir:FOLDER"`, or by name with `checkpoint_path=` and the arguments that the card shows.
    """
    size, folder = sizes(model), Path(path).expanduser()
    name, arguments = timm_model(size)
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    usage = (
        f'import timm\n\nmodel = timm.create_model("local-dir:{folder.name}", pretrained=True)\n'
        f"# or: timm.create_model({name!r}, num_classes={size['num_classes']}{given},\n"
        f'#                       checkpoint_path="{folder.name}/model.safetensors")'
    )
    text = _card(model, facts, "timm", usage, encoder=True)
    with staged(folder) as stage:
        safetensors.torch.save_file(encoder_weights(model), stage / "model.safetensors", metadata={"format": "pt"})
        config = _timm_config(name, arguments, size, facts)
        (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (stage / "README.md").write_text(text)
    return [folder / file for file in ("README.md", "config.json", "model.safetensors")]


def timm_model(size: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """timm's name for a model of these sizes, and what must be passed besides `num_classes`."""
    patch = size["patch_size"]
    key = (patch[0], size["embed_dim"], size["depth"], size["num_heads"])
    arguments: dict[str, Any] = {"global_pool": size["global_pool"]}
    plain = patch[0] == patch[1] and size["hidden"] == 4 * size["embed_dim"] and key in TIMM_NAMES
    if not plain:
        arguments |= {"patch_size": patch[0] if patch[0] == patch[1] else list(patch)}
        arguments |= {name: size[name] for name in ("embed_dim", "depth", "num_heads")}
        arguments["mlp_ratio"] = size["hidden"] / size["embed_dim"]
    if size["img_size"] != (224, 224):
        arguments["img_size"] = list(size["img_size"])
    if size["in_chans"] != 3:
        arguments["in_chans"] = size["in_chans"]
    if not size["class_token"]:
        arguments["class_token"] = False
    return TIMM_NAMES[key] if plain else "vit_base_patch16_224", arguments


def _timm_config(name: str, arguments: dict[str, Any], size: dict[str, Any], facts: Facts) -> dict[str, Any]:
    height, width = size["img_size"]
    config = {
        "architecture": name,
        "num_classes": size["num_classes"],
        "num_features": size["embed_dim"],
        "global_pool": size["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "mae",
            "custom_load": False,
            "input_size": [size["in_chans"], height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": facts.crop,
            "crop_mode": "center",
            "mean": facts.mean,
            "std": facts.std,
            "num_classes": size["num_classes"],
            "pool_size": None,
            # older versions of timm adapt the named layer to any number of channels but 3, though the file fits already
            "first_conv": "patch_embed.proj" if size["in_chans"] == 3 else None,
            "classifier": "head",
        },
    }
    return config | ({"label_names": facts.classes} if facts.classes and size["num_classes"] else {})


# ---------------------------------------------------------------- plain files


def to_reference(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """The reference's own file: `{"model": state dict}` under its names, a `.pth`; `args` says what no tensor does."""
    folder, name, readme = place(path, "model.pth")
    usage = f'import torch\n\nstate = torch.load("{name}", weights_only=True)["model"]'
    with staged(folder) as stage, (stage / name).open("wb") as file:
        torch.save({"model": _own(model, facts), "args": description(model, facts)}, file)
        (stage / readme).write_text(_card(model, facts, "pytorch", usage))
    return [folder / name, folder / readme]


def to_safetensors(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """The reference's names in a `.safetensors` file, whose metadata says what no tensor does."""
    folder, name, readme = place(path, "model.safetensors")
    usage = f'from safetensors.torch import load_file\n\nstate = load_file("{name}")'
    with staged(folder) as stage:
        text = {key: json.dumps(value) for key, value in description(model, facts).items()}
        safetensors.torch.save_file(_own(model, facts), stage / name, metadata={"format": "pt"} | text)
        sort_metadata(stage / name)
        (stage / readme).write_text(_card(model, facts, "pytorch", usage))
    return [folder / name, folder / readme]


def _own(model: nn.Module, facts: Facts) -> State:
    """The tensors that come from the weights exported: without a decoder that does not."""
    return encoder_weights(model) if facts.encoder_only else weights(model, fold=False)


def _card(model: nn.Module, facts: Facts, library: str, usage: str, encoder: bool = False) -> str:
    """The card; `encoder`: of a masked autoencoder the format holds the encoder alone."""
    encoder &= isinstance(model, MaskedAutoencoder)
    return card(facts, library=library, usage=usage, classifier=sizes(model)["num_classes"] > 0, encoder=encoder)


# ---------------------------------------------------------------- graphs


class Graph(nn.Module):
    """What a graph computes: a classifier's logits (B, classes), or an autoencoder's encoder tokens (B, 1 + L, D)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float()
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        return self.model.forward_features(image) if isinstance(self.model, MaskedAutoencoder) else self.model(image)

    def example(self, batch: int) -> Tensor:
        """Images (B, C, H, W) of noise, always the same."""
        size = sizes(self.model)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, size["in_chans"], *size["img_size"], generator=generator)


def to_torch_export(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """A `.pt2` program of torch.export: any batch size, no code of this project needed to run it."""
    folder, name, readme = place(path, "model.pt2")
    graph = Graph(model)
    program = torch.export.export(graph, (graph.example(2),), dynamic_shapes={"image": {0: torch.export.Dim("batch")}})
    usage = f'import torch\n\nmodel = torch.export.load("{name}").module()\noutput = model(images)'
    with staged(folder) as stage:
        torch.export.save(program, stage / name)
        (stage / readme).write_text(_card(model, facts, "pytorch", usage, encoder=True))
    return [folder / name, folder / readme]


def to_onnx(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """An ONNX graph for any batch size, checked with onnxruntime against PyTorch before it is put in place.

    Input `image` (B, C, H, W), normalised; output `logits` (B, classes), or `tokens` (B, 1 + L, D) of an
    autoencoder. Weights past 1.9 GB lie in a second file beside it, named `.data`.
    """
    runtime = _need("onnxruntime")
    _need("onnx")
    _need("onnxscript")
    folder, name, readme = place(path, "model.onnx")
    graph = Graph(model)
    output = "tokens" if isinstance(model, MaskedAutoencoder) else "logits"
    usage = (
        f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{name}")\n'
        f'{output} = session.run(None, {{"image": images}})[0]  # images: numpy, float32'
    )
    size = sum(p.numel() * 4 for p in graph.parameters())
    with staged(folder) as stage:
        torch.onnx.export(
            graph,
            (graph.example(2),),
            stage / name,
            input_names=["image"],
            output_names=[output],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            opset_version=18,
            dynamo=True,
            external_data=size > ONNX_FILE_LIMIT,
            verbose=False,
        )
        _check_onnx(runtime, graph, stage / name)
        (stage / readme).write_text(_card(model, facts, "onnx", usage, encoder=True))
        names = sorted(file.name for file in stage.iterdir())
    return [folder / file for file in names]


def _check_onnx(runtime: Any, graph: Graph, path: Path) -> None:
    """Raises RuntimeError where onnxruntime computes something else, at another batch size than the traced one."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors alone: it warns of GPUs that it does not use here
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    images = graph.example(3)
    with torch.no_grad():
        expected = graph(images)
    found = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
    if not error < 1e-4:
        raise RuntimeError(f"The ONNX graph differs from the model by {error:.1e} of its largest output.")


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"This format needs the package {package}: pip install 'mae-experiments[export]'.") from error


FORMATS = {
    "timm": to_timm,
    "huggingface": to_huggingface,
    "reference": to_reference,
    "safetensors": to_safetensors,
    "onnx": to_onnx,
    "torch_export": to_torch_export,
}
