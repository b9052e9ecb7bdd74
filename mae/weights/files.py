"""Checkpoints of any origin, opened without running code: files, folders, and timm's hub."""

import argparse
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import yaml
from torch import nn

from mae.errors import UserError
from mae.runs.checkpoints import MANIFEST, PROBED_LAYER, WEIGHTS, checkpoints_of, damage
from mae.runs.files import read_json
from mae.runs.layout import CHECKPOINTS, CLASSES
from mae.weights import unpickle
from mae.weights.names import CONTAINERS, Content, State, WeightSet, select, state_dicts, without_wrappers
from mae.weights.remote import fetched

log = logging.getLogger(__name__)

WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
Settings = dict[str, object]  # of a file of JSON or YAML, or of a command line


@dataclass
class Metadata:
    """What the files beside the tensors say, each as it was written; empty where there is none."""

    config: Settings = field(default_factory=dict)  # config.json or a run's config.yaml
    args: Settings = field(default_factory=dict)  # the command line that a training script saved
    processor: Settings = field(default_factory=dict)  # Hugging Face's preprocessor_config.json
    epoch: object = None  # that a training script saved
    step: int | None = None  # of this project's checkpoints
    folder: str | None = None  # where files that `init` names by an address lie on this machine
    classes: list[str] = field(default_factory=list)  # names in the order of the logits


@dataclass
class Opened:
    """Tensors under their original names, and what the files beside them hold."""

    tensors: State
    origin: str  # "ours", "timm", "torch" or "safetensors"
    wrapper: str = ""  # the key that held the tensors, "" for a bare state dict
    meta: Metadata = field(default_factory=Metadata)
    notes: list[str] = field(default_factory=list)
    network: nn.Module | None = None  # timm's model object, where the weights came with it


def section(settings: Settings, key: str) -> Settings:
    """The settings under `key`, empty where there are none."""
    value = settings.get(key)
    return value if isinstance(value, dict) else {}


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
    ours = path.parent.name.startswith(("step_", "best")) and (path.parent / MANIFEST).is_file()
    if ours and not verified and (reason := damage(path.parent, [WEIGHTS])):
        raise UserError(f"init={path} is damaged: {reason}. Name an earlier checkpoint of the run.")
    if path.name.endswith(".index.json"):
        opened = _open_shards(path)
    elif path.suffix == ".safetensors":
        opened = _select(_load_safetensors(path), path, "safetensors")
        opened.meta.args = _header(path)
    else:
        opened = _select(_load_torch(path), path, "torch")
    if ours:
        opened.origin = "ours"
        manifest = read_json(path.parent / MANIFEST)
        opened.meta.step = manifest.get("step")
        if PROBED_LAYER in manifest:
            opened.meta.args[PROBED_LAYER] = manifest[PROBED_LAYER]
        opened.meta.config = _read_config(path.parent.parent.parent / "config.yaml")
    else:
        opened.meta.config = _read_config(path.parent / "config.json")
        opened.meta.processor = _read_config(path.parent / "preprocessor_config.json") or section(
            _read_config(path.parent / "processor_config.json"), "image_processor"
        )
        opened.meta.classes = _stated_classes(opened.meta.config) or _names(opened.meta.args.get("classes"))
        if "architecture" in opened.meta.config:  # timm's hub format
            opened.origin = "timm"
    folder = next((folder for folder in path.parents[:2] if folder.name == CHECKPOINTS), None)
    if folder is not None:
        opened.meta.classes = _names(_read_any(folder.parent / CLASSES))
    return opened


def _read_config(path: Path) -> Settings:
    config = _read_any(path)
    return config if isinstance(config, dict) else {}


def _read_any(path: Path) -> object:
    """What a file of JSON or YAML holds, or None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}, which describes a checkpoint, cannot be read: {error}") from error


def _names(value: object) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def _stated_classes(config: Settings) -> list[str]:
    """Class names of timm's config.json, or of Hugging Face's where they are not its own LABEL_0, LABEL_1 ..."""
    if names := _names(config.get("label_names")):
        return names
    numbered = section(config, "id2label")
    if any(not key.isdigit() or name == f"LABEL_{key}" for key, name in numbered.items()):
        return []
    return [str(numbered[key]) for key in sorted(numbered, key=int)]


def _open_shards(index: Path) -> Opened:
    """A Hugging Face folder whose weights are split over several files."""
    content: dict[object, object] = {}
    for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
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


def _header(path: Path) -> Settings:
    """What an export of this project says in a safetensors file's header; empty for other files."""
    with safetensors.safe_open(path, framework="pt") as file:
        stated = file.metadata() or {}
    if "library" not in stated:
        return {}
    try:
        return {key: json.loads(value) for key, value in stated.items() if key != "format"}
    except ValueError:
        return {}


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
