"""A run's checkpoints on the disk: layout, names, manifests, and whether their bytes are what was written. No torch.

A checkpoint is a folder `checkpoints/step_00000100/` with `model.safetensors`, `trainer.pt`, and `manifest.json`: step,
epoch, the size and SHA-256 of both files, and what a reader of a copy needs of the run. `mae.checkpoint` reads and
writes their tensors.
"""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mae.errors import UserError
from mae.runs.file_system import point_to
from mae.runs.files import digest, read_json
from mae.runs.layout import CHECKPOINTS, FORMAT, FORMAT_KEY

log = logging.getLogger(__name__)

WEIGHTS, TRAINER, MANIFEST = "model.safetensors", "trainer.pt", "manifest.json"
PROBED_LAYER = "probed_layer"  # in a manifest and an export's metadata: the block whose output its classifier reads
CLASS_NAMES = "classes"  # in a manifest: names in the order of the outputs of what learns classes
RUN_CONFIG, RUN_OVERRIDES = "config", "overrides"  # in a manifest: the run's config.yaml and overrides.yaml
BEST = "best"  # a link to the checkpoint that validated best; in a manifest: whether that was it when it was written


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete, altered, or holds code."""


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def checkpoints_of(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, valid or not."""
    return sorted((run / CHECKPOINTS).glob("step_" + "[0-9]" * 8))


def best_of(run: Path) -> Path | None:
    """The checkpoint that `checkpoints/best` points to, or None."""
    link = run / CHECKPOINTS / BEST
    return link.with_name(os.readlink(link)) if link.is_symlink() else None


def repair_best(run: Path, restored: Path) -> None:
    """Lets `best` point to the best of the checkpoints up to `restored`, from which a run goes on: the run may have
    been killed before it moved the link. Checkpoints of earlier versions do not say it, and their link stays."""
    best = [path for path in checkpoints_of(run) if path <= restored and read_json(path / MANIFEST).get(BEST) is True]
    link = run / CHECKPOINTS / BEST
    linked = read_json(link / MANIFEST).get("step")
    if not best or (isinstance(linked, int) and step_of(best[-1]) <= linked <= step_of(restored)):
        return
    log.info("checkpoints/best points to %s again", best[-1].name)
    point_to(best[-1], link)


def epoch_of(path: Path) -> float:
    """The epoch in a checkpoint's manifest; 0 where that is damaged."""
    epoch = read_json(path / MANIFEST).get("epoch")
    return float(epoch) if isinstance(epoch, int | float) else 0.0


def describes_itself(folder: Path) -> bool:
    """Whether the manifest of a checkpoint's folder holds the run's config; earlier versions wrote none."""
    return isinstance(read_json(folder / MANIFEST).get(RUN_CONFIG), dict)


# ---------------------------------------------------------------- manifests


def manifest_of(folder: Path, **about: object) -> dict[str, Any]:
    """The manifest of the files in a checkpoint's folder."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)} for name in (WEIGHTS, TRAINER)
    }
    return {FORMAT_KEY: FORMAT, **about, "files": files}


def damage(path: Path, names: Iterable[str] | None = None, digests: bool = True) -> str:
    """Why a checkpoint's files are not what was written, or "". `names`: of these files alone; without `digests` it
    compares their sizes alone."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name in files if names is None else names:
            if (path / name).stat().st_size != files[name]["bytes"]:
                return f"{name} is truncated"
            if digests and digest(path / name) != files[name]["sha256"]:
                return f"{name} is not what was written there, its checksum differs"
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        return f"it is not whole ({type(error).__name__}: {error})"
    return ""


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose bytes are what was written. Raises DamagedCheckpoint."""
    if reason := damage(path):
        raise DamagedCheckpoint(f"{path}: {reason}.")
    manifest = read_json(path / MANIFEST)
    if path.name != step_name(manifest.get("step", -1)):
        raise DamagedCheckpoint(f"{path} says it is of step {manifest.get('step')}.")
    if manifest.get(FORMAT_KEY, 0) > FORMAT:
        log.warning("%s is of a newer version of this program: what that added is passed over.", path)
    return manifest


def newest_valid(run: Path) -> Path | None:
    """The newest checkpoint that verifies; each damaged one on the way is reported and passed over."""
    for path in reversed(checkpoints_of(run)):
        try:
            verify(path)
            return path
        except DamagedCheckpoint as error:
            log.warning("passing over a damaged checkpoint: %s", error)
    return None


def newest_complete(run: Path) -> Path | None:
    """The newest checkpoint whose files have the sizes that were written; their bytes are not read."""
    return next((path for path in reversed(checkpoints_of(run)) if not damage(path, digests=False)), None)
