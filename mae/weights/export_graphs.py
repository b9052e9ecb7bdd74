"""Exports as graphs, which need no code of this project: ONNX and torch.export.

A graph computes a classifier's logits (B, classes), or the tokens (B, 1 + L, D) of an autoencoder's encoder.
"""

import copy
import importlib
from pathlib import Path
from types import ModuleType

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.errors import UserError
from mae.models.mae import MaskedAutoencoder
from mae.models.vit import encoder_sizes
from mae.weights.export_card import Facts, card
from mae.weights.export_files import staged, target_of

ONNX_FILE_LIMIT = 1_900_000_000  # bytes: an ONNX file is one protobuf message, of less than 2 GiB


class Graph(nn.Module):
    """The model whose computation is recorded."""

    def __init__(self, model: nn.Module):
        super().__init__()
        assert isinstance(model, MaskedAutoencoder | VisionTransformer)
        self.model = copy.deepcopy(model).cpu().float()
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        return self.model.forward_features(image) if isinstance(self.model, MaskedAutoencoder) else self.model(image)

    def example(self, batch: int) -> Tensor:
        """Images (B, C, H, W) of noise, always the same."""
        sizes, generator = encoder_sizes(self.model), torch.Generator().manual_seed(0)
        return torch.randn(batch, sizes.in_chans, *sizes.img_size, generator=generator)


def to_torch_export(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """A `.pt2` program of torch.export: any batch size, no code of this project needed to run it."""
    folder, name, readme = target_of(path, "model.pt2")
    graph = Graph(model)
    program = torch.export.export(graph, (graph.example(2),), dynamic_shapes={"image": {0: torch.export.Dim("batch")}})
    usage = f'import torch\n\nmodel = torch.export.load("{name}").module()\noutput = model(images)'
    with staged(folder) as stage:
        torch.export.save(program, stage / name)
        (stage / readme).write_text(card(model, facts, "pytorch", usage, encoder_alone=True))
    return [folder / name, folder / readme]


def to_onnx(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """An ONNX graph for any batch size, checked with onnxruntime against PyTorch before it is put in place.

    Input `image` (B, C, H, W), normalised; output `logits` (B, classes), or `tokens` (B, 1 + L, D) of an
    autoencoder. Weights past 1.9 GB lie in a second file beside it, named `.data`.
    """
    runtime = _import("onnxruntime")
    _import("onnx")
    _import("onnxscript")
    folder, name, readme = target_of(path, "model.onnx")
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
        (stage / readme).write_text(card(model, facts, "onnx", usage, encoder_alone=True))
        names = sorted(file.name for file in stage.iterdir())
    return [folder / file for file in names]


def _check_onnx(runtime: ModuleType, graph: Graph, path: Path) -> None:
    """Raises RuntimeError where onnxruntime computes something else, at another batch size than the traced one."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors alone: it warns of GPUs that it does not use here
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    images = graph.example(3)
    with torch.no_grad():
        expected = graph(images)
    actual = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    error = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
    if not error < 1e-4:
        raise RuntimeError(f"The ONNX graph differs from the model by {error:.1e} of its largest output.")


def _import(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"This format needs the package {package}: pip install 'mae-experiments[export]'.") from error
