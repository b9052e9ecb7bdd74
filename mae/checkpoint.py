"""Checkpoints: written whole or not at all, verified when read, free of code.

Beside the manifest (see `mae.runs.checkpoints`) a checkpoint holds `model.safetensors`, weights under the reference's
names, and `trainer.pt`: optimizer, counters, random states. It is written under a temporary name, flushed, and renamed.

`python -m mae.checkpoint RUN` lists a run's checkpoints.
"""

import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from mae.program import usage_name
from mae.runs import attempt
from mae.runs.checkpoints import (
    BEST,
    MANIFEST,
    TRAINER,
    WEIGHTS,
    DamagedCheckpoint,
    best_of,
    checkpoints_of,
    epoch_of,
    manifest_of,
    step_name,
    step_of,
    verify,
)
from mae.runs.file_system import flush, point_to, system_error

log = logging.getLogger(__name__)

# ---------------------------------------------------------------- one checkpoint


def write(path: Path, weights: Mapping[str, Tensor], trainer: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Writes a checkpoint so that `path` exists whole or not at all. Raises OSError, leaving nothing behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.environ.get(attempt.NAME, '')}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        safetensors.torch.save_file(dict(weights), temporary / WEIGHTS)
        with (temporary / TRAINER).open("wb") as file:  # python's own file says what the disk says
            torch.save(dict(trainer), file)
        (temporary / MANIFEST).write_text(json.dumps(manifest_of(temporary, **about)))
        for name in (WEIGHTS, TRAINER, MANIFEST):
            flush(temporary / name)
        flush(temporary)
        attempt.check(path.parent.parent)
        if path.exists():  # a damaged one of the same step
            shutil.rmtree(path)
        temporary.rename(path)
        flush(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        system = system_error(error)  # torch and safetensors hide it, each in a type of its own
        if system is not None and system.errno is not None:
            raise OSError(system.errno, os.strerror(system.errno), str(path)) from error
        raise


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a verified checkpoint."""
    return safetensors.torch.load_file(path / WEIGHTS)


def read_trainer(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Training state of a checkpoint; never runs code. Raises DamagedCheckpoint.

    `mapped`: tensors stay in the file, and what is never read takes no memory.
    """
    try:
        return torch.load(path / TRAINER, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DamagedCheckpoint(
            f"{path / TRAINER} is refused: it is damaged, or holds code where only numbers belong."
        ) from error


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sorted names and the bytes of a model's weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------- random states


def random_state() -> dict[str, Any]:
    """States of python's, numpy's and torch's generators (the device's too), as plain numbers and tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # a run on the CPU opens no context of a GPU
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


# ---------------------------------------------------------------- the checkpoints of a run


class Checkpoints:
    """Saves a run's checkpoints in the background and keeps those that the config asks for."""

    def __init__(
        self,
        run: Path,
        *,
        every_epochs: Annotated[float, "(0, inf)"],
        every_minutes: Annotated[float, "(0, inf)"] | None,
        keep: Annotated[int, "[1, inf)"],
        keep_every_epochs: Annotated[float, "(0, inf)"] | None,
    ):
        self.run, self.keep, self.keep_every = run, keep, keep_every_epochs
        self.every_epochs, self.every_seconds = every_epochs, (every_minutes or float("inf")) * 60
        self.saved_at = time.monotonic()
        self._told_late = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._staged: dict[str, Tensor] = {}
        for left in (run / "checkpoints").glob(".step_*"):  # of a run that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)

    def late(self) -> bool:
        """Whether `every_minutes` have passed, said once for each save.

        It is the clock of one rank: all learn of it a step later, and by then a second yes would ask for another save.
        """
        late = not self._told_late and time.monotonic() - self.saved_at > self.every_seconds
        self._told_late |= late
        return late

    def save(
        self,
        step: int,
        epoch: float,
        weights: Mapping[str, Tensor],
        trainer: Mapping[str, Any],
        best: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Copies the state aside and writes it in the background; `best` lets `checkpoints/best` point there.

        The manifest says so, and holds `facts` beside its own. Raises the error of an earlier write.
        """
        self.wait()
        self.saved_at, self._told_late = time.monotonic(), False
        staged = {name: self._stage(f"weights/{name}", tensor) for name, tensor in weights.items()}
        rest = self._stage_tree("trainer", trainer)
        about = {"step": step, "epoch": epoch, "saved": time.time(), **(facts or {})} | ({BEST: True} if best else {})
        self._thread = threading.Thread(target=self._write, args=(step, staged, rest, about, best), daemon=False)
        self._thread.start()

    def _stage(self, key: str, tensor: Tensor) -> Tensor:
        """A copy of a tensor in a host buffer that the next save uses again."""
        buffer = self._staged.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pin = tensor.device.type == "cuda"
            buffer = self._staged[key] = torch.empty_like(tensor, device="cpu", pin_memory=pin).contiguous()
        return buffer.copy_(tensor)

    def _stage_tree(self, key: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._stage(key, value)
        if isinstance(value, Mapping):
            return {k: self._stage_tree(f"{key}/{k}", v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._stage_tree(f"{key}/{i}", v) for i, v in enumerate(value))
        return value

    def _write(
        self, step: int, weights: dict[str, Tensor], trainer: dict[str, Any], about: dict[str, Any], best: bool
    ) -> None:
        try:
            path = self.run / "checkpoints" / step_name(step)
            write(path, weights, trainer, about)
            if best:
                point_to(path, self.run / "checkpoints" / BEST)
            self._remove_old(step)
            self._compare_with_warning(time.monotonic() - self.saved_at)
        except BaseException as error:  # raised in the main thread by the next wait()
            self._error = error

    def _compare_with_warning(self, seconds: float) -> None:
        """Tells where a cluster's warning comes too late for a save; the launcher reads it before the next start."""
        delay = os.environ.get("MAE_SIGNAL_DELAY_S")
        if delay is None:
            return
        if seconds > float(delay):
            log.warning(
                "saving took %.0f s, and launcher.signal_delay_s=%s is the warning before a time limit: raise it, or "
                "the work since the last checkpoint is lost there",
                seconds,
                delay,
            )
        (self.run / "slurm" / "save_seconds").write_text(f"{seconds:.2f}")

    def wait(self) -> None:
        """Waits for the write under way. Raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _remove_old(self, step: int) -> None:
        """Removes what the config does not keep of the checkpoints up to this step; later ones were passed over as
        damaged when the run began, and take no other's place."""
        kept_forever: dict[int, Path] = {}
        paths = [path for path in checkpoints_of(self.run) if path.name <= step_name(step)]
        if self.keep_every:
            for path in paths:  # the first one of each period
                kept_forever.setdefault(int(epoch_of(path) / self.keep_every + 1e-9), path)
            kept_forever.pop(0, None)
        best = best_of(self.run)
        for path in paths[: -self.keep]:
            if path not in kept_forever.values() and path != best:
                try:
                    shutil.rmtree(path)
                except OSError as error:  # of a network's disk, or its snapshot: no reason to end a run that is well
                    log.warning("an old checkpoint cannot be removed: %s (%s)", path, error.strerror)


def main(arguments: list[str] | None = None) -> int:
    """Lists the checkpoints of a run: step, epoch, size, valid or not, SHA-256 of the weights."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        sys.stderr.write(f"usage: {usage_name('checkpoint', 'checkpoints')} RUN, where RUN is a run's directory.\n")
        return 2
    rows = [f"{'step':>10} {'epoch':>9} {'MB':>9}  {'valid':<5}  sha256 of the weights"]
    for path in checkpoints_of(Path(arguments[0])):
        size = 0.0
        try:
            size = sum(f.stat().st_size for f in path.iterdir()) / 1e6
            manifest = verify(path)
            epoch, valid, digest = f"{manifest['epoch']:.2f}", "yes", weights_digest(read_weights(path))
        except FileNotFoundError:  # the run, which goes on, removed it meanwhile
            continue
        except DamagedCheckpoint as error:
            if not path.exists():
                continue
            epoch, valid, digest = "?", "no", str(error)
        rows.append(f"{step_of(path):>10} {epoch:>9} {size:>9.1f}  {valid:<5}  {digest}")
    sys.stdout.write("\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
