"""What tests share: composing a config, running it in this process or as a user would."""

import functools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: several test processes share few cores

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from mae import cli  # noqa: E402
from mae.config.check import check_config, resolve
from mae.config.sweep_members import with_member  # noqa: E402
from mae.launch import launch  # noqa: E402
from mae.launch.sweep import SweepOfCommand  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

    from mae.data.loader import EvalLoader, Loader
    from mae.data.sampler import Batches
    from mae.data.settings import LoaderSettings
    from mae.data.source import Arrays, Source

Kind = TypeVar("Kind")
# An example may take as long as a busy machine makes it
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")
ROOT = Path(__file__).parent.parent

# A model and a run so small that a step takes milliseconds, in float32 so that sums are comparable
TINY = [
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.decoder_embed_dim=16",
    "model.decoder_depth=1",
    "model.decoder_num_heads=2",
    "task.precision=fp32",
    "data.img_size=16",
    "data.fraction=0.1",
    "device=cpu",
]
TINY_PRETRAIN = [*TINY, "task.batch_size=32", "task.epochs=2", "task.warmup_epochs=1", "task.log_every_steps=1"]


def composed(*overrides: str) -> DictConfig:
    """The checked config of a command line."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg, _ = with_member(compose("config", list(overrides)), overrides)
        return check_config(resolve(cfg))


def run_here(directory: Path, *overrides: str) -> int:
    """A run in this process; returns the exit code."""
    return launch.launch(composed(*overrides, f"output_dir={directory}"), list(overrides))


def run_cli(*arguments: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """run.py as a user types it."""
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        text=True,
        capture_output=True,
        timeout=240,
    )


def exit_code(start: Callable[[], object]) -> int:
    """The exit code of a program's function, returned or raised."""
    try:
        code = start()
    except SystemExit as error:
        code = error.code
    return code if isinstance(code, int) else 1 if isinstance(code, str) else 0


def run_main(words: list[str], monkeypatch, main: Callable[[], int]) -> int:
    """The program's own function in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    monkeypatch.setattr(cli, "SWEEP", SweepOfCommand())
    return exit_code(main)


@pytest.fixture(autouse=True)
def _one_thread_and_a_clean_environment(monkeypatch):
    import torch

    torch.set_num_threads(1)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SUBMITIT_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    yield
    for handler in logging.getLogger().handlers[:]:  # a run's own, bound to this test's streams
        if type(handler) in (logging.StreamHandler, logging.FileHandler):
            logging.getLogger().removeHandler(handler)
            handler.close()


def loader_arguments(size, micro, seed, rank, world, options: dict[str, Any]) -> "tuple[Batches, LoaderSettings]":
    from mae.config.build import call
    from mae.data.sampler import Batches
    from mae.data.settings import LoaderSettings

    batches = {key: options.pop(key) for key in ("drop_last", "masking", "mask_ratios") if key in options}
    settings = call(
        LoaderSettings, {"fraction": 1.0, "per_class": None, "repeats": 1, "decode_device": "cpu"} | options
    )
    return Batches(size, micro, seed, rank, world, **batches), settings


def make_loader(source, transform, size, micro, seed=0, rank=0, world=1, bad_csv=None, **options) -> "Loader":
    """A loader, made of plain options: of `Batches` and of `LoaderSettings`, those of training alone with defaults."""
    from mae.data.loader import Loader

    return Loader(source, transform, *loader_arguments(size, micro, seed, rank, world, options), bad_csv)


def make_eval_loader(source, transform, size, micro, seed=0, rank=0, world=1, bad_csv=None, **options) -> "EvalLoader":
    """As `make_loader`, for an evaluation."""
    from mae.data.loader import EvalLoader

    return EvalLoader(source, transform, *loader_arguments(size, micro, seed, rank, world, options), bad_csv)


def copy_program(folder: Path) -> Path:
    """Copies what a run needs of this repository into `folder`, where a test may edit it."""
    for name in ("mae", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run.py", folder)
    return folder


def run_copy(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """run.py of a copy, as a user types it."""
    return subprocess.run(
        [sys.executable, str(folder / "run.py"), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=240,
    )


def random_noise(num_patches: int):
    """The paper's masking, of so many patches."""
    from mae.models.masking import random_masking

    return functools.partial(random_masking, grid=(1, num_patches), mask_ratio=0.75)


def make_source(make: "Callable[..., Source]", split: str, **options) -> "Source":
    """A source, made of the keys of a `data` group as a run makes it."""
    from mae.config.build import call

    return call(make, options, split)


def undivided(source: "Source") -> "Source":
    """The source whose training or validation images this one has."""
    from mae.data.subsets import Subset

    return of_type(Subset, source).source


def labels_of(source: "Source") -> "np.ndarray":
    """Of a labelled source."""
    assert source.labels is not None
    return source.labels


def first_digits(count: int) -> "Arrays":
    """So many of the training digits, on three channels."""
    from mae.data.source import Arrays
    from mae.data.sources.torchvision import digits

    whole = of_type(Arrays, digits("train", in_chans=3, val_fraction=0.2))
    return Arrays(whole.images[:count], labels_of(whole)[:count], whole.classes, "digits")


def of_type(kind: type[Kind], value: object) -> Kind:
    """The value, which is of this type."""
    assert isinstance(value, kind)
    return value
