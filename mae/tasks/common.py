"""What several tasks need: a data set's labels checked, its images in order, its class names kept."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor, nn

from mae import data, device
from mae.checkpoint import step_name, weights_digest
from mae.config.build import build, call
from mae.config.from_run import run_of, stands_for
from mae.config.rules import missing_init
from mae.data.crops import pair
from mae.data.loader import EvalLoader
from mae.data.prepare import top_of
from mae.data.source import BadImage, Source
from mae.data.subsets import matched, reduced
from mae.data.transforms import CenterCrop, kept_fraction
from mae.runs.files import write_text
from mae.weights.read import PretrainedWeights

log = logging.getLogger(__name__)

CLASSES = "classes.json"  # in a classifier's run: names in the order of its logits


def both_sets(cfg: DictConfig) -> tuple[Source, Source]:
    """The training and the validation images, with the same numbers of the classes where their names allow it."""
    train_set, val_set = (build(data.SOURCES, cfg.data, split) for split in ("train", "val"))
    return train_set, matched(train_set, val_set)


def eval_loader(
    cfg: DictConfig,
    ranks: Any,
    source: Source,
    batch_size: int,
    num_patches: int | None = None,
    bad_csv: Path | None = None,
) -> EvalLoader:
    """The images of this rank, centre-cropped, each once over all ranks; bad ones are listed in `bad_csv`."""
    transform = call(CenterCrop, {"img_size": cfg.model.img_size, "crop_fraction": cfg.data.crop_fraction})
    pin = ranks.device.type == "cuda"
    return call(
        EvalLoader,
        cfg.data,
        source,
        transform,
        batch_size,
        cfg.seed,
        ranks.rank,
        ranks.world,
        num_patches,
        pin,
        bad_csv,
    )


def bad_files(run: Path, ranks: Any) -> Path:
    """Where a rank lists the images that it could not use."""
    return run / ("bad_files.csv" if ranks.main else f"bad_files_{ranks.rank}.csv")


def sent(loader: EvalLoader, ranks: Any) -> Iterator[dict[str, Tensor]]:
    """A loader's batches on the device."""
    return map(device.Sender(ranks.device), loader)


def need_labels(cfg: DictConfig, source: Source, part: str) -> np.ndarray:
    """The labels of a data set. Raises ValueError where there are none, or some are missing."""
    labels = source.labels
    if labels is None or not source.classes:
        raise ValueError(
            f"task={cfg.task.name} needs labels, and the {part} images of data.name={cfg.data.name} have none: "
            "put them in one sub-folder a class, or choose labelled data."
        )
    if len(labels) and int(labels.min()) < 0:
        missing = int((labels < 0).sum())
        example = source.name(int(np.flatnonzero(labels < 0)[0]))
        raise ValueError(
            f"task={cfg.task.name} needs labels, and {missing} of the {part} images of data.name={cfg.data.name} "
            f"have none, such as {example}."
        )
    return labels


def check_classes(cfg: DictConfig, train_set: Source, val_set: Source) -> None:
    """Whether the images can be learned from.

    Raises ValueError where labels are missing, a class has no image to learn from, the validation images are of
    another, or there are more or fewer classes than `data.num_classes`.
    """
    names = train_set.classes
    need_labels(cfg, train_set, "training")
    need_labels(cfg, val_set, "validation")
    expected = cfg.data.num_classes
    if expected is not None and expected != len(names):
        raise ValueError(
            f"data.num_classes={expected}, but data.name={cfg.data.name} holds {len(names)} classes "
            f"({', '.join(names[:3])}...): correct data.num_classes, or data.root."
        )
    if len(names) < 2:
        raise ValueError(f"data.name={cfg.data.name} holds a single class: a classifier needs two or more.")
    if strange := [name for name in val_set.classes if name not in set(names)]:
        raise ValueError(
            f"the validation images of data.name={cfg.data.name} are of classes that no training image is of: "
            f"{', '.join(strange[:3])} ({len(strange)} of {len(val_set.classes)}). Their names must be the same."
        )
    used = reduced(train_set, cfg.data.fraction, cfg.data.per_class, cfg.seed).labels
    assert used is not None
    empty = np.flatnonzero(np.bincount(used, minlength=len(names)) == 0)
    if len(empty):
        few = " that data.fraction and data.per_class leave" if len(used) < len(train_set) else ""
        raise ValueError(
            f"the class {names[empty[0]]} has no image among the {len(used)} training images{few}"
            + (f" ({len(empty)} classes have none)" if len(empty) > 1 else "")
            + ": add images, remove the class, or raise data.fraction."
        )
    unseen = np.flatnonzero(np.bincount(need_labels(cfg, val_set, "validation"), minlength=len(names)) == 0)
    if len(unseen):
        log.warning("no validation image is of class %s (%d such classes)", names[unseen[0]], len(unseen))


def keep_classes(run: Path, names: list[str]) -> None:
    """Leaves the class names in a run's directory, for evaluation and export."""
    write_text(run / CLASSES, json.dumps(names) + "\n")


def kept_classes(init: str) -> list[str] | None:
    """The class names of the run that `init` names, or a checkpoint of which, or None."""
    run = run_of(init)
    if run is None or not (run / CLASSES).is_file():
        return None
    return [str(name) for name in json.loads((run / CLASSES).read_text())]


def read_from(cfg: DictConfig, pretrained: PretrainedWeights) -> str:
    """The checkpoint that `init` stood for when it was read, or `init` itself."""
    now, step = stands_for(cfg.init), pretrained.meta.step
    return cfg.init if now is None or step is None else str(now.with_name(step_name(step)))


def same_weights(ranks: Any, model: nn.Module) -> None:
    """Raises ValueError where ranks have read different weights, of a run that was just going on."""
    if ranks.world > 1 and len(set(ranks.gather(weights_digest(model.state_dict())))) > 1:
        raise ValueError(
            "init= names a run that goes on meanwhile, and ranks have read different checkpoints: name one of them, as "
            "init=RUN/checkpoints/STEP."
        )


def warn_of_statistics(cfg: DictConfig, pretrained: PretrainedWeights) -> None:
    """Says where images will be prepared otherwise than those that frozen weights were trained on."""
    theirs = pretrained.preprocessing
    if theirs is None:
        return
    for key, stated in theirs.of_images_up_to(image_top(cfg)).items():
        ours = list(cfg.data[key])
        count = max(len(ours), len(stated))
        if not np.allclose(channels(ours, count), channels(stated, count), rtol=1e-3, atol=1e-3):
            values = ",".join(f"{value:g}" for value in stated)
            log.warning(
                "init=%s was trained on images of data.%s=[%s], and these are normalised by %s: set data.%s=[%s] to "
                "show it images as it knows them",
                pretrained.path, key, values, ours, key, values,
            )  # fmt: skip


def warn_of_crop(cfg: DictConfig, pretrained: PretrainedWeights) -> None:
    """Says where a file's classifier was evaluated on images that were resized or cut otherwise."""
    theirs = pretrained.preprocessing
    if theirs is None:
        return
    ours = kept_fraction(pair(cfg.model.img_size), cfg.data.crop_fraction)
    if theirs.crop and abs(theirs.crop - ours) > 5e-3:
        log.warning(
            "init=%s is for images of which %.4g of a side is kept, and of these %.4g is: set data.crop_fraction=%.4g "
            "to show it images as it knows them",
            pretrained.path, theirs.crop, ours, theirs.crop,
        )  # fmt: skip
    if theirs.interpolation in ("nearest", "lanczos", "bilinear", "box", "hamming"):
        log.warning(
            "init=%s is for images that are resized by %s interpolation, and these are by bicubic: its accuracy can "
            "differ a little",
            pretrained.path, theirs.interpolation,
        )  # fmt: skip


def image_top(cfg: DictConfig) -> float | None:
    """What the values of images are divided by before `data.mean` and `data.std`: 255, 65535, or 1 where they are
    floating. None where only the images would say it, and none can be read."""
    if cfg.data.name != "scientific":
        return 255.0  # every other source decodes to 8 bits
    for split in ("val", "train"):
        with contextlib.suppress(ValueError, OSError):
            source: Source = build(data.SOURCES, cfg.data, split)
            if (image := next(readable(source), None)) is not None:
                return top_of(image)
    return None


def readable(source: Source) -> Iterator[Tensor]:
    """The images of a source that are not bad."""
    for index in range(len(source)):
        with contextlib.suppress(BadImage, OSError):
            yield source[index][0]


def channels(values: Any, count: int) -> list[float]:
    """One value a channel, where one is given for all."""
    return list(values) * (count if len(values) == 1 else 1)


def need_init(cfg: DictConfig) -> str:
    """`init`. Raises ValueError where it is not given."""
    if problem := missing_init(cfg.task.name, cfg.init):
        raise ValueError(problem)
    return cfg.init
