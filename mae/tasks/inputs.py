"""Any images as task=embed and task=predict read them: named files or a data set, in batches that ranks share."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from omegaconf import DictConfig

from mae import data, device
from mae.config.build import build
from mae.config.check import to_dict
from mae.data.source import Source
from mae.data.sources.named import named_files
from mae.data.subsets import Subset, matched
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.runs.outputs import others_files
from mae.tasks.inference import ImageModel
from mae.tasks.init_weights import need_init, read_from, same_weights, warn_of_crop, warn_of_statistics
from mae.tasks.segment_inference import image_model
from mae.weights.read import read_pretrained

log = logging.getLogger(__name__)

Which = Literal["all", "train", "val"]


def image_sets(cfg: DictConfig, files: Sequence[str] | None, split: Which) -> dict[str, Source]:
    """Name of a set -> its images: `files`, or the data's splits. Data that are not split are one set, `all`.

    `data.fraction` and `data.per_class` choose what is trained on, and leave out none of them: a warning says so."""
    if cfg.data.fraction < 1 or cfg.data.per_class is not None:
        log.warning(
            "data.fraction and data.per_class choose what is trained on: task=%s takes all images", cfg.task.name
        )
    if files is not None:
        return {"files": named_files(files, cfg.data)}
    if split == "all" and "val_fraction" in cfg.data:
        everything: Source = build(data.SOURCES, to_dict(cfg.data) | {"val_fraction": 1.0}, "val")
        if isinstance(everything, Subset) and np.array_equal(everything.indices, np.arange(len(everything.source))):
            return {"all": everything.source}
    names = ("train", "val") if split == "all" else (split,)
    sets = {name: build(data.SOURCES, cfg.data, name) for name in names}
    if split == "all":
        sets["val"] = matched(sets["train"], sets["val"])
    return sets


def model_of_init(
    cfg: DictConfig, ranks: Ranks, precision: str
) -> tuple[ImageModel, Callable[[], AbstractContextManager[object]], str]:
    """The model that `init` names on this rank's device, the number format of its forward pass, and its checkpoint."""
    pretrained, number_format = read_pretrained(need_init(cfg)), device.number_format(precision, ranks.device)
    model = image_model(cfg, pretrained)
    same_weights(ranks, model.network)
    warn_of_statistics(cfg, pretrained)
    warn_of_crop(cfg, pretrained)
    model.to(ranks.device)
    model.network.to(dtype=device.weight_format(number_format))
    return model, partial(device.inference_autocast, number_format, ranks.device), read_from(cfg, pretrained)


def rank_batches(count: int, batch_size: int, rank: int, world: int) -> np.ndarray:
    """Indices of a rank's images, batch after batch: the images of a batch are the same on any number of ranks."""
    starts = range(rank * batch_size, count, world * batch_size)
    return np.concatenate([np.arange(0), *(np.arange(k, min(k + batch_size, count)) for k in starts)])


def labels_of(source: Source, indices: np.ndarray) -> list[str | None] | None:
    """Names of the classes of images, None for those without; None where no image has one."""
    if source.labels is None or not source.classes:
        return None
    return [source.classes[label] if label >= 0 else None for label in source.labels[indices].tolist()]


def columns_of(sets: Mapping[str, Source], rows: Mapping[str, np.ndarray]) -> dict[str, list[str | None]]:
    """`file` of the images `rows` of each set, and where there are such `split` and `label`."""
    columns: dict[str, list[str | None]] = {"file": [], "split": [], "label": []}
    for name, source in sets.items():
        columns["file"] += [source.name(index) for index in rows[name].tolist()]
        columns["split"] += [name] * len(rows[name])
        columns["label"] += labels_of(source, rows[name]) or [None] * len(rows[name])
    unlabelled = all(label is None for label in columns["label"])
    shown = {"file": True, "split": len(sets) > 1, "label": not unlabelled}
    return {name: values for name, values in columns.items() if shown[name]}


def output_file(run: Path, path: str | None, name: str, beside: Sequence[str] = ()) -> Path:
    """The file to write: `name` in the run or in the folder `path`, or `path` where it ends alike.

    `beside` are the suffixes of files that are written with it. Raises UserError where one of these files was asked for
    by `path` and is there already, and not from an earlier start of this run.
    """
    if path is None:
        return run / name
    target = Path(path).expanduser()
    if target.suffix != Path(name).suffix:
        target = target / name
    for file in others_files(run, [target, *map(target.with_suffix, beside)]):
        raise UserError(f"task.path={path}: {file} exists already, and is not overwritten. Choose another path.")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def written_names(run: Path, files: Sequence[Path]) -> list[str]:
    """Files as a summary names them: those in the run relative to it."""
    return [str(file.relative_to(run)) if file.is_relative_to(run) else str(file) for file in files]


def need_pyarrow(key: str, otherwise: str) -> None:
    """Raises UserError where the package that writes Parquet is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(f"{key}=parquet needs the package pyarrow: use {key}={otherwise}.") from error
