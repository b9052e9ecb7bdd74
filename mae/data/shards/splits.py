"""Which shards are for training and which for validation: by their folders, as for images, or by their own names."""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from mae.data.paths import cache_folder, given_root
from mae.data.remote import Remote
from mae.data.settings import Choice, StoreSettings
from mae.data.splits import (
    WORDS,
    Contents,
    Splits,
    by_name,
    chosen,
    in_words,
    recognised,
    splits_of,
    typed,
)
from mae.data.store import Local, is_remote
from mae.errors import UserError

log = logging.getLogger(__name__)

INDEX = "index.bin"
SHARDS = (".tar",)
WHOLES = "folders to leave out"


class Opened(NamedTuple):
    """The shards of a split."""

    store: Local | Remote
    names: list[str] | None  # of the shards; None: all that lie in the store
    parted: bool  # whether training and validation have shards of their own
    name: str | None = None  # of the folder or the kind of shards that is the split; None where there is none


def opened(settings: StoreSettings, split: str, choice: Choice = "auto") -> Opened:
    """The shards of a split. Raises UserError where the root cannot be reached or can be read in two ways."""
    root = settings.root
    if root is None or not is_remote(root):
        top = given_root(root)
        folders = _folders(top, choice, settings.follow_links)
        if folders.train is not None:
            name = _named(folders, split)
            return Opened(Local(top / name, settings.follow_links), None, folders.val is not None, name)
        return _by_own_names(Local(top, settings.follow_links), split, choice)
    try:
        return _remote(root, settings, split, choice)
    except OSError as error:
        raise UserError(f"data.root={root} cannot be reached: {error}.") from error


def _folders(top: Path, choice: Choice, follow_links: bool) -> Splits:
    """The folders that are splits, whatever lies beside `train` and `val`."""
    if choice == "auto" and (top / "train").is_dir() and (top / "val").is_dir():
        return Splits("train", "val")
    return Splits() if _words(choice, Local(top).names()) else splits_of(top, SHARDS, choice, follow_links, WHOLES)


def _named(splits: Splits, split: str) -> str:
    return str(splits.val if split == "val" and splits.val is not None else splits.train)


def _remote(root: str, settings: StoreSettings, split: str, choice: Choice) -> Opened:
    def store(name: str = "") -> Remote:
        url = f"{root.rstrip('/')}/{name}" if name else root
        return Remote(url, cache_folder(settings.cache_dir), settings.cache_gb, settings.retry_s)

    def there(name: str) -> bool:
        try:
            return store(name).has(INDEX) or bool(store(name).names())  # of which the first asks for no listing
        except NotImplementedError:
            return False

    own = there(split) if choice == "auto" else False
    if own and (split == "val" or there("val")):
        return Opened(store(split), None, True, split)
    whole = store()
    try:
        names, folders = ([], []) if whole.has(INDEX) else (whole.names(), whole.folders())
    except NotImplementedError:
        return Opened(whole, None, False)
    if folders and not _words(choice, names):
        splits = recognised(
            folders, bool(names), lambda name: Contents(there(name), frozenset()), choice, f"data.root={root}", WHOLES
        )
        if splits.train is not None:
            name = _named(splits, split)
            return Opened(store(name), None, splits.val is not None, name)
    return _by_own_names(whole, split, choice)


# ---------------------------------------------------------------- names of shards: train-0000.tar, val-0000.tar


def _stem(name: str) -> str:
    return re.sub(r"\d+", "#", name.removesuffix(".tar"))


def _words(choice: Choice, names: list[str]) -> bool:
    """Whether `data.splits` names words of the shards' own names."""
    words = {match[1] for name in names if (match := WORDS.search(_stem(name).lower()))}
    return not isinstance(choice, str) and bool(choice) and set(choice) <= words


def _by_own_names(store: Local | Remote, split: str, choice: Choice) -> Opened:
    """The shards of one folder, parted where their names say so. Raises UserError where only some do."""
    root = f"data.root={store.root}"
    whole = Opened(store, None, False)
    if choice == "off":
        return whole
    try:
        names = store.names()
    except (OSError, NotImplementedError):  # without a listing there is an index
        return whole
    stems = {name: _stem(name) for name in names}
    words = {stem: match[1] for stem in stems.values() if (match := WORDS.search(stem.lower()))}
    if not isinstance(choice, str):
        splits = chosen(choice, words.values(), root)
    else:
        groups = [group for group in by_name(dict.fromkeys(stems.values())).values() if group["train"] and group["val"]]
        if not groups:
            return whole
        trains, vals = ([words[stem] for group in groups for stem in group[kind]] for kind in ("train", "val"))
        splits = Splits(trains[0], vals[0], tuple(dict.fromkeys(word for word in vals if word != vals[0])))
        others = [name for name in names if words.get(stems[name]) not in (*trains, *vals)]
        if others or len(set(trains)) > 1:
            raise UserError(
                f"{root} holds shards of {in_words(splits.names)} beside {in_words(others or trains[1:])}, which can "
                f"be read in two ways. Type {typed(splits.names)} to leave the others out, or data.splits=off to read "
                "all shards as one set of images."
            )
    name = _named(splits, split)
    shards = [shard for shard in names if words.get(stems[shard]) == name]
    return Opened(store, shards, splits.val is not None, f"{name} (the name of {len(shards)} shards)")
