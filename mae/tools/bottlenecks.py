"""What may hold a GPU back: launching its kernels, and loading its images. Computed, not measured."""

import math
from dataclasses import dataclass

from omegaconf import DictConfig

LAUNCH_S = 5e-6  # of the host a kernel, in Python: assumed
# Kernels of a training step: of each block, and of what lies outside. Operators of ViT-B/16 with 20 and with 10 blocks
# were counted without compilation, and 900 kernels of 20 blocks are assumed with it (benchmarks/roofline.py).
UNCOMPILED, COMPILED = (59, 95), (40, 100)
ENCODER_ONLY = 1 / 3  # of a step's operators that a frozen network needs: it has no backward pass


@dataclass(frozen=True)
class HostWork:
    """What the host of a GPU does for a step."""

    kernels: int | None  # None: a CUDA graph replays them
    cpus_per_task: int | None  # of the launcher, where it has the key
    devices_of_machine: int
    images: int  # of a device at a time

    def rows(self, images_per_second: float, loaded_per_second: float | None) -> dict[str, str]:
        """Rows of a plan for a GPU that trains `images_per_second` and a machine whose workers load so many."""
        rows = {"launch bound": self.launch_bound(images_per_second)}
        if self.cpus_per_task is not None:
            rows["data workers"] = self.data_workers(self.cpus_per_task, images_per_second, loaded_per_second)
        return rows

    def launch_bound(self, images_per_second: float) -> str:
        """The images a GPU of which the kernels take as long as their launches."""
        if self.kernels is None:
            return "none: a CUDA graph replays a step's kernels (task.compile=graphs)"
        seconds = self.kernels * LAUNCH_S
        images = math.ceil(seconds * images_per_second)
        text = f"below {images:,} images a GPU at a time: {self.kernels:,} launches of {1e6 * LAUNCH_S:g} microseconds"
        text += f" take {1e3 * seconds:.1f} ms (assumed)"
        if self.images >= images:
            return text
        return f"{text}. A GPU holds {self.images}: raise task.batch_size, or set task.compile=graphs"

    def data_workers(self, cpus: int, needed: float, loaded_per_second: float | None) -> str:
        """Whether the CPUs of a task load what its GPU trains."""
        have = f"launcher.cpus_per_task={cpus}"
        if loaded_per_second is None:
            return (
                f"a GPU trains {needed:,.0f} images/s, so that each CPU of {have} must load {needed / cpus:,.0f} "
                "(task=inspect measures it, for estimate.loader_images_per_second)"
            )
        loaded = loaded_per_second / self.devices_of_machine
        if loaded >= needed:
            return f"{have} loads {loaded:,.0f} images/s for a GPU that trains {needed:,.0f}"
        return (
            f"{have} loads {loaded:,.0f} images/s for a GPU that trains {needed:,.0f}: set "
            f"launcher.cpus_per_task={math.ceil(cpus * needed / loaded)}"
        )


def host_work(cfg: DictConfig, blocks: int, devices: int, images: int) -> HostWork:
    """What the host does for a step of a model with so many blocks, on `devices` in all."""
    a_block, outside = UNCOMPILED if cfg.task.compile == "off" else COMPILED
    share = ENCODER_ONLY if cfg.task.name == "linprobe" else 1.0
    kernels = None if cfg.task.compile == "graphs" else round(share * (a_block * blocks + outside))
    launcher = cfg.launcher
    return HostWork(kernels, launcher.get("cpus_per_task"), devices // launcher.get("nodes", 1), images)
