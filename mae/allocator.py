"""How glibc hands memory back between steps on the CPU."""

import ctypes
import logging
import sys

log = logging.getLogger(__name__)

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # names of mallopt(3), numbers of malloc.h
LARGEST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process, so that the next step writes to pages it has; True if it took.

    By default glibc returns every large tensor to the kernel when it is freed. A training step on the CPU then
    spends a tenth of its time and more on faulting the same pages in again. Costs: the process keeps its peak.
    """
    return _mallopt({MMAP_MAX: 0, TRIM_THRESHOLD: LARGEST})


def return_freed_memory() -> bool:
    """What glibc does by itself once it has seen large blocks freed (its sliding thresholds at their ends)."""
    return _mallopt({MMAP_MAX: 65536, MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20})


def _mallopt(options: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    done = mallopt is not None and all(mallopt(key, value) == 1 for key, value in options.items())
    if not done:
        log.info("This C library's allocator cannot be tuned; steps on the CPU are up to a tenth slower.")
    return done
