"""The schema of a config: keys and types, read from the signatures of what is built from it.

A key is a keyword-only parameter, or a field of a dataclass that is the annotation of one (or stands in SCHEMA). They
are read from the source (`ast`), so that a config is checked before anything heavy is imported.
"""

import ast
import builtins
import functools
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mae.tasks import registry

ROOT = Path(__file__).parents[1]

# Where a group's keys are declared: functions whose keyword-only parameters they are, or dataclasses.
# [name] stands for the entry that the group's `name` chooses from a table.
SCHEMA = {
    "model": ["models.mae:MaskedAutoencoder"],
    "data": ["data:SOURCES[name]", "data.settings:LoaderSettings", "data.settings:DataInfo"],
    "augmentation": ["data.transforms:AUGMENTATIONS[name]"],
    "masking": ["models.masking:MASKINGS[name]"],
    "target": ["models.targets:TARGETS[name]"],
    "optimizer": ["optim:OPTIMIZERS[name]", "optim:param_groups", "optim:Schedule"],
    "task": ["tasks.registry:TASKS[name]"],
    "launcher": ["launch.launch:LAUNCHERS[name]", "distributed.ranks:start"],
    "wandb": ["tracking.wandb:wandb_tracker"],
    "checkpoint": ["checkpoint:Checkpoints"],
    "estimate": ["tools.cost:estimate_cost"],
}
TRAIN_SCHEMA = ["plan:make_plan", "training:set_up", "engine:train", "perf.compile:accelerate"]
TOP = "config.schema:TopLevel"
TYPING = vars(typing)


@dataclass(frozen=True)
class TopLevel:
    """The keys that belong to no group."""

    seed: Annotated[int, "[0, 4294967295]"]
    output_dir: str | None
    init: str | None
    resume: str | None
    replay: str | None
    dry_run: bool
    tensorboard: bool
    device: Literal["auto", "cpu", "cuda", "mps"]


# ---------------------------------------------------------------- definitions, read from the source


@functools.cache
def _module(name: str) -> ast.Module:
    path = ROOT / name.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text())


def _find(module: str, name: str) -> tuple[str, ast.AST]:
    """The definition of `name`, following `from mae.x import name`."""
    for node in _module(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return module, node.value
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mae"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find((node.module or "").removeprefix("mae").removeprefix("."), alias.name)
    raise AssertionError(f"{name} is not defined in mae.{module}")


@functools.cache
def table(entry: str) -> dict[str, str]:
    """Names that a table such as `optim:OPTIMIZERS` offers -> `module:callable` of each."""
    if entry == "tasks.registry:TASKS":
        return {name: entry.path for name, entry in registry.TASKS.items()}
    module, node = _find(*entry.split(":"))
    assert isinstance(node, ast.Dict)
    entries = {}
    for key, value in zip(node.keys, node.values, strict=True):
        assert isinstance(key, ast.Constant) and isinstance(value, ast.Name)
        entries[str(key.value)] = f"{module}:{value.id}"
    return entries


def _keys(module: str, node: ast.AST) -> dict[str, Any]:
    """Key -> type of a function's keyword-only parameters, of those of a class, or of a dataclass's fields."""
    if isinstance(node, ast.ClassDef) and not any("dataclass" in ast.unparse(name) for name in node.decorator_list):
        node = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    keys: dict[str, Any] = {}
    if isinstance(node, ast.ClassDef):
        for base in node.bases:
            keys |= _keys(*_find(module, ast.unparse(base)))
        declared = [(ast.unparse(n.target), n.annotation) for n in node.body if isinstance(n, ast.AnnAssign)]
    else:
        assert isinstance(node, ast.FunctionDef)
        declared = [(arg.arg, arg.annotation) for arg in node.args.kwonlyargs if arg.annotation is not None]
    for name, annotation in declared:
        if isinstance(annotation, ast.Name) and isinstance(_meaning(module, annotation.id), ast.ClassDef):
            keys |= _keys(*_find(module, annotation.id))
        else:
            keys[name] = _type(module, annotation)
    return keys


def _meaning(module: str, name: str) -> ast.AST | None:
    """The definition of a name of ours; None for one of Python's."""
    return None if hasattr(builtins, name) or name in TYPING else _find(module, name)[1]


def _type(module: str, annotation: ast.AST) -> Any:
    """The type that an annotation means; it may name others, as `Size = int | list[int]`."""
    assert isinstance(annotation, ast.expr)
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    aliases = {name: _type(*_find(module, name)) for name in names if _meaning(module, name) is not None}
    return eval(compile(ast.Expression(annotation), "<annotation>", "eval"), TYPING | aliases)


@functools.cache
def signature(entry: str) -> dict[str, Any]:
    """Key -> type of what `module:callable` takes from a config."""
    return _keys(*_find(*entry.split(":")))


def schema(group: str, name: str | None) -> dict[str, Any]:
    """Key -> type of a whole group, for the choice `name`."""
    entries = SCHEMA[group] + (TRAIN_SCHEMA if group == "task" and name in registry.names(trains=True) else [])
    keys: dict[str, Any] = {"name": str} if any("[name]" in e for e in entries) or group == "model" else {}
    for entry in entries:
        if entry.endswith("[name]"):
            entry = table(entry.removesuffix("[name]"))[str(name)]
        keys |= signature(entry)
    if group == "model":
        keys.pop("norm_pix_loss")  # belongs to the task, with the reference's name for it
    return keys
