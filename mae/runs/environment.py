"""What a run ran on: versions, devices, the code's revision."""

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from mae.runs.files import write_text
from mae.runs.layout import ENVIRONMENT

PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "numpy", "wandb")


def environment(device: str, cuda: str | None, world: int) -> dict[str, Any]:
    """Versions and devices of this start of a run; `cuda` is the version that torch was built for, None on a CPU."""
    about = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "device": device,
        "processes": world,
        "code": revision(),
    }
    if cuda is not None:
        about["cuda"] = cuda
    job = os.environ.get("SLURM_JOB_ID")
    return about | ({"slurm job": job} if job else {}) | {name: version(name) for name in PACKAGES}


def revision() -> str | None:
    """The git commit of this code, with a plus where files differ from it; None outside of a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # an installed package may lie in the repository of other code
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def keep(run: Path, device: str, cuda: str | None, world: int) -> None:
    """Adds this start to the run's record."""
    path, record = run / ENVIRONMENT, json.dumps(environment(device, cuda, world))
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")  # else a kill cut the last line short
    with path.open("a") as file:
        file.write(("" if whole else "\n") + record + "\n")


def add(run: Path, **facts: str) -> None:
    """Adds facts to the record of this start, which are known once the model is built."""
    path = run / ENVIRONMENT
    if path.exists():
        *earlier, last = path.read_text().splitlines()
        write_text(path, "\n".join([*earlier, json.dumps(json.loads(last) | facts)]) + "\n")
