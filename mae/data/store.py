"""Where shards lie: a folder here, or a place that fsspec reaches, kept in a local cache while in use."""

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mae.data.source import BadImage

log = logging.getLogger(__name__)

CHUNK = 4 << 20  # bytes a read
PAUSE = 0.5  # seconds before the second try; doubled each time
PATIENCE = 16.0  # seconds: the longest pause
FORGIVEN_AFTER = 300.0  # seconds until a shard that failed is tried again


def is_remote(root: str) -> bool:
    """Whether a root is a URL."""
    return "://" in root


class Local:
    """Shards in a folder."""

    def __init__(self, root: Path):
        self.root = root

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

    def open(self, name: str) -> Any:
        return open(self.root / name, "rb")

    def names(self, pattern: str = "*.tar") -> list[str]:
        """The shards, sorted; or other files, at any depth for `**/*`."""
        return sorted(str(p.relative_to(self.root)) for p in self.root.glob(pattern))

    def stamp(self, name: str) -> str:
        """Changes when the shard does."""
        status = (self.root / name).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"


class Remote:
    """Shards at a URL. One that is wanted is fetched whole, under its own name, into `cache`, which all
    processes of a machine share and which is kept below `cache_gb`; the oldest go first."""

    def __init__(self, root: str, cache: Path, cache_gb: float, retry_s: float):
        self.url, self.cache_gb, self.retry_s = root.rstrip("/"), cache_gb, retry_s
        self._fs, self._fs_owner = None, -1
        self.root = self.fs._strip_protocol(self.url)
        self.cache = cache / "shards" / hashlib.sha256(root.encode()).hexdigest()[:20]
        self.failed: dict[str, tuple[float, str]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._pool_owner = -1  # process in which the pool's thread lives
        self._coming: dict[str, Future] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_pool": None, "_coming": {}, "_fs": None}

    @property
    def fs(self) -> Any:
        """fsspec's file system; each process needs one of its own. Raises ValueError."""
        if self._fs is None or self._fs_owner != os.getpid():
            try:
                import fsspec  # an extra
            except ImportError as error:
                raise ValueError(f"data.root={self.url} is remote, which needs fsspec: pip install fsspec.") from error
            try:
                self._fs = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)[0]
            except (ImportError, ValueError) as error:
                raise ValueError(f"data.root={self.url} cannot be opened: {error}.") from error
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
        if self._pool is None or self._pool_owner != os.getpid():
            self._pool, self._pool_owner = ThreadPoolExecutor(1), os.getpid()
        self._coming[name] = self._pool.submit(self._fetched, name, size)

    def read(self, name: str) -> bytes:
        """A small file. Raises FileNotFoundError, and OSError when tries run out."""
        return self._tried(name, lambda: self.fs.cat_file(f"{self.root}/{name}"))

    def open(self, name: str) -> Any:
        return self.fs.open(f"{self.root}/{name}", "rb")

    def names(self, pattern: str = "*.tar") -> list[str]:
        """The shards, sorted; or other files, at any depth for `**/*`."""
        start = len(self.root) + 1
        return self._tried("", lambda: sorted(p[start:] for p in self.fs.glob(f"{self.root}/{pattern}")))

    def stamp(self, name: str) -> str:
        """Changes when the shard does, as far as its place tells."""
        return str(self.fs.info(f"{self.root}/{name}").get("size"))

    def _fetched(self, name: str, size: int) -> str:
        path = self.cache / name
        when, why = self.failed.get(name, (-FORGIVEN_AFTER, ""))
        if time.monotonic() - when < FORGIVEN_AFTER:
            raise BadImage(why)
        with locked(path):
            if path.exists() and path.stat().st_size == size:
                os.utime(path)
                return str(path)
            try:
                self._tried(name, lambda: self._download(name, path, size), known=True)
            except OSError as error:
                self.failed[name] = time.monotonic(), f"the shard {name} cannot be fetched: {error}"
                log.warning("the shard %s is passed over: %s", name, error)
                raise BadImage(self.failed[name][1]) from error
        self._evict(path)
        return str(path)

    def _download(self, name: str, path: Path, size: int) -> None:
        temporary = path.with_name(f"{path.name}.part")
        with self.fs.open(f"{self.root}/{name}", "rb", block_size=CHUNK) as source, open(temporary, "wb") as file:
            while chunk := source.read(CHUNK):
                file.write(chunk)
        if temporary.stat().st_size != size:
            raise OSError(f"{temporary.stat().st_size} of its {size} bytes came")
        os.replace(temporary, path)

    def _tried(self, name: str, deed: Any, known: bool = False) -> Any:
        """The deed's result, tried again for `retry_s` seconds; also where a file is absent that is `known`
        to be there (its server may just be starting). Raises OSError."""
        give_up, pause = time.monotonic() + self.retry_s, PAUSE
        while True:
            try:
                return deed()
            except Exception as error:  # each protocol of fsspec has errors of its own
                if isinstance(error, FileNotFoundError) and not known:
                    raise
                if time.monotonic() + pause > give_up:
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


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time fetches a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process forked meanwhile has the file too, and never closes it
