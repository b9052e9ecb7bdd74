"""Where shards lie: a folder here, or a place that fsspec reaches, kept in a local cache while in use."""

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mae.data.paths import cache_folder, contained, given_root, hidden, inside
from mae.data.remote import Read, Remote
from mae.data.settings import StoreSettings
from mae.errors import UserError

log = logging.getLogger(__name__)


def is_remote(root: str) -> bool:
    """Whether a root is a URL."""
    return "://" in root


def is_hub_blob(path: str) -> bool:
    """Whether a path is a file of the Hub's cache: REPO/snapshots/REVISION/... is a link to a file in REPO/blobs."""
    folder = Path(os.path.realpath(os.path.dirname(path)))
    blobs = os.path.dirname(os.path.realpath(path))
    return any(above.name == "snapshots" and blobs == str(above.parent / "blobs") for above in folder.parents)


class Local:
    """Shards in a folder; those that links out of it name only with `follow_links`, or in the Hub's cache."""

    def __init__(self, root: Path, follow_links: bool = False):
        self.root, self.follow_links = root, follow_links
        self.location = os.path.realpath(root)

    def check(self, name: str) -> None:
        """Raises UserError for a shard outside the folder, or a link to one."""
        path = os.path.join(self.root, contained(name, self.root))
        if not (self.follow_links or inside(os.path.realpath(self.root), path) or is_hub_blob(path)):
            raise UserError(
                f"data.follow_links=true is needed: the shard {name} in {self.root} is a link that leads out of "
                "data.root."
            )

    def path(self, name: str, size: int) -> str:
        """Where the bytes of a shard can be read. Raises OSError."""
        path = os.path.join(self.root, name)
        if os.stat(path).st_size != size:
            raise OSError(f"the shard {path} is not the one that was indexed: its size has changed")
        return path

    def ahead(self, name: str, size: int) -> None:
        """Nothing to fetch."""

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
        return open(self.root / name, "rb")

    def names(self, pattern: str = "*.tar") -> list[str]:
        """The shards, sorted; or other files, at any depth for `**/*`."""
        paths = (path.relative_to(self.root) for path in self.root.glob(pattern))
        return sorted(str(path) for path in paths if not hidden(path.as_posix()))

    def tried(self, name: str, deed: Callable[[], Read]) -> Read:
        """The deed's result."""
        return deed()

    def stamp(self, name: str) -> str:
        """Changes when the shard does."""
        status = (self.root / name).stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file")
        return f"{status.st_size}-{status.st_mtime_ns}"


def open_store(root: str, settings: StoreSettings) -> Local | Remote:
    """The large files at a root. Raises UserError where it is no folder and no URL, OSError where it is not reached."""
    if is_remote(root):
        return Remote(root, cache_folder(settings.cache_dir), settings.cache_gb, settings.retry_s)
    return Local(given_root(root), settings.follow_links)
