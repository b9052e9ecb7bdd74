"""Mean and deviation of the training images, for `data.mean` and `data.std`: one pass, shared by all ranks."""

import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from mae import data
from mae.config.build import build
from mae.data.dataset import BAD_COLUMNS, Bad
from mae.data.source import Source
from mae.data.stats import Statistics, statistics
from mae.data.subsets import reduced
from mae.data.workers import worker_count
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.runs.summary import Summary, rate
from mae.tasks.patch_sums import PatchSums
from mae.tasks.results import write_csv
from mae.tracking.base import Tracker

log = logging.getLogger(__name__)
CHUNKS = 10  # after each of which progress is logged


def stats(run: Path, cfg: DictConfig, ranks: Ranks, tracker: Tracker) -> Summary:
    """Measures all training images, and lists those that cannot be read in `bad_files.csv`.

    With `target=pca` the same pass leaves the sums of patches from which the target is fitted.
    Raises UserError where none can be read.
    """
    begun = time.perf_counter()
    tracker.start(0, 0)
    source: Source = reduced(build(data.SOURCES, cfg.data, "train"), cfg.data.fraction, cfg.data.per_class, cfg.seed)
    own = np.arange(ranks.rank, len(source), ranks.world)
    sums = PatchSums(cfg, len(source)) if cfg.target.name == "pca" else None
    measured: list[Statistics] = []
    for chunk in np.array_split(own, min(CHUNKS, max(1, len(own)))):
        measured.append(statistics(source, chunk, worker_count(cfg.data.num_workers), sums))
        if ranks.main:
            done = sum(each.images + len(each.bad) for each in measured) * ranks.world
            log.info("%d of %d images measured", min(done, len(source)), len(source))
    of_rank = functools.reduce(Statistics.merged, measured)
    total = functools.reduce(Statistics.merged, ranks.gather(of_rank))
    if not total.images:
        raise UserError(f"none of the {len(source)} images of data.name={cfg.data.name} can be read.")
    if sums is not None:
        sums.write(run, ranks.sum, ranks.main)
        log.info("target=pca: `target=pca target.fitted=%s` is fitted to these patches", run)
    if ranks.main and total.bad:
        write_bad(run, total.bad)
        log.warning("%d of %d images cannot be read: see bad_files.csv", len(total.bad), len(source))
    for channel in np.flatnonzero(np.array(total.std) == 0).tolist():
        log.warning("channel %d has one value in all images, and data.std must be greater than 0", channel)
    seconds = time.perf_counter() - begun
    results = {
        "mean": total.mean,
        "std": total.std,
        "values": total.dtype,
        "bad": len(total.bad),
        "use": f"data.mean={as_typed(total.mean)} data.std={as_typed(total.std)}",
    }
    return Summary(
        "stats", seconds, images_seen=len(source), images_per_second=rate(len(source), seconds), results=results
    )


def as_typed(values: Sequence[float]) -> str:
    """A list as it is typed on a command line: five figures, no spaces."""
    return f"[{','.join(f'{value:.5g}' for value in values)}]"


def write_bad(run: Path, bad: list[Bad]) -> None:
    """bad_files.csv, as training runs leave it."""
    write_csv(run / "bad_files.csv", BAD_COLUMNS, ((*entry, "train") for entry in sorted(bad)))
