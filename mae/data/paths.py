"""Folders and files of a data set: its root, what it holds, where links lead, the cache."""

import os
from collections.abc import Iterable
from pathlib import Path

from mae.errors import UserError
from mae.runs.file_system import user_cache

# Folders and files that programs and file systems leave for themselves
NOTES = ("__MACOSX", "__meta__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db")


def given_root(root: str | None, must_exist: bool = True) -> Path:
    """`data.root` as a directory that is there; raises UserError."""
    if root is None:
        raise UserError("data.root is not set: give the directory of the images, as data.root=DIR.")
    try:
        path = Path(root).expanduser()
        if path.exists() and not path.is_dir():
            raise UserError(f"data.root={root} is a file, not a directory.")
        if must_exist and not path.is_dir():
            what = "is a link that leads to nothing" if path.is_symlink() else "does not exist"
            raise UserError(f"data.root={root} {what}: give the directory of the images.")
        if path.is_dir():
            os.scandir(path).close()
            os.stat(os.path.join(path, "."))  # needs the right to go in, beside that to list
    except (OSError, RuntimeError) as error:  # the latter of a home that is not there
        raise UserError(f"data.root={root} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    return path


def hidden(path: str) -> bool:
    """Whether a part of a relative path is hidden, or is what macOS (`._NAME`, `__MACOSX`), webdataset (`__meta__`) and
    others leave among the data. Such files are no images, shards or labels."""
    return any(name in NOTES or name[:1] == "." and name not in (".", "..") for name in path.split("/"))


def printable(name: str) -> str:
    """A name in one line of text, whatever bytes it is of."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or leads to one; a link that leads to itself or to nothing is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def status_of(path: str | Path) -> os.stat_result:
    """What a folder is. Raises UserError where that cannot be read."""
    try:
        return os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"data.root: the folder {printable(str(path))} cannot be read: {error.strerror}.")


def entries_of(path: str | Path) -> list[os.DirEntry]:
    """What a folder holds, sorted, without what is hidden. Raises UserError where it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return sorted((entry for entry in entries if not hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise unreadable(path, error) from error


def folders_and_files(path: str | Path, suffixes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The names of a folder's sub-folders and of its files of `suffixes`."""
    folders, files = [], []
    for entry in entries_of(path):
        if is_folder(entry):
            folders.append(entry.name)
        elif entry.name.lower().endswith(suffixes):
            files.append(entry.name)
    return folders, files


def holds(path: str | Path, suffixes: tuple[str, ...], real_root: str, follow_links: bool) -> bool:
    """Whether a file of `suffixes` lies under a folder, at any depth; links are followed as `scan` does."""
    todo, seen = [str(path)], set()
    while todo:
        folder = todo.pop()
        status = status_of(folder)
        if (status.st_dev, status.st_ino) in seen or not follow_links and not inside(real_root, folder):
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files = folders_and_files(folder, suffixes)
        if files:
            return True
        todo.extend(os.path.join(folder, name) for name in folders)
    return False


def inside(real_root: str, path: str) -> bool:
    """Whether what `path` leads to is `real_root` or lies under it."""
    return os.path.commonpath([real_root, os.path.realpath(path)]) == real_root


def listed_itself(real_root: str, link: str) -> bool:
    """Whether the folder that a link leads to is listed by its own name too, which is that of its images' class."""
    return inside(real_root, link) and not hidden(os.path.relpath(os.path.realpath(link), real_root))


def text_lines(path: Path, name: str) -> list[str]:
    """The lines of a small text file that `name` says what it is. Raises UserError where it cannot be read."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{name} is not a regular file.")
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 ({error.reason}): save it as such.") from error


def cache_folder(cache_dir: str | None) -> Path:
    """`data.cache_dir`, or the user's own cache folder (never inside a data set)."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return user_cache()


def contained(name: str, root: object) -> str:
    """The name of a shard, which an index or a server tells. Raises UserError where it leads out of the root."""
    if os.path.isabs(name) or ".." in name.split("/") or "\0" in name:
        raise UserError(f"the shards in {root} name {name!r}, which leads out of data.root.")
    return name


def in_words(names: Iterable[str], most: int = 4) -> str:
    """Names of folders in words."""
    words = [printable(name) for name in names]
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} others"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) or "none"
