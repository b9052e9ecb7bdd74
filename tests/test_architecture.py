"""Who may import whom, and the style that a test can hold."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "mae").rglob("*.py"))

# unit -> units it may import; what is not named stands on third parties alone
MAY_IMPORT = {
    "run": {
        "config",
        "inherit",
        "launch",
        "slurm",
        "dry_run",
        "sweep_names",
        "sweep",
        "compose",
        "overrides",
        "pipeline",
        "run_start",
    },
    "inherit": {"config", "compose", "overrides", "rules", "run_paths"},
    "launch": {
        "config",
        "inherit",
        "compose",
        "overrides",
        "schema",
        "rules",
        "pipeline",
        "report",
        "slurm",
        "local",
        "run_paths",
        "run_start",
    },
    "run_start": {"config", "compose", "overrides", "rules", "run_paths", "slurm", "track"},
    "run_paths": {"config"},
    "compose": {"overrides"},
    "versions": {"compose", "schema"},
    "sweep_names": {"overrides"},
    "local": {"distributed", "engine", "run_record"},  # in a worker
    "slurm": {"config", "overrides", "schema", "fence", "engine"},  # likewise
    "pipeline": {"config", "compose", "inherit", "overrides"},
    "config": {"rules", "ranges", "schema", "versions"},
    "dry_run": {
        "config",
        "schema",
        "rules",
        "tasks",
        "models",
        "data",
        "optim",
        "plan",
        "device",
        "forecast",
        "activations",
    },
    "forecast": {"plan"},
    "engine": {
        "setup",
        "schema",
        "data",
        "tasks",
        "checkpoint",
        "distributed",
        "sharding",
        "profiling",
        "device",
        "environment",
        "norms",
        "report",
        "track",
        "config",
        "fence",
    },
    "setup": {
        "tasks",
        "models",
        "data",
        "augment",
        "optim",
        "plan",
        "checkpoint",
        "distributed",
        "accelerate",
        "fitting",
        "sharding",
        "device",
        "track",
        "config",
    },
    "accelerate": {"models"},
    "fitting": {"activations", "distributed", "device", "rules", "config"},
    "sharding": {"models"},
    "sweep": {"sweep_names", "sweep_figure", "report", "run_record", "run_paths", "page", "config", "overrides"},
    "sweep_figure": {"published"},
    "search": {"config", "inherit", "search_trial", "sweep", "compose", "launch", "overrides", "pipeline"},
    "search_trial": {"overrides", "track"},
    "dashboard": {"config"},
    "report": {"run_record", "page", "track", "config"},
    "run_record": {"track", "compose", "config", "overrides"},
    "tasks": {
        "inherit",
        "pipeline",
        "models",
        "data",
        "augment",
        "metrics",
        "masking",
        "pictures",
        "config",
        "device",
        "optim",
        "plan",
        "checkpoint",
        "rules",
        "geometry",
        "sharding",
    },
    "data": {"augment", "chance", "compose", "geometry"},
    "augment": {"chance", "geometry"},
    "distributed": {"device", "watchdog", "sharding"},
    "device": {"allocator"},
    "optim": {"device"},
    "track": {"config", "fence", "tracker", "track_wandb", "track_tensorboard"},
    "checkpoint": {"fence"},
    "track_wandb": {"tracker"},
    "track_tensorboard": {"tracker"},
}


def unit(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.stem if len(relative.parts) <= 2 else relative.parts[1]


def imports(path: Path) -> set[str]:
    """Units of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mae":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("mae.")}
    return found


@pytest.mark.parametrize("path", [ROOT / "run.py", *MODULES], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    allowed = MAY_IMPORT.get(unit(path), set()) | {unit(path)}
    assert imports(path) <= allowed, f"{path.relative_to(ROOT)} imports {imports(path) - allowed}"


def test_the_table_has_no_cycle():
    def reaches(start: str, goal: str, seen: frozenset[str] = frozenset()) -> bool:
        following = MAY_IMPORT.get(start, set()) - seen
        return goal in following or any(reaches(n, goal, seen | following) for n in following)

    assert not [name for name in MAY_IMPORT if reaches(name, name)]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_global_statement(path):
    assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Global)]


def test_the_train_loop_stays_short():
    tree = ast.parse((ROOT / "mae" / "engine.py").read_text())
    train = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert train.end_lineno is not None and train.end_lineno - train.lineno <= 70


def test_checking_a_config_imports_nothing_heavy():
    import subprocess
    import sys

    heavy = {"torch", "wandb", "timm", "submitit"}
    code = f"import sys; import run; print(sorted({heavy} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
