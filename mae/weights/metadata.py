"""What the files beside a checkpoint's tensors say: a run's, Hugging Face's, timm's, and the headers of our exports."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import yaml

from mae.errors import UserError
from mae.runs.checkpoints import BEST, CLASS_NAMES, MANIFEST, PROBED_LAYER, RUN_CONFIG, WEIGHTS
from mae.runs.files import read_json
from mae.runs.layout import CHECKPOINTS, CLASSES, CONFIG

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


def section(settings: Settings, key: str) -> Settings:
    """The settings under `key`, empty where there are none."""
    value = settings.get(key)
    return value if isinstance(value, dict) else {}


def add_manifest(meta: Metadata, checkpoint: Path) -> None:
    """Adds what the manifest of a checkpoint says, or where an earlier version wrote it the run around it."""
    manifest = read_json(checkpoint / MANIFEST)
    meta.step = manifest.get("step")
    if PROBED_LAYER in manifest:
        meta.args[PROBED_LAYER] = manifest[PROBED_LAYER]
    meta.config = section(manifest, RUN_CONFIG) or _config_of_run(checkpoint)
    meta.classes = classes_of(checkpoint)


def classes_of(checkpoint: Path) -> list[str]:
    """The class names in a checkpoint, or where an earlier version wrote it in the run around it."""
    return _names(read_json(checkpoint / MANIFEST).get(CLASS_NAMES)) or _classes_of_run(checkpoint)


def add_settings(meta: Metadata, folder: Path) -> None:
    """Adds what a folder of another library says, and a run in whose `checkpoints` the file lies."""
    meta.config = read_settings(folder / "config.json")
    meta.processor = read_settings(folder / "preprocessor_config.json") or section(
        read_settings(folder / "processor_config.json"), "image_processor"
    )
    stated = _stated_classes(meta.config) or _names(meta.args.get("classes"))
    meta.classes = _classes_of_run(folder) or stated


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of ours, under its own name or another."""
    named = folder.name.startswith(("step_", BEST)) and (folder / MANIFEST).is_file()
    return named or WEIGHTS in section(read_json(folder / MANIFEST), "files")


def _config_of_run(checkpoint: Path) -> Settings:
    """The config of the run in which a checkpoint's folder lies; empty where it lies in none."""
    run = checkpoint.parent.parent
    return read_settings(run / CONFIG) if checkpoint.parent.name == CHECKPOINTS else {}


def _classes_of_run(folder: Path) -> list[str]:
    """The names in classes.json of a run whose `checkpoints` this folder is or lies in; empty where there is none."""
    checkpoints = next((each for each in (folder, folder.parent) if each.name == CHECKPOINTS), None)
    return [] if checkpoints is None else _names(_read_any(checkpoints.parent / CLASSES))


def read_settings(path: Path) -> Settings:
    """What a file of JSON or YAML holds under names; empty where there is none. Raises UserError."""
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
    if any(not key.isdecimal() or name == f"LABEL_{key}" for key, name in numbered.items()):
        return []
    return [str(numbered[key]) for key in sorted(numbered, key=int)]


def export_header(path: Path) -> Settings:
    """What an export of this project says in a safetensors file's header; empty for other files."""
    with safetensors.safe_open(path, framework="pt") as file:
        stated = file.metadata() or {}
    if "library" not in stated:
        return {}
    try:
        return {key: json.loads(value) for key, value in stated.items() if key != "format"}
    except ValueError:
        return {}
