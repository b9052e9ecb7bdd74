"""Files that map images to token ids: TorchScript and ONNX."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mae.errors import UserError


def open_tokenizer(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function of images (B, C, H, W) float32 in [0, 1] on `device`. Raises UserError where it does not open."""
    if not path.is_file():
        raise UserError(f"target.file={path} does not exist: name a TorchScript or an ONNX file.")
    return _onnx(path) if path.suffix == ".onnx" else _torchscript(path, device)


def _torchscript(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, and its files are there
            module = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(
            f"target.file={path} is no TorchScript file: save the tokenizer by torch.jit.save, or as FILE.onnx."
        ) from error

    def ids(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return module(images)

    return ids


def _onnx(path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"target.file={path} needs onnxruntime: pip install onnxruntime.") from error
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"target.file={path} is no ONNX file that onnxruntime reads: {reason}") from error
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0]).to(images.device)
