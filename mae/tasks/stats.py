"""Mean and deviation of the training images, for `data.mean` and `data.std`: one pass, shared by all ranks."""

import csv
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from mae import data
from mae.config.build import build
from mae.data.dataset import Bad
from mae.data.source import Source
from mae.data.stats import statistics
from mae.data.subsets import reduced
from mae.data.workers import worker_count

log = logging.getLogger(__name__)
PARTS = 10  # after each of which progress is told


def stats(run: Path, cfg: DictConfig, ranks: Any, tracker: Any) -> dict[str, Any]:
    """Writes what it finds to the summary, and `bad_files.csv` where images cannot be read.

    Raises ValueError where none can.
    """
    begun = time.perf_counter()
    tracker.start(0, 0)
    source: Source = reduced(build(data.SOURCES, cfg.data, "train"), cfg.data.fraction, cfg.data.per_class, cfg.seed)
    own = np.arange(ranks.rank, len(source), ranks.world)
    found = None
    for part in np.array_split(own, min(PARTS, max(1, len(own)))):
        more = statistics(source, part, worker_count(cfg.data.num_workers))
        found = more if found is None else found.merged(more)
        if ranks.main:
            done = (found.images + len(found.bad)) * ranks.world
            log.info("%d of %d images measured", min(done, len(source)), len(source))
    assert found is not None
    first, *others = ranks.gather(found)
    for other in others:
        first = first.merged(other)
    if not first.images:
        raise ValueError(f"none of the {len(source)} images of data.name={cfg.data.name} can be read.")
    if ranks.main and first.bad:
        write_bad(run, first.bad)
        log.warning("%d of %d images cannot be read: see bad_files.csv", len(first.bad), len(source))
    for channel in np.flatnonzero(np.array(first.std) == 0).tolist():
        log.warning("channel %d has one value in all images, and data.std must be greater than 0", channel)
    seconds = time.perf_counter() - begun
    return {
        "task": "stats",
        "steps": 0,
        "epochs": 0,
        "images_seen": len(source),
        "seconds": round(seconds, 2),
        "images_per_second": round(len(source) / seconds, 1),
        "checkpoint": None,
        "mean": first.mean,
        "std": first.std,
        "values": first.dtype,
        "bad": len(first.bad),
        "use": f"data.mean={shown(first.mean)} data.std={shown(first.std)}",
    }


def shown(values: Sequence[float]) -> str:
    """A list as it is typed on a command line: five figures, no spaces."""
    return f"[{','.join(f'{value:.5g}' for value in values)}]"


def write_bad(run: Path, bad: list[Bad]) -> None:
    """bad_files.csv, as training runs leave it."""
    with (run / "bad_files.csv").open("w", newline="") as file:
        csv.writer(file).writerows([(*Bad._fields, "part"), *((*one, "train") for one in sorted(bad))])
