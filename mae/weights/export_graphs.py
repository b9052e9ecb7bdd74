"""Exports as graphs, which need no code of this project: ONNX and torch.export.

A graph computes a classifier's logits (B, classes), or the tokens (B, 1 + L, D) of an autoencoder's encoder. Of a
segmenter it computes the logits (B, classes, H, W) of images of any size, in a single pass.
"""

import copy
import importlib
import math
from pathlib import Path
from types import ModuleType

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.errors import UserError
from mae.models.mae import MaskedAutoencoder
from mae.models.segmenter import Segmenter
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
        sizes = encoder_sizes(self.model)
        self.sizes, self.channels, self.shapes = [sizes.img_size], sizes.in_chans, {0: torch.export.Dim("batch")}
        if isinstance(self.model, Segmenter):
            self._take_any_size(self.model)
        self.eval()

    def _take_any_size(self, model: Segmenter) -> None:
        """Height and width become multiples of a unit. `sizes` gets another size, which comes first."""
        model.any_size = True
        for module in [*model.modules()]:
            for name, child in module.named_children():
                if isinstance(child, nn.AdaptiveAvgPool2d):
                    assert isinstance(child.output_size, int)
                    setattr(module, name, MeansOfBins(child.output_size))
        units = [math.lcm(model.decode_head.unit, patch) for patch in encoder_sizes(model).patch_size]
        least = model.decode_head.smallest_grid
        for axis, unit, name in ((2, units[0], "rows"), (3, units[1], "columns")):
            self.shapes[axis] = unit * torch.export.Dim(name, min=least)
        height, width = self.sizes[0]
        self.sizes.insert(0, (height + units[0], width + 3 * units[1]))  # all numbers differ: none is a constant

    def forward(self, image: Tensor) -> Tensor:
        return self.model.forward_features(image) if isinstance(self.model, MaskedAutoencoder) else self.model(image)

    def example(self, batch: int, size: tuple[int, int] | None = None) -> Tensor:
        """Images (B, C, H, W) of noise, always the same; of the first of `sizes` where no size is asked for."""
        return torch.randn(batch, self.channels, *(size or self.sizes[0]), generator=torch.Generator().manual_seed(0))


class MeansOfBins(nn.Module):
    """nn.AdaptiveAvgPool2d as two matrix products, since ONNX has no such operation for images of any size."""

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        return self._weights(x, x.shape[-2]) @ x @ self._weights(x, x.shape[-1]).T

    def _weights(self, x: Tensor, side: int) -> Tensor:
        """Shares (bins, side) of the pixels of a side in each mean. Bins of neighbours may share a pixel."""
        number, pixel = torch.arange(self.bins)[:, None], torch.arange(side)[None]
        start, end = number * side // self.bins, ((number + 1) * side + self.bins - 1) // self.bins
        return ((pixel >= start) & (pixel < end)).to(x.dtype) / (end - start).to(x.dtype)


def to_torch_export(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """A `.pt2` program of torch.export: any batch size, no code of this project needed to run it.

    A segmenter's takes images of any size, as `to_onnx` says.
    """
    folder, name, readme = target_of(path, "model.pt2")
    graph = Graph(model)
    program = torch.export.export(graph, (graph.example(2),), dynamic_shapes={"image": graph.shapes})
    usage = f'import torch\n\nmodel = torch.export.load("{name}").module()\noutput = model(images)'
    with staged(folder) as stage:
        torch.export.save(program, stage / name)
        (stage / readme).write_text(card(model, facts, "pytorch", usage, encoder_alone=True))
    return [folder / name, folder / readme]


def to_onnx(model: nn.Module, path: str, facts: Facts) -> list[Path]:
    """An ONNX graph for any batch size, checked with onnxruntime against PyTorch before it is put in place.

    Input `image` (B, C, H, W), normalised; output `logits` (B, classes), or `tokens` (B, 1 + L, D) of an
    autoencoder. A segmenter's `image` is of any size whose sides are multiples of the patch (dpt: and of 32) and at
    least twice that (upernet: four times); its `logits` (B, classes, H, W) are of one pass. Weights past 1.9 GB lie in
    a second file beside it, named `.data`.
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
            dynamic_shapes={"image": graph.shapes},
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
    """Raises RuntimeError where onnxruntime computes something else, at another batch size than the traced one.

    A segmenter is compared at two sizes of images.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors alone: it warns of GPUs that it does not use here
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for size in graph.sizes:
        images = graph.example(3, size)
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
