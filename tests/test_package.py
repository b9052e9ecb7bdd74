"""The wheel and the sdist: what is in them, and that an environment with nothing else of ours runs the command."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, TINY_PRETRAIN

pytestmark = pytest.mark.slow


def build(project: Path, target: str, folder: Path) -> Path:
    """The file that hatchling makes of a project: its `wheel` or `sdist`."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install -e '.[test]'")
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def installed(wheel: Path, environment: Path) -> Path:
    """The `bin` of a new environment with the wheel; of this environment it sees the dependencies, and not our code.

    A folder that a .pth file names is searched, but the .pth files in it are not read: one of those is what an
    editable installation consists of.
    """
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return environment / "bin"


def test_the_sdist_makes_the_same_wheel(wheel, tmp_path):
    sdist = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (project,) = tmp_path.glob("mae_experiments-*")
    assert names(build(project, "wheel", tmp_path / "wheel")) == names(wheel)
    assert (project / "tests" / "axe" / "axe.min.js").exists() and (project / "docs" / "hooks.py").exists()


def test_the_wheel_holds_configs_sweeps_and_the_charts_library_with_its_licence(wheel):
    inside = names(wheel)
    ours = {f"mae/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    ours |= {f"mae/conf/{path.relative_to(ROOT)}" for path in (ROOT / "sweeps").rglob("*.yaml")}
    ours |= {str(path.relative_to(ROOT)) for path in (ROOT / "mae" / "report" / "web").rglob("*") if path.is_file()}
    assert ours <= inside and "mae/report/web/uplot/LICENSE" in ours
    assert not [name for name in inside if name.startswith(("tests/", "benchmarks/"))]


def test_the_installed_wheel_pretrains_from_another_directory(wheel, tmp_path):
    programs = installed(wheel, tmp_path / "environment")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def typed(*words: str) -> str:
        done = subprocess.run(words, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    python, mae = str(programs / "python"), str(programs / "mae")
    where = typed(python, "-c", "import mae.config.compose as compose; print(compose.CONF)")
    assert where.startswith(str(tmp_path / "environment")) and where.strip().endswith("mae/conf")
    version = wheel.name.split("-")[1]
    assert typed(mae, "--version") == f"mae {version}\n"
    last = typed(mae, *TINY_PRETRAIN, "task.max_steps=2", "output_dir=first").splitlines()[-1]
    assert last.startswith("val_loss ") and last.endswith("first")
    assert json.loads((elsewhere / "first" / "summary.json").read_text())["steps"] == 2
    assert "The MIT License" in (elsewhere / "first" / "report.html").read_text()
    (row,) = json.loads(typed(mae, "runs", ".", "--json"))
    assert (row["run"], row["state"]) == ("first", "finished")
