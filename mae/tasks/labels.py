"""Labels of a data set, checked before the first step, and the class names that a classifier's run holds."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from mae.data.paths import in_words
from mae.data.source import Source
from mae.data.subsets import reduced
from mae.errors import UserError
from mae.runs.files import write_json
from mae.runs.layout import CLASSES
from mae.weights.metadata import classes_of

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


def class_numbers(
    cfg: DictConfig, names: Sequence[str], count: int, candidates: Iterable[Sequence[str]]
) -> tuple[np.ndarray, bool]:
    """The number that each class of the data, `names`, has in a model of `count` classes, and whether by name.

    By name where one of `candidates`, names that the model's classes have, holds them all. By order where none of them
    is shared, as of WordNet ids and words. Raises UserError where the classes do not correspond.
    """
    candidates = [known for known in candidates if len(known) == count]
    for known in candidates:
        if list(known) == list(names):  # of which some may be equal, as two of ImageNet's words
            return np.arange(count), True
        if set(names) <= set(known):
            number = {name: k for k, name in enumerate(known)}
            return np.array([number[name] for name in names], np.int64), True
    for known in candidates:
        if shared := sorted(set(names) & set(known)):
            unknown = sorted(set(names) - set(known))
            raise UserError(
                f"init={cfg.init} knows {_some(known)}, and data.name={cfg.data.name} holds {_some(names)}: "
                f"{shared[0]} is a class of both, and {unknown[0]} is none of the model's. "
                "Evaluate on data whose classes are all named as those it was trained on."
            )
    if len(names) != count:
        raise UserError(
            f"init={cfg.init} knows {count} classes, but data.name={cfg.data.name} holds {len(names)}: "
            "evaluate on data with the classes it was trained on."
        )
    if candidates:
        log.warning("the classes have other names than those trained on: they are matched by their order")
    return np.arange(count), False


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"


def write_class_names(run: Path, names: list[str]) -> None:
    """Writes classes.json of a run, for evaluation and export."""
    write_json(run / CLASSES, names)


def refuse_other_classes(root: str | None, checkpoint: Path, names: Sequence[str]) -> None:
    """Raises UserError where the classes of the images in `root` are not those that a checkpoint's run has learnt."""
    learnt = classes_of(checkpoint)
    if not learnt or not names or learnt == list(names):
        return
    pairs = (("is missing", learnt, names), ("is new", names, learnt))
    differing = [(what, [name for name in these if name not in set(those)]) for what, these, those in pairs]
    differences = [f"{in_words(these)} {plural(what, len(these))}" for what, these in differing if these]
    raise UserError(
        f"{checkpoint.parent.parent} has learnt {len(learnt)} classes, and data.root={root} has others: "
        f"{', '.join(differences) or 'the same names in another order'}. Correct data.root, or start a new run for "
        "these classes with another output_dir."
    )


def plural(verb: str, count: int) -> str:
    """`is missing` or `are missing`."""
    return verb if count == 1 else verb.replace("is", "are", 1)
