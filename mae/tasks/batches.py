"""The images of a data set as tasks read them: each once over all ranks, cropped at the centre, in batches."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from mae import data, device
from mae.config.build import build, call
from mae.data.loader import EvalLoader
from mae.data.sampler import Batches, Masking
from mae.data.settings import LoaderSettings
from mae.data.source import Source
from mae.data.subsets import matched
from mae.data.transforms import CenterCrop, WholeImage
from mae.distributed.ranks import Ranks


def both_sets(cfg: DictConfig) -> tuple[Source, Source]:
    """The training and the validation images, with the same numbers of the classes where their names allow it."""
    train_set, val_set = (build(data.SOURCES, cfg.data, split) for split in ("train", "val"))
    return train_set, matched(train_set, val_set)


def eval_batch_size(task: DictConfig) -> int:
    """Images that a trained task encodes at a time where it measures features: no more than a device holds."""
    micro = task.micro_batch_size
    return min(256, micro if isinstance(micro, int) else task.batch_size)  # `auto` is of a step with gradients


def eval_loader(
    cfg: DictConfig,
    ranks: Ranks,
    source: Source,
    batch_size: int,
    masking: Masking | None = None,
    bad_csv: Path | None = None,
    indices: np.ndarray | None = None,
    split: str = "val",
) -> EvalLoader:
    """The images of this rank, centre-cropped, each once over all ranks; bad ones are listed in `bad_csv`.

    `indices` are those of this rank in their order, where they are not every `world`-th.
    """
    transform = call(CenterCrop, {"img_size": cfg.model.img_size, "crop_fraction": cfg.data.crop_fraction})
    batches = Batches(batch_size, batch_size, cfg.seed, ranks.rank, ranks.world, masking=masking)
    settings = call(LoaderSettings, cfg.data)
    return EvalLoader(source, transform, batches, settings, bad_csv, ranks.device.type == "cuda", indices, split)


def whole_loader(
    cfg: DictConfig,
    ranks: Ranks,
    source: Source,
    eval_size: int | None,
    bad_csv: Path | None = None,
    split: str = "val",
) -> EvalLoader:
    """The images of this rank at full size, one a batch, with their maps as they are; see `WholeImage`."""
    transform = call(WholeImage, {"img_size": cfg.model.img_size, "eval_size": eval_size})
    batches, settings = Batches(1, 1, cfg.seed, ranks.rank, ranks.world), call(LoaderSettings, cfg.data)
    return EvalLoader(source, transform, batches, settings, bad_csv, ranks.device.type == "cuda", split=split)


def bad_files_csv(run: Path, ranks: Ranks) -> Path:
    """The file in which a rank lists the images that it could not use."""
    return run / ("bad_files.csv" if ranks.main else f"bad_files_{ranks.rank}.csv")


def sent(loader: EvalLoader, ranks: Ranks) -> Iterator[device.Batch]:
    """A loader's batches on the device, without the images that stand in for bad ones."""
    return map(device.Sender(ranks.device), loader.usable())
