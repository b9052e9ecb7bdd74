"""Which package may import which, and the style that a test can hold."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "mae").rglob("*.py"))

# Package or module of mae/ -> those that it may import. All may import `errors`; what is not named stands
# on that and on third parties alone.
BASE = {"config", "limits", "runs", "tasks.registry", "tracking"}
STEP = BASE | {"device", "distributed", "metrics", "models", "optim", "plan", "progress"}
MAY_IMPORT = {
    "config": {"plan", "runs", "tasks.registry"},
    "limits": {"runs"},
    "plan": {"tasks.registry"},
    "tracking": {"config", "runs", "tasks.registry"},
    "checkpoint": {"program", "runs"},
    "optim": {"device"},
    "data": {"config", "device", "limits", "program", "rng", "runs"},
    "metrics": {"device"},
    "models": {"device", "rng"},
    "weights": {"models", "runs"},
    "distributed": {"device", "models"},
    "perf": {"config", "device", "distributed", "limits", "models", "plan", "runs", "tasks.registry"},
    "report": {"config", "program", "runs", "tasks.registry", "tracking"},
    "tasks": STEP | {"checkpoint", "data", "report", "rng", "weights"},
    "step": STEP | {"training"},
    "instability": STEP | {"checkpoint", "data", "program", "step", "training"},
    "training": STEP | {"checkpoint", "data", "perf", "tasks", "weights"},
    "engine": STEP | {"checkpoint", "data", "perf", "report", "tasks", "training", "step", "instability"},
    "launch": BASE | {"distributed", "engine", "program", "report"},  # torch only in a run's own processes
    "tools": STEP | {"data", "launch", "perf", "program", "report", "tasks"},
    "__init__": {"tasks"},  # mae.load, within the function: `import mae` alone imports nothing
    # the names under which earlier versions are called: python -m mae.sweep ...
    "sweep": {"report"},
    "search": {"tools"},
    "dashboard": {"tools"},
    "cli": {"config", "launch", "program", "report", "tools"},
    "run": {"cli"},
}


def unit(path: Path) -> str:
    """The package or module of mae/ that a file belongs to; `run` for run.py."""
    first, *rest = path.relative_to(ROOT).with_suffix("").parts
    return _named([first, *rest]) if rest else first


def _named(module: Sequence[str]) -> str:
    """The unit of `mae.package.module`: its package, but for the registry of tasks, which stands alone."""
    return "tasks.registry" if tuple(module[1:3]) == ("tasks", "registry") else module[1]


WITHOUT_TORCH = [path for path in MODULES if unit(path) in ("config", "runs", "report", "tasks.registry")]


def imported_modules(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere in it, but for those that types alone need."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imported_units(path: Path) -> set[str]:
    parts = [module.split(".") for module in imported_modules(path)]
    return {_named(names) for names in parts if names[0] == "mae" and len(names) > 1}


@pytest.mark.parametrize("path", [ROOT / "run.py", *MODULES], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    allowed = MAY_IMPORT.get(unit(path), set()) | {unit(path), "errors"}
    assert imported_units(path) <= allowed, f"{path.relative_to(ROOT)} imports {imported_units(path) - allowed}"


def test_the_table_has_no_cycle():
    def reaches(start: str, goal: str, seen: frozenset[str] = frozenset()) -> bool:
        following = MAY_IMPORT.get(start, set()) - seen
        return goal in following or any(reaches(name, goal, seen | following) for name in following)

    assert not [name for name in MAY_IMPORT if reaches(name, name)]


@pytest.mark.parametrize("path", WITHOUT_TORCH, ids=lambda p: str(p.relative_to(ROOT)))
def test_config_runs_reports_and_the_registry_import_no_torch(path):
    assert not [module for module in imported_modules(path) if module.split(".")[0] in ("torch", "timm", "torchvision")]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_global_statement(path):
    assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Global)]


def test_the_train_loop_stays_short():
    tree = ast.parse((ROOT / "mae" / "engine.py").read_text())
    train = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert train.end_lineno is not None and train.end_lineno - train.lineno <= 70


@pytest.mark.parametrize("module", ["mae.cli", "mae"])
def test_checking_a_config_imports_nothing_heavy(module):
    heavy = {"torch", "wandb", "timm", "submitit"}
    code = f"import sys; import {module}; print(sorted({heavy} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
