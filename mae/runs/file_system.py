"""What a run needs of its file system: tried when it begins, and replaced where a run can do without. No torch."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mae.errors import UserError
from mae.runs.locks import flock_error

Result = TypeVar("Result")

FULL = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
}
NOT_FLUSHED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # there is no fsync of this kind of file
NOT_OPENED = (errno.EACCES, errno.EPERM, errno.EISDIR)  # a folder that cannot be opened as a file is
BEST_EFFORT = (*NOT_FLUSHED, *NOT_OPENED)


def flush(path: Path) -> OSError | None:
    """Waits until a file's bytes, or a folder's names, are on the disk. Returns the error where there is no such
    operation; raises OSError where the disk does not take them."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (BEST_EFFORT if path.is_dir() else NOT_FLUSHED):
            raise
        return error
    return None


def point_to(path: Path, link: Path) -> None:
    """Makes `link` a symbolic link to its neighbour `path`, replacing an earlier one at once; a copy of it where the
    file system has no links."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    remove(temporary)
    try:
        temporary.symlink_to(path.name)
    except OSError:
        shutil.copytree(path, temporary, copy_function=hard_link)
    if link.is_dir() and not link.is_symlink():  # a copy, as this function or scp makes one
        shutil.rmtree(link)
    temporary.replace(link)


def hard_link(source: str, target: str) -> None:
    """The same file under a second name, or its copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def user_cache() -> Path:
    """The user's folder for what can be fetched or computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae"


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- errors


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error behind a library's own: torch chains it, Rust's libraries write its number."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno is not None:
            return link
        if number := re.search(r"\(os error (\d+)\)", str(link)):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        link = link.__cause__ or link.__context__
    words = str(error)  # of another process, or of a C++ library
    return next((OSError(n, os.strerror(n)) for n in FULL if os.strerror(n) in words), None)


def full_disk(error: BaseException) -> str:
    """A sentence where an error says that the disk is full or the quota used up; empty for others."""
    system = system_error(error)
    if system is None or system.errno not in FULL:
        return ""
    disk = f" on the disk of {system.filename}" if system.filename else ""
    return f"{FULL[system.errno]}. What was saved before is whole; make room{disk} and start the same command again."


# ---------------------------------------------------------------- tried once


def check_needs(run: Path) -> list[str]:
    """Tries in a run's directory what the run will do there. Returns a warning for each thing that is missing and can
    be done without; raises ValueError for the others."""
    trial = run / "checkpoints" / f".try.{secrets.token_hex(4)}"
    moved, link = trial.with_suffix(".moved"), trial.with_suffix(".link")
    try:
        _step("a file cannot be written", run, lambda: _write(trial))
        flushed = _step("a file cannot be flushed", run, lambda: flush(trial / "file") or flush(trial))
        _step("a file cannot be replaced by renaming", run, lambda: (trial / "new").replace(trial / "file"))
        _step("a folder cannot be renamed", run, lambda: trial.rename(moved))
        linked = _attempt(lambda: link.symlink_to(moved.name))
        locked = flock_error(run)
    finally:
        for path in (trial, moved, link):
            remove(path)
    warnings = []
    if flushed is not None:
        warnings.append(f"cannot flush folders ({flushed.strerror}): a loss of power may cost the newest checkpoint")
    if linked is not None:
        warnings.append(f"has no symbolic links ({linked.strerror}): checkpoints/best is a copy of the best checkpoint")
    if locked is not None:
        warnings.append(f"has no file locks ({locked.strerror}): lock files named *.soft stand in for them")
    return [f"the file system of {run} {warning}" for warning in warnings]


def _write(folder: Path) -> None:
    folder.mkdir()
    for name in ("file", "new"):
        (folder / name).write_text("a full disk shows here")


def _attempt(deed: Callable[[], object]) -> OSError | None:
    try:
        deed()
    except OSError as error:
        return error
    return None


def _step(what: str, run: Path, deed: Callable[[], Result]) -> Result:
    try:
        return deed()
    except OSError as error:
        raise UserError(
            full_disk(error) or f"output_dir: {what} in {run} ({error.strerror}). Choose another output_dir."
        ) from error
