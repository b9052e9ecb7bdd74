"""Opening checkpoints of any origin without running code: files, folders, and timm's hub."""

import argparse
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import yaml
from torch import Tensor, nn

from mae.weights import names, unpickle

log = logging.getLogger(__name__)

WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


@dataclass
class Opened:
    """Tensors under the names of whoever wrote them, and what else lay beside them."""

    tensors: dict[str, Tensor]
    origin: str  # "ours", "timm", "torch" or "safetensors"
    wrapper: str = ""  # the key that held the tensors, "" for a bare state dict
    config: dict[str, Any] = field(default_factory=dict)  # config.json or a run's config.yaml
    args: dict[str, Any] = field(default_factory=dict)  # the command line that a training script saved
    counters: dict[str, Any] = field(default_factory=dict)  # epoch or step
    processor: dict[str, Any] = field(default_factory=dict)  # Hugging Face's preprocessor_config.json
    notes: list[str] = field(default_factory=list)
    network: nn.Module | None = None  # timm's model object, where the weights came with it


def open_checkpoint(path: str) -> Opened:
    """Opens a run directory, a checkpoint folder or file, or `timm:NAME`. Raises ValueError if it cannot."""
    if path.startswith("timm:"):
        return _open_timm(path.removeprefix("timm:"))
    if re.match(r"https?://", path):
        raise ValueError(f"init={path} is an address: download the file first, then name the file.")
    place = Path(path).expanduser()
    if not place.exists():
        raise ValueError(
            f"init={path} does not exist. Name a run directory, a checkpoint folder or file, or timm:NAME."
        )
    if place.is_symlink() and place.resolve().suffix == place.suffix:  # checkpoints/best, no file of the Hub's cache
        place = place.resolve()
    return _open_folder(place) if place.is_dir() else _open_file(place)


def _open_folder(folder: Path) -> Opened:
    if (folder / "checkpoints").is_dir():
        return _open_run(folder)
    for name in WEIGHTS:
        if (folder / name).is_file():
            return _open_file(folder / name)
    raise ValueError(
        f"init={folder} holds no checkpoint: a run has checkpoints/, other folders have one of {', '.join(WEIGHTS)}."
    )


def _open_run(run: Path) -> Opened:
    notes = []
    for folder in sorted((run / "checkpoints").glob("step_*"), reverse=True):
        if reason := _damage(folder):
            notes.append(f"{folder.name} was passed over: {reason}.")
            log.warning("init=%s: passing over %s: %s", run, folder.name, reason)
            continue
        opened = _open_file(folder / "model.safetensors")
        opened.notes[:0] = notes
        return opened
    raise ValueError(" ".join([f"init={run} is a run without a whole checkpoint.", *notes]))


def _damage(folder: Path) -> str:
    """Why the weights of one of our checkpoints are not what was written, or ""."""
    weights = folder / "model.safetensors"
    try:
        stored = json.loads((folder / "manifest.json").read_text())["files"][weights.name]
        if weights.stat().st_size != stored["bytes"]:
            return "its weights are truncated"
        digest = hashlib.sha256()
        with weights.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return "" if digest.hexdigest() == stored["sha256"] else "the checksum of its weights differs"
    except (OSError, KeyError, TypeError, ValueError) as error:
        return f"it is not whole ({type(error).__name__})"


def _open_file(path: Path) -> Opened:
    ours = path.parent.name.startswith(("step_", "best")) and (path.parent / "manifest.json").is_file()
    if ours and (reason := _damage(path.parent)):
        raise ValueError(f"init={path} is damaged: {reason}. Name an earlier checkpoint of the run.")
    if path.name.endswith(".index.json"):
        opened = _open_shards(path)
    elif path.suffix == ".safetensors":
        opened = _select(_load_safetensors(path), path, "safetensors")
        opened.args = _metadata(path)
    else:
        opened = _select(_load_torch(path), path, "torch")
    if ours:
        opened.origin = "ours"
        opened.counters = {"step": json.loads((path.parent / "manifest.json").read_text()).get("step")}
        opened.config = _read_config(path.parent.parent.parent / "config.yaml")
    else:
        opened.config = _read_config(path.parent / "config.json")
        opened.processor = _read_config(path.parent / "preprocessor_config.json") or (
            _read_config(path.parent / "processor_config.json").get("image_processor") or {}
        )
        if "architecture" in opened.config:  # timm's hub format
            opened.origin = "timm"
    return opened


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}, which describes a checkpoint, cannot be read: {error}") from error
    return config if isinstance(config, dict) else {}


def _open_shards(index: Path) -> Opened:
    """A Hugging Face folder whose weights are cut into several files."""
    tensors: dict[str, Any] = {}
    for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        part = index.parent / Path(name).name
        if not part.is_file():
            raise ValueError(f"init={index.parent} lacks {name}: copy the whole folder.")
        tensors |= _load_safetensors(part) if part.suffix == ".safetensors" else _load_torch(part)
    return _select(tensors, index, "safetensors")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"init={path} is truncated or not a safetensors file ({error}).") from error


def _metadata(path: Path) -> dict[str, Any]:
    """What an export of ours says in a safetensors file's header; {} of other files."""
    with safetensors.safe_open(path, framework="pt") as file:
        stated = file.metadata() or {}
    if "library" not in stated:
        return {}
    try:
        return {key: json.loads(value) for key, value in stated.items() if key != "format"}
    except ValueError:
        return {}


def _load_torch(path: Path) -> Mapping[Any, Any]:
    """What a training script saved with `torch.save`."""
    content, unread = unpickle.load(path)
    if unread:
        log.info("init=%s: objects of %s in the file are not read", path, ", ".join(unread[:5]))
    if isinstance(content, unpickle.Inert):
        raise ValueError(_object(f"init={path} holds", content))
    if not isinstance(content, Mapping):
        raise ValueError(f"init={path} is not a checkpoint: it holds a {type(content).__name__}.")
    return content


def _select(content: Mapping[Any, Any], path: Path, origin: str) -> Opened:
    """The weights in what a file holds, and what it says of their training."""
    weights, notes = names.select(content, path)
    if weights is None:  # no vision transformer: its names go into the message
        states = names.states(content)
        choices = [names.Weights(keys, "", names.clean(state, path)) for keys, state in states]
        weights = max(choices, key=lambda choice: len(choice.tensors), default=None)
    if weights is None:
        for key, value in content.items():
            if isinstance(value, unpickle.Inert) and key in names.CONTAINERS:
                raise ValueError(_object(f"init={path} holds under {key!r}", value))
        raise ValueError(f"init={path} is not a checkpoint: it holds no tensors under names.")
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return Opened(
        weights.tensors,
        origin,
        wrapper=weights.keys[0] if weights.keys else "",
        args=dict(args) if isinstance(args, Mapping) else {},
        counters={"epoch": content["epoch"]} if weights.keys and "epoch" in content else {},
        notes=notes,
    )


def _object(start: str, value: unpickle.Inert) -> str:
    kind = f"{type(value).__module__}.{type(value).__name__}"
    return f"{start} an object of class {kind}, whose code is never run: save its state_dict() with torch.save."


def _open_timm(name: str) -> Opened:
    """Pretrained weights of timm's collection, fetched through its hub and kept in its cache."""
    if ":" not in name and not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(pretrained=True), 1)
        raise ValueError(
            f"init=timm:{name} is no model of timm {timm.__version__}."
            + (f" Did you mean timm:{near[0]}?" if near else "")
        )
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"init=timm:{name} could not be fetched ({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
            "Where there is no network, download its model.safetensors and config.json and name the folder."
        ) from error
    stated = getattr(model, "pretrained_cfg", None) or {}
    config = {"pretrained_cfg": {key: stated.get(key) for key in ("mean", "std", "crop_pct", "interpolation")}}
    return Opened(model.state_dict(), "timm", config=config, network=model)
