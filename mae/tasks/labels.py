"""Labels of a data set, checked before the first step, and the class names that a classifier's run holds."""

import logging
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from mae.data.source import Source
from mae.data.subsets import reduced
from mae.errors import UserError
from mae.runs.files import write_json
from mae.runs.layout import CLASSES

log = logging.getLogger(__name__)


def need_labels(cfg: DictConfig, source: Source, split: str) -> np.ndarray:
    """The labels (N,) of a data set. Raises UserError where any is missing."""
    labels = source.labels
    if labels is None or not source.classes:
        raise UserError(
            f"task={cfg.task.name} needs labels, and the {split} images of data.name={cfg.data.name} have none: "
            "put them in one sub-folder a class, or choose labelled data."
        )
    if len(labels) and int(labels.min()) < 0:
        missing = int((labels < 0).sum())
        example = source.name(int(np.flatnonzero(labels < 0)[0]))
        raise UserError(
            f"task={cfg.task.name} needs labels, and {missing} of the {split} images of data.name={cfg.data.name} "
            f"have none, such as {example}."
        )
    return labels


def check_classes(cfg: DictConfig, train_set: Source, val_set: Source) -> None:
    """Raises UserError where a classifier cannot learn from the images.

    Labels are missing, a class has no training image, the validation images have a class of their own, or the number
    of classes is not `data.num_classes`.
    """
    names = train_set.classes
    need_labels(cfg, train_set, "training")
    need_labels(cfg, val_set, "validation")
    expected = cfg.data.num_classes
    if expected is not None and expected != len(names):
        raise UserError(
            f"data.num_classes={expected}, but data.name={cfg.data.name} holds {len(names)} classes "
            f"({', '.join(names[:3])}...): correct data.num_classes, or data.root."
        )
    if len(names) < 2:
        raise UserError(f"data.name={cfg.data.name} holds a single class: a classifier needs two or more.")
    if unknown := [name for name in val_set.classes if name not in set(names)]:
        raise UserError(
            f"the validation images of data.name={cfg.data.name} are of classes that no training image is of: "
            f"{', '.join(unknown[:3])} ({len(unknown)} of {len(val_set.classes)}). Their names must be the same."
        )
    used = reduced(train_set, cfg.data.fraction, cfg.data.per_class, cfg.seed).labels
    assert used is not None
    empty = np.flatnonzero(np.bincount(used, minlength=len(names)) == 0)
    if len(empty):
        few = " that data.fraction and data.per_class leave" if len(used) < len(train_set) else ""
        raise UserError(
            f"the class {names[empty[0]]} has no image among the {len(used)} training images{few}"
            + (f" ({len(empty)} classes have none)" if len(empty) > 1 else "")
            + ": add images, remove the class, or raise data.fraction."
        )
    unseen = np.flatnonzero(np.bincount(need_labels(cfg, val_set, "validation"), minlength=len(names)) == 0)
    if len(unseen):
        log.warning("no validation image is of class %s (%d such classes)", names[unseen[0]], len(unseen))


def write_class_names(run: Path, names: list[str]) -> None:
    """Writes classes.json of a run, for evaluation and export."""
    write_json(run / CLASSES, names)
