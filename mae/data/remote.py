"""Large files at a URL that fsspec reaches, fetched whole into a local cache while in use."""

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, TypeVar

from filelock import BaseFileLock

from mae.data.paths import contained, hidden
from mae.data.source import BadImage
from mae.errors import UserError
from mae.runs.file_system import full_disk
from mae.runs.locks import file_lock

Read = TypeVar("Read")  # what an operation on a file gives
log = logging.getLogger(__name__)

CHUNK = 4 << 20  # bytes a read
PAUSE = 0.5  # seconds before the second try; doubled each time
PATIENCE = 16.0  # seconds: the longest pause
# What fsspec's places tell of a file's version: S3 and HTTP, GCS, Azure, sftp and folders
VERSIONS = ("ETag", "etag", "LastModified", "Last-Modified", "Content-MD5", "generation", "last_modified", "mtime")
FORGIVEN_AFTER = 300.0  # seconds until a shard that failed is tried again


class Remote:
    """Shards at a URL. One that is wanted is fetched whole, under its own name, into `cache`, which all
    processes of a machine share and which is kept below `cache_gb`; the oldest go first."""

    def __init__(self, root: str, cache: Path, cache_gb: float, retry_s: float):
        self.url, self.cache_gb, self.retry_s = root.rstrip("/"), cache_gb, retry_s
        self.location = self.url
        self._fs, self._fs_owner = None, -1
        self.root = self.fs._strip_protocol(self.url)
        self.cache = cache / "shards" / hashlib.sha256(root.encode()).hexdigest()[:20]
        self.begun = time.time()
        self._coming: dict[str, Future] = {}

    def __getstate__(self) -> Mapping[str, object]:
        return vars(self) | {"_coming": {}, "_fs": None}

    def check(self, name: str) -> None:
        """Raises UserError for a name that would lead out of the cache."""
        contained(name, self.url)

    @property
    def fs(self) -> Any:
        """fsspec's file system; each process needs one of its own. Raises UserError."""
        if self._fs is None or self._fs_owner != os.getpid():
            try:
                import fsspec  # an extra
            except ImportError as error:
                raise UserError(f"data.root={self.url} is remote, which needs fsspec: pip install fsspec.") from error
            try:
                self._fs = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)[0]
            except (ImportError, ValueError) as error:
                raise UserError(f"data.root={self.url} cannot be opened: {error}.") from error
            self._fs_owner = os.getpid()
        return self._fs

    def path(self, name: str, size: int) -> str:
        """Where the bytes of a shard can be read, fetched if need be. Raises BadImage when tries run out."""
        if (coming := self._coming.pop(name, None)) is not None and not coming.cancel():
            with contextlib.suppress(BadImage):
                coming.result()
        return self._fetched(name, size)

    def ahead(self, name: str, size: int) -> None:
        """Starts to fetch a shard in the background."""
        if name in self._coming or (self.cache / name).exists():
            return
        coming = self._coming[name] = Future()
        threading.Thread(target=self._fetch, args=(coming, name, size), daemon=True).start()

    def _fetch(self, coming: Future, name: str, size: int) -> None:
        """By a daemon: a place that hangs must not keep the program from ending."""
        if coming.set_running_or_notify_cancel():
            try:
                coming.set_result(self._fetched(name, size))
            except BaseException as error:  # raised where the shard is waited for
                coming.set_exception(error)

    def read(self, name: str) -> bytes:
        """A small file. Raises FileNotFoundError, and OSError when tries run out."""
        return self._tried(name, lambda: self.fs.cat_file(f"{self.root}/{name}"))

    def has(self, name: str) -> bool:
        """Whether a file is there. Raises OSError when tries run out."""
        return self._tried(name, lambda: self.fs.exists(f"{self.root}/{name}"))

    def open(self, name: str) -> IO[bytes]:
        return self.fs.open(f"{self.root}/{name}", "rb")

    def names(self, pattern: str = "*.tar") -> list[str]:
        """The shards, sorted; or other files, at any depth for `**/*`."""
        start = len(self.root) + 1
        names = self._tried("", lambda: sorted(p[start:] for p in self.fs.glob(f"{self.root}/{pattern}")))
        return [name for name in names if not hidden(name)]

    def folders(self) -> list[str]:
        """The names of the folders, sorted. Raises OSError, and NotImplementedError where there are no listings."""
        entries = self._tried("", lambda: self.fs.ls(self.root, detail=True))
        names = (entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")
        return sorted(name for name in names if not hidden(name))

    def tried(self, name: str, deed: Callable[[], Read]) -> Read:
        """The result of a deed that reads a shard, tried again for `retry_s`. Raises OSError."""
        return self._tried(name, deed, known=True)

    def stamp(self, name: str) -> str:
        """Changes when the shard does, as far as its place tells."""
        about = self._tried(name, lambda: self.fs.info(f"{self.root}/{name}"), known=True)
        return "-".join(str(about[key]) for key in ("size", *VERSIONS) if about.get(key) is not None)

    def _fetched(self, name: str, size: int) -> str:
        path = self.cache / contained(name, self.url)
        self._refuse_failed(path)
        with locked(path):
            self._refuse_failed(path)  # while this one waited, perhaps
            if path.exists() and path.stat().st_size == size:
                os.utime(path)
                return str(path)
            try:
                self._tried(name, lambda: self._download(name, path, size), known=True)
            except OSError as error:
                why = f"the shard {name} cannot be fetched: {error}"
                log.warning("the shard %s is passed over: %s", name, error)
                _failure(path).write_text(why)
                raise BadImage(why) from error
        self._evict(path)
        return str(path)

    def _refuse_failed(self, path: Path) -> None:
        """Raises BadImage for a shard that failed a short while ago, in this run, in any process or thread."""
        with contextlib.suppress(FileNotFoundError):
            when = _failure(path).stat().st_mtime
            if when >= self.begun and time.time() - when < FORGIVEN_AFTER:
                raise BadImage(_failure(path).read_text())

    def _download(self, name: str, path: Path, size: int) -> None:
        temporary = path.with_name(f"{path.name}.part")
        with self.fs.open(f"{self.root}/{name}", "rb", block_size=CHUNK) as source, open(temporary, "wb") as file:
            while chunk := source.read(CHUNK):
                file.write(chunk)
        if temporary.stat().st_size != size:
            raise OSError(f"{temporary.stat().st_size} of its {size} bytes came")
        os.replace(temporary, path)

    def _tried(self, name: str, deed: Callable[[], Read], known: bool = False) -> Read:
        """The deed's result, tried again for `retry_s` seconds; also where a file is absent that is `known`
        to be there (its server may just be starting). Raises OSError."""
        give_up, pause = time.monotonic() + self.retry_s, PAUSE
        while True:
            try:
                return deed()
            except (ValueError, NotImplementedError):  # of what came, which is no better the next time
                raise
            except Exception as error:  # each protocol of fsspec has errors of its own
                if full := full_disk(error):  # that of the cache here, which no later try finds emptier
                    raise UserError(f"data.cache_dir: {full} Or lower data.cache_gb.") from error
                if isinstance(error, FileNotFoundError) and not known:
                    raise
                refused = isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)
                if refused or time.monotonic() + pause > give_up:
                    raise OSError(f"{type(error).__name__}: {error}") from error
                log.info("%s/%s: %s; tried again in %g s", self.url, name, error, pause)
            self.fs.invalidate_cache()
            time.sleep(pause)
            pause = min(PATIENCE, 2 * pause)

    def _evict(self, keep: Path) -> None:
        entries = []
        for path in self.cache.rglob(f"*{keep.suffix}"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                entries.append((path.stat().st_mtime, path.stat().st_size, str(path)))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.cache_gb * 1e9 or path == str(keep):
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # who has it open reads on
            total -= size


def _failure(path: Path) -> Path:
    """Where it is noted that a shard could not be fetched."""
    return path.with_name(f"{path.name}.failed")


def locked(path: Path) -> BaseFileLock:
    """One process or thread at a time fetches a file."""
    return file_lock(path.with_name(f"{path.name}.lock"))
