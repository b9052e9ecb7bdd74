"""Loaded by every Python of a test's run (PYTHONPATH): slows steps and saves, and breaks ranks, as files in
MAE_TEST_FOLDER say. The product knows nothing of it."""

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path


def said(name: str) -> str:
    """What the test asks for just now."""
    try:
        return (Path(os.environ["MAE_TEST_FOLDER"]) / name).read_text()
    except OSError:
        return ""


def patch(engine):
    rank = os.environ.get("RANK", "0")
    if said("absent") == rank:  # a rank that never comes
        time.sleep(600)
    from mae import checkpoint

    step, write = engine.take_step, checkpoint.write

    def take_step(t, *rest, **more):
        time.sleep(float(said("pace") or 0))
        if said("raise") == f"{rank} {t.progress.step}":
            raise {"ValueError": ValueError}.get(said("kind"), RuntimeError)("a deliberate mistake")
        if said("exit") == f"{rank} {t.progress.step}":
            os._exit(3)
        return step(t, *rest, **more)

    def slow_write(path, *rest):
        path.with_name(f".{path.name}.begun").mkdir(exist_ok=True)
        time.sleep(float(said("slow_save") or 0))
        write(path, *rest)
        path.with_name(f".{path.name}.begun").rmdir()

    engine.take_step, checkpoint.write = take_step, slow_write


class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "mae.engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


if "SLURM_PROCID" in os.environ or "SLURM_JOB_ID" not in os.environ:  # of a job its ranks alone
    sys.meta_path.insert(0, Hook())
