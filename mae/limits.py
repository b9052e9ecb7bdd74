"""Limits that a container, a cluster or a shell sets: cores, open files, shared memory. No torch."""

import contextlib
import errno
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mae.runs.file_system import system_error

FILES_ERRORS = (errno.EMFILE, errno.ENFILE)
OPEN_FILES = 65_536  # at most: some libraries loop over every number that is allowed
SHARED_MEMORY = Path("/dev/shm")
CGROUPS = Path("/sys/fs/cgroup")


# ---------------------------------------------------------------- cores


def cpus() -> int:
    """Cores that this process may use: the least of its affinity, its container's quota and its SLURM task."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK") or cores))  # where a step's tasks share its cores
    quota = cpu_quota()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def cpu_quota(groups: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores that the control groups (v1 or v2) of this process allow, as a fraction; None without a limit."""
    return min((quota for folder in _folders(groups, membership) for quota in _quotas(folder)), default=None)


def _folders(groups: Path, membership: Path) -> Iterator[Path]:
    """Folders of this process' control groups and of their parents. A container sees its own as the root."""
    paths = {"/"}
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                paths.add(path)
    inner = {PurePosixPath(path).relative_to("/") for path in paths if path.startswith("/") and ".." not in path}
    relatives = {parent for path in inner for parent in (path, *path.parents)}
    for mount in ("", "unified", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
        yield from (groups / mount / relative for relative in sorted(relatives))


def _quotas(folder: Path) -> Iterator[float]:
    """A group's own limit, in the files of v2 and of v1."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (folder / "cpu.max").read_text().split()
        yield float(quota) / float(period)  # "max" is no number
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota = float((folder / "cpu.cfs_quota_us").read_text())
        if quota > 0:
            yield quota / float((folder / "cpu.cfs_period_us").read_text())


# ---------------------------------------------------------------- files and memory


def open_files() -> int:
    """How many files this process may open at a time."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_open_files() -> None:
    """Raises the limit of open files of this process and its children to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < target:
        with contextlib.suppress(OSError, ValueError):  # macOS accepts less than it reports
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def too_many_open_files() -> str:
    """The sentence for a process that has reached its limit."""
    return (
        f"Too many open files: this process may open {open_files()} (ulimit -n). Raise that limit, as ulimit -n 4096, "
        "or choose data.workers=thread and a smaller data.num_workers."
    )


def limit_reached(error: BaseException) -> str:
    """A sentence for an error, of the system or of torch, about open files or shared memory; empty for others."""
    system, text = system_error(error), str(error)
    files = system is not None and system.errno in FILES_ERRORS
    if files or os.strerror(errno.EMFILE) in text or "ancdata" in text:
        return too_many_open_files()
    return little_shared_memory() if "shared memory" in text else ""


def shared_memory() -> int | None:
    """Free bytes of shared memory; None where the machine does not say."""
    try:
        stat = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


def little_shared_memory(needed: int | None = None) -> str:
    """The sentence for worker processes whose batches do not fit into shared memory."""
    free = shared_memory()
    has = "is full"
    if free is not None and needed is not None:
        has = f"has {free / 1e6:.1f} MB free, and they need {needed / 1e6:.1f}"
    return (
        f"data.workers=process: the batches of worker processes lie in {SHARED_MEMORY}, which {has}. Give it more (as "
        "docker run --shm-size=8g), or choose data.workers=thread, a smaller data.num_workers or data.prefetch."
    )
