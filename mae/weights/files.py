"""Checkpoints of any origin, opened without running code: files, folders, and timm's hub."""

import argparse
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import safetensors
import safetensors.torch
import timm
from torch import nn

from mae.errors import UserError
from mae.runs.checkpoints import WEIGHTS, checkpoints_of, damage
from mae.weights import unpickle
from mae.weights.metadata import (
    Metadata,
    add_manifest,
    add_settings,
    export_header,
    is_checkpoint,
    read_settings,
    section,
)
from mae.weights.names import CONTAINERS, Content, State, WeightSet, select, state_dicts, without_wrappers
from mae.weights.remote import fetched

log = logging.getLogger(__name__)

WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


@dataclass
class Opened:
    """Tensors under their original names, and what the files beside them hold."""

    tensors: State
    origin: str  # "ours", "timm", "torch" or "safetensors"
    wrapper: str = ""  # the key that held the tensors, "" for a bare state dict
    meta: Metadata = field(default_factory=Metadata)
    notes: list[str] = field(default_factory=list)
    network: nn.Module | None = None  # timm's model object, where the weights came with it


def open_checkpoint(path: str) -> Opened:
    """Opens a run directory, a checkpoint folder or file, or a name such as `timm:NAME`. Raises UserError."""
    if path.startswith("timm:"):
        return _open_timm(path.removeprefix("timm:"))
    if (folder := fetched(path)) is not None:
        opened = _open_folder(Path(folder))
        opened.meta.folder = folder
        return opened
    if re.match(r"https?://", path):
        raise UserError(f"init={path} is an address: download the file first, then name the file.")
    location = Path(path).expanduser()
    if not location.exists():
        raise UserError(
            f"init={path} does not exist. Name a run directory, a checkpoint folder or file, timm:NAME or hf://USER/NAME."
        )
    if location.is_symlink() and location.resolve().suffix == location.suffix:
        location = location.resolve()  # checkpoints/best; files of the Hub's cache have no suffix
    return _open_folder(location) if location.is_dir() else _open_file(location)


def _open_folder(folder: Path) -> Opened:
    if (folder / "checkpoints").is_dir():
        return _open_run(folder)
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return _open_file(folder / name)
    raise UserError(
        f"init={folder} holds no checkpoint: a run has checkpoints/, "
        f"other folders have one of {', '.join(WEIGHT_FILES)}."
    )


def _open_run(run: Path) -> Opened:
    notes = []
    for folder in reversed(checkpoints_of(run)):
        if reason := damage(folder, [WEIGHTS]):
            notes.append(f"{folder.name} was passed over: {reason}.")
            log.warning("init=%s: passing over %s: %s", run, folder.name, reason)
            continue
        opened = _open_file(folder / WEIGHTS, verified=True)
        opened.notes[:0] = notes
        return opened
    raise UserError(" ".join([f"init={run} is a run without a whole checkpoint.", *notes]))


def _open_file(path: Path, verified: bool = False) -> Opened:
    ours = is_checkpoint(path.parent)
    if ours and not verified and (reason := damage(path.parent, [WEIGHTS])):
        raise UserError(f"init={path} is damaged: {reason}. Name an earlier checkpoint of the run.")
    if path.name.endswith(".index.json"):
        opened = _open_shards(path)
    elif path.suffix == ".safetensors":
        opened = _select(_load_safetensors(path), path, "safetensors")
        opened.meta.args = export_header(path)
    else:
        opened = _select(_load_torch(path), path, "torch")
    if ours:
        opened.origin = "ours"
        add_manifest(opened.meta, path.parent)
    else:
        add_settings(opened.meta, path.parent)
        if "architecture" in opened.meta.config:  # timm's hub format
            opened.origin = "timm"
    return opened


def _open_shards(index: Path) -> Opened:
    """A Hugging Face folder whose weights are split over several files."""
    content: dict[object, object] = {}
    names = section(read_settings(index), "weight_map").values()
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"init={index} does not name the file of each tensor in its weight_map: copy the folder again.")
    for name in sorted(set(map(str, names))):
        shard = index.parent / Path(name).name
        if not shard.is_file():
            raise UserError(f"init={index.parent} lacks {name}: copy the whole folder.")
        content |= _load_safetensors(shard) if shard.suffix == ".safetensors" else _load_torch(shard)
    return _select(content, index, "safetensors")


def _load_safetensors(path: Path) -> Content:
    try:
        return {**safetensors.torch.load_file(path)}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"init={path} is truncated or not a safetensors file ({error}).") from error


def _load_torch(path: Path) -> Content:
    """What a training script saved with `torch.save`."""
    content, unread = unpickle.load_torch_file(path)
    if unread:
        log.info("init=%s: objects of %s in the file are not read", path, ", ".join(unread[:5]))
    if isinstance(content, unpickle.Inert):
        raise UserError(_object(f"init={path} holds", content))
    if not isinstance(content, Mapping):
        raise UserError(f"init={path} is not a checkpoint: it holds a {type(content).__name__}.")
    return content


def _select(content: Content, path: Path, origin: str) -> Opened:
    """The weights in what a file holds, and what it says of their training."""
    weights, notes = select(content, path)
    if weights is None:  # no vision transformer: its names go into the message
        choices = [WeightSet(keys, "", without_wrappers(state, path)) for keys, state in state_dicts(content)]
        weights = max(choices, key=lambda choice: len(choice.tensors), default=None)
    if weights is None:
        for key, value in content.items():
            if isinstance(value, unpickle.Inert) and key in CONTAINERS:
                raise UserError(_object(f"init={path} holds under {key!r}", value))
        raise UserError(f"init={path} is not a checkpoint: it holds no tensors under names.")
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    meta = Metadata(args=dict(args) if isinstance(args, Mapping) else {})
    if weights.keys:
        meta.epoch = content.get("epoch")
    return Opened(weights.tensors, origin, weights.keys[0] if weights.keys else "", meta, notes)


def _object(start: str, value: unpickle.Inert) -> str:
    kind = f"{type(value).__module__}.{type(value).__name__}"
    return f"{start} an object of class {kind}, whose code is never run: save its state_dict() with torch.save."


def _open_timm(name: str) -> Opened:
    """Pretrained weights of timm's collection, fetched through its hub and kept in its cache."""
    if ":" not in name and not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(pretrained=True), 1)
        raise UserError(
            f"init=timm:{name} is no model of timm {timm.__version__}."
            + (f" Did you mean timm:{near[0]}?" if near else "")
        )
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"init=timm:{name} could not be fetched ({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
            "Where there is no network, download its model.safetensors and config.json and name the folder."
        ) from error
    stated = getattr(model, "pretrained_cfg", None) or {}
    images = {key: stated.get(key) for key in ("mean", "std", "crop_pct", "interpolation")}
    return Opened(model.state_dict(), "timm", meta=Metadata({"pretrained_cfg": images}), network=model)
