"""The schema of a config: keys and types, read from the signatures of what is built from it.

They are read from the source (`ast`), so that a config is checked before anything heavy is imported.
"""

import ast
import difflib
import functools
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Where a group's keys are declared: functions whose keyword-only parameters they are.
# [name] stands for the entry that the group's `name` chooses from a table, or from one of several (a|b).
SCHEMA = {
    "model": ["models.mae:MaskedAutoencoder"],
    "data": ["data:SOURCES[name]", "data.loader:Loader", "data:describe"],
    "augmentation": ["data.transforms:AUGMENTATIONS[name]"],
    "optimizer": ["optim:OPTIMIZERS[name]", "optim:param_groups", "optim:Schedule"],
    "task": ["tasks:TASKS|launch.pipeline:TASKS[name]"],
    "launcher": ["launch.launch:LAUNCHERS[name]", "distributed.ranks:start"],
    "wandb": ["tracking.wandb:wandb_tracker"],
    "checkpoint": ["checkpoint:Checkpoints"],
    "estimate": ["tools.cost:forecast"],
}
TRAINED = ("pretrain", "finetune", "linprobe")  # tasks that go through engine.train
TRAIN_SCHEMA = ["plan:make_plan", "training:set_up", "engine:train", "perf.compile:accelerate"]
TOP = ast.parse(
    "def top(*, seed: int, output_dir: str | None, init: str | None, resume: str | None,"
    " dry_run: bool, tensorboard: bool, device: Literal['auto', 'cpu', 'cuda', 'mps']): ..."
).body[0]
# What may change between two starts of one run: where and how it runs, not what it computes.


# ---------------------------------------------------------------- signatures, read from the source


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
def table(where: str) -> dict[str, str]:
    """Names that a table such as `optim:OPTIMIZERS` offers -> `module:callable` of each; `a|b` are two tables."""
    if "|" in where:
        first, others = where.split("|", 1)
        return table(first) | table(others)
    module, node = _find(*where.split(":"))
    assert isinstance(node, ast.Dict)
    found = {}
    for key, value in zip(node.keys, node.values, strict=True):
        assert isinstance(key, ast.Constant) and isinstance(value, ast.Name)
        found[str(key.value)] = f"{module}:{value.id}"
    return found


def keyword_only(node: ast.AST) -> dict[str, Any]:
    if isinstance(node, ast.ClassDef):
        node = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    assert isinstance(node, ast.FunctionDef)
    names = vars(typing) | {"__builtins__": __builtins__}
    return {
        arg.arg: eval(compile(ast.Expression(arg.annotation), "<annotation>", "eval"), names)  # type: ignore[arg-type]
        for arg in node.args.kwonlyargs
    }


@functools.cache
def signature(where: str) -> dict[str, Any]:
    """Key -> type of what `module:callable` takes from a config."""
    return keyword_only(_find(*where.split(":"))[1])


def schema(group: str, name: str | None) -> dict[str, Any]:
    """Key -> type of a whole group, for the choice `name`."""
    places = SCHEMA[group] + (TRAIN_SCHEMA if group == "task" and name in TRAINED else [])
    found: dict[str, Any] = {"name": str} if any("[name]" in p for p in places) or group == "model" else {}
    for place in places:
        if place.endswith("[name]"):
            place = table(place.removesuffix("[name]"))[str(name)]
        found |= signature(place)
    if group == "model":
        found.pop("norm_pix_loss")  # belongs to the task, with the reference's name for it
    return found


# ---------------------------------------------------------------- values and types


def near(word: str, known: list[str] | tuple[str, ...]) -> str:
    """' Did you mean X?' where one of the known words is close."""
    match = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.55)
    return f" Did you mean {match[0]}?" if match else ""


def describe(hint: Any) -> str:
    """A type in words."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(describe(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list, each {describe(typing.get_args(hint)[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words |= {type(None): "null", dict: "a mapping", list: "a list"}
    return words[hint]


def conform(value: Any, hint: Any) -> Any:
    """The value as the type wants it (int -> float, 'None' -> None); raises TypeError where it is none."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        # W&B's agent hands None over as a word
        if types.NoneType in args and (value is None or value in ("None", "null")):
            return None
        for arg in sorted(args, key=lambda a: a is str):
            try:
                return conform(value, arg)
            except TypeError:
                continue
        raise TypeError
    if origin is typing.Literal:
        for arg in args:
            if type(value) is type(arg) and value == arg:
                return value
        raise TypeError
    if origin is list and isinstance(value, list):
        return [conform(item, args[0]) for item in value]
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is dict and isinstance(value, Mapping):
        return dict(value)
    if hint in (int, bool, str, types.NoneType, list) and type(value) is hint:
        return value
    raise TypeError
