"""Which folders of a data set are its splits, and which are classes. Imports no torch.

A class may be called `train`, and a split `Training`. So names alone decide only where all folders have names of
splits; else what lies in the folders must agree, and what can be read in two ways is refused with both readings.
"""

import logging
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from mae.data.paths import folders_and_files, holds, in_words, inside, printable
from mae.data.settings import Choice
from mae.errors import UserError

log = logging.getLogger(__name__)

TRAINING = ("train", "training")
VALIDATION = ("val", "validation", "valid", "dev", "eval", "evaluation", "test", "testing")  # the first that is there
WORDS = re.compile(rf"(?<![a-z])({'|'.join(sorted((*TRAINING, *VALIDATION), key=len, reverse=True))})(?![a-z])")


class Splits(NamedTuple):
    """The folders of training and of validation. Without `train` there are none, without `val` there is no other."""

    train: str | None = None
    val: str | None = None
    unused: tuple[str, ...] = ()  # folders of splits that are not read

    @property
    def names(self) -> list[str]:
        return [name for name in (self.train, self.val) if name is not None]


class Contents(NamedTuple):
    """What a folder holds of the data: whether files lie in it directly, and its sub-folders that hold some."""

    files: bool
    folders: frozenset[str]


def split_of(name: str) -> Literal["train", "val"] | None:
    """Which split a word such as `Training` or `test` names, if any."""
    word = name.strip().lower()
    return "train" if word in TRAINING else "val" if word in VALIDATION else None


def by_name(names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Names of folders that may be splits, by what else they consist of: `train2017` and `val2017` belong together.

    For each remainder its names of training, and those of validation, the first to be taken first."""
    groups: dict[str, dict[str, list[str]]] = {}
    rank: dict[str, tuple[int, str]] = {}
    for name in names:
        match = WORDS.search(name.lower())
        if match is None:
            continue
        word, rest = match[1], name.lower()[: match.start()] + "\0" + name.lower()[match.end() :]
        rank[name] = (*TRAINING, *VALIDATION).index(word), name
        group = groups.setdefault("" if rest == "\0" else rest, {"train": [], "val": []})
        group["train" if word in TRAINING else "val"].append(name)
    for group in groups.values():
        for kind in group.values():
            kind.sort(key=rank.__getitem__)
    return {rest: group for rest, group in groups.items() if not rest or group["train"] and group["val"]}


def chosen(choice: list[str], names: Iterable[str], folder: str) -> Splits:
    """The splits that `data.splits` names. Raises UserError where a folder is not there."""
    if not 1 <= len(choice) <= 2 or not all(choice) or len(set(choice)) < len(choice):
        raise UserError(
            f"data.splits={list(choice)} must be auto, off, or the folders of training and validation, as "
            "data.splits=[train,val]; of training alone, as data.splits=[train]."
        )
    known = sorted(names)
    for name in choice:
        if name not in known:
            raise UserError(
                f"data.splits names {printable(name)}, and {folder} holds no such folder, only {in_words(known)}."
            )
    return Splits(choice[0], choice[1] if len(choice) > 1 else None)


def recognised(
    names: Sequence[str],
    files: bool,
    look: Callable[[str], Contents],
    choice: Choice,
    folder: str,
    wholes: str = "classes",
) -> Splits:
    """The splits among the folders `names` of `folder`.

    `files` says whether data lie beside them, and `look(name)` what a folder holds. `wholes` is what the folders are
    where they are no splits. Raises UserError for what can be read in two ways, with what to type for each.
    """
    if not isinstance(choice, str):
        return chosen(choice, names, folder)
    groups = by_name(names) if choice == "auto" else {}
    doubt = Doubt(folder, sorted(names), wholes)
    training = [rest for rest, group in groups.items() if group["train"]]
    if len(training) > 1 and "" not in training:
        raise UserError(doubt.between([groups[rest] for rest in training]))
    if not training:
        return without_training(groups.get("", {"val": []})["val"], names, files, look, doubt)
    group = groups["" if "" in training else training[0]]
    if len(group["train"]) > 1 or len({name.lower() for name in group["val"]}) < len(group["val"]):
        raise UserError(doubt.between([group]))
    train, vals = group["train"][0], group["val"]
    splits = Splits(train, vals[0] if vals else None, tuple(vals[1:]))
    others = [name for name in names if name not in (train, *vals)]
    others = [name for name, contents in zip(others, map(look, others), strict=True) if any(contents)]
    if not others and not (files and not vals):
        if files:
            log.warning("%s: what lies beside %s is left out", folder, in_words(splits.names))
        return splits
    inner = look(train)
    if vals and inner.folders & look(vals[0]).folders or not others and inner.folders and not inner.files:
        log.warning("%s: %s left out, as %s the splits", folder, left_out(others, files), are(splits))
        return splits
    if not vals and len(others) > 1 and not files and alike([inner, *map(look, others)]):
        log.info("%s: the folder %s is a class, as %s are", folder, printable(train), in_words(others))
        return Splits()
    raise UserError(doubt.question(splits, others))


def alike(contents: Sequence[Contents]) -> bool:
    """Whether folders hold files directly and no folders, as those of classes do."""
    return all(folder.files and not folder.folders for folder in contents)


def without_training(
    vals: list[str], names: Sequence[str], files: bool, look: Callable[[str], Contents], doubt: "Doubt"
) -> Splits:
    """No splits, where none is of training; refused where the folders could be splits all the same."""
    others = {name for name in names if name not in vals and any(look(name))} if vals else set()
    if len(vals) > 1 and not others and not files:
        raise UserError(doubt.question(Splits(vals[0]), []))
    for name in vals if others else ():
        if look(name).folders & others:
            raise UserError(
                f"{doubt.folder}: the folder {printable(name)} holds folders of the same names as those beside it. "
                f"Type data.splits=off where it is one of the {doubt.wholes}, or move the others into a folder train."
            )
    if len(vals) == 1 and not others and not files and look(vals[0]).folders:
        log.warning(
            "%s: %s is the only folder, and its images are taken without labels: %s takes its folders as classes",
            doubt.folder,
            printable(vals[0]),
            typed(vals[:1]),
        )
    return Splits()


class Doubt(NamedTuple):
    """Sentences for folders that can be read in two ways."""

    folder: str
    names: list[str]
    wholes: str

    def question(self, splits: Splits, others: list[str]) -> str:
        names = splits.names
        beside = f" beside {in_words(others)}" if others else ""
        roles = "training and validation" if len(names) > 1 else "training, of which data.val_fraction is held out"
        return (
            f"{self.folder} holds {in_words([*names, *splits.unused])}{beside}, which can be read in two ways. Type "
            f"{typed(names)} where {in_words(names)} {'are' if len(names) > 1 else 'is'} for {roles}, or "
            f"data.splits=off where all {len(self.names)} folders are {self.wholes}."
        )

    def between(self, groups: list[dict[str, list[str]]]) -> str:
        pairs = [[train, val] for group in groups for train in group["train"] for val in group["val"] or [""]]
        readings = " or ".join(typed([name for name in pair if name]) for pair in pairs[:4])
        return (
            f"{self.folder} holds several folders for one split: {in_words(self.names)}. Type {readings} for the "
            f"splits, or data.splits=off where all {len(self.names)} folders are {self.wholes}."
        )


def typed(names: list[str]) -> str:
    """The option that names folders of splits, as a shell takes it."""
    words = [
        name if re.fullmatch(r"[A-Za-z_][\w.-]*", name) else '"' + name.replace('"', '\\"') + '"' for name in names
    ]
    option = f"data.splits=[{','.join(printable(word) for word in words)}]"
    return option if re.fullmatch(r"[\w.=,\[\]-]+", option) else shlex.quote(option)


def left_out(others: list[str], files: bool) -> str:
    words = [f"the folder{'s' * (len(others) > 1)} {in_words(others)}"] * bool(others) + ["the files beside"] * files
    return " and ".join(words) + (" are" if len(others) + files > 1 or files else " is")


def are(splits: Splits) -> str:
    return f"{in_words(splits.names)} {'are' if len(splits.names) > 1 else 'is'}"


# ---------------------------------------------------------------- folders of this machine


def splits_of(
    top: Path,
    suffixes: tuple[str, ...],
    choice: Choice,
    follow_links: bool,
    wholes: str = "classes",
) -> Splits:
    """The splits of the folder `top`, whose data are files of `suffixes`. Raises UserError, as `recognised` does, and
    where a split is a link that leads out of `top`."""
    real_root = os.path.realpath(top)

    def look(name: str) -> Contents:
        if not follow_links and not inside(real_root, str(top / name)):
            return Contents(False, frozenset())
        folders, files = folders_and_files(top / name, suffixes)
        filled = (inner for inner in folders if holds(top / name / inner, suffixes, real_root, follow_links))
        return Contents(bool(files), frozenset(filled))

    folders, files = folders_and_files(top, suffixes)
    splits = recognised(folders, bool(files), look, choice, f"data.root={top}", wholes)
    for name in splits.names:
        stays(top, top / name, follow_links)
    if choice == "auto" and len(folders) == 1 and not files and splits.train is None:
        warn_of_splits_below(top / folders[0], suffixes)
    return splits


def stays(top: Path, folder: Path, follow_links: bool) -> None:
    """Raises UserError where a folder of `top` is a link that leads out of it, unless links are to be followed."""
    if not follow_links and not inside(os.path.realpath(top), str(folder)):
        raise UserError(
            f"data.root={top}: the folder {printable(str(folder.relative_to(top)))} is a link that leads out of it. "
            "Type data.follow_links=true to take what it leads to."
        )


def warn_of_splits_below(only: Path, suffixes: tuple[str, ...]) -> None:
    """Says where the only folder of a data set is what holds the splits."""
    groups = by_name(folders_and_files(only, suffixes)[0])
    if any(group["train"] and group["val"] for group in groups.values()):
        log.warning(
            "data.root=%s holds one folder, %s, and all its images are taken, those of its splits too: give "
            "data.root=%s to train on the images of training alone",
            *(only.parent, printable(only.name), printable(str(only))),
        )
