"""Files that map images to token ids: TorchScript and ONNX."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mae.errors import UserError


def open_tokenizer(path: Path, device: torch.device) -> Callable[[Tensor], object]:
    """A function of images (B, C, H, W) float32 in [0, 1] on `device`.

    Raises UserError where the file does not open, and the function where it refuses the images.
    """
    if not path.is_file():
        raise UserError(f"target.file={path} does not exist: name a TorchScript or an ONNX file.")
    tokenizer = _onnx(path) if path.suffix == ".onnx" else _torchscript(path, device)

    def ids(images: Tensor) -> object:
        try:
            return tokenizer(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # those of both libraries have no common base
            raise UserError(
                f"target.file={path} takes no images of {' x '.join(map(str, images.shape))} values: {reason(error)}. "
                "Set data.in_chans and data.img_size to those that it was made for, or name another file."
            ) from error

    return ids


def reason(error: Exception) -> str:
    """The sentence of a library's error; TorchScript's stands after its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    start = "RuntimeError: "
    return next((line.removeprefix(start) for line in lines if line.startswith(start)), lines[0]).rstrip(".")


def described(ids: object) -> str:
    """What a tokenizer gives, in words."""
    if not isinstance(ids, Tensor):
        return f"a {type(ids).__name__}"
    return f"{' x '.join(map(str, ids.shape))} values of {str(ids.dtype).removeprefix('torch.')}"


def _torchscript(path: Path, device: torch.device) -> Callable[[Tensor], object]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, and its files are there
            module = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(
            f"target.file={path} is no TorchScript file: save the tokenizer by torch.jit.save, or as FILE.onnx."
        ) from error

    def ids(images: Tensor) -> object:
        with torch.autocast(images.device.type, enabled=False):
            return module(images)

    return ids


def _onnx(path: Path) -> Callable[[Tensor], object]:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"target.file={path} needs onnxruntime: pip install onnxruntime.") from error
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise UserError(f"target.file={path} is no ONNX file that onnxruntime reads: {reason(error)}.") from error
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0]).to(images.device)
