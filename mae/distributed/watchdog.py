"""Ends a run of several ranks of which one hangs, and says which and where.

Each rank counts its own advances, and a thread sends the count to the others. When nothing has moved for `timeout_s`
seconds, the rank that is behind writes its stack to the run's log.txt and exits; the launcher ends the others. A rank
that cannot do even that (stopped, lost) is named by one that waits for it.
"""

import faulthandler
import os
import threading
import time
from pathlib import Path

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed import distributed_c10d as c10d
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

PATIENCE = 1.25  # those who wait leave this much later than the one they wait for


class Watchdog:
    """Watches this rank and, through the store of the rendezvous, the others."""

    def __init__(self, store: Store, rank: int, world: int, timeout_s: float, log: Path):
        self.store, self.rank, self.world, self.timeout_s, self.log = store, rank, world, timeout_s, log
        self.count, self.paused = 0, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        self.store.set(self._key(self.rank), "0")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _key(self, rank: int) -> str:
        return f"advances/{rank}"

    def _watch(self) -> None:
        sent, since = -1, time.monotonic()
        while not self._stop.wait(min(2.0, self.timeout_s / 10)):
            if self.count != sent or self.paused:
                sent, since = self.count, time.monotonic()
                self.store.set(self._key(self.rank), str(sent))
                continue
            still = time.monotonic() - since
            if still < self.timeout_s:
                continue
            behind = self.behind()
            if self.rank in behind or still > PATIENCE * self.timeout_s:
                self._leave(behind, still)

    def behind(self) -> list[int]:
        """Ranks that have advanced least."""
        counts = [int(self.store.get(self._key(rank))) for rank in range(self.world)]
        return [rank for rank, count in enumerate(counts) if count == min(counts)]

    def _leave(self, behind: list[int], still: float) -> None:
        if self.rank in behind:
            text = f"process {self.rank} has not moved for {still:.0f} s; where it stands is in the run's log.txt"
        else:
            names = " and ".join(map(str, behind))
            text = f"process {names} has not moved for {still:.0f} s and does not answer: it was stopped, or lost"
        with self.log.open("a") as file:
            file.write(f"rank {self.rank}: {text}\n")
            file.flush()
            faulthandler.dump_traceback(file)
        handler = get_error_handler()
        handler.initialize()
        try:
            raise TimeoutError(f"{text} (launcher.timeout_s={self.timeout_s:g}).")
        except TimeoutError as error:  # raised, so that torchrun too has a traceback to show
            handler.record_exception(error)
        os._exit(1)  # the main thread is stuck, perhaps inside of a library


def watchdog(rank: int, world: int, timeout_s: float, log: Path) -> Watchdog:
    """A watchdog on a connection of its own to the rendezvous' store."""
    store = c10d._get_default_store()  # torch offers no public way to it
    return Watchdog(c10d.PrefixStore("watchdog", store.clone()), rank, world, timeout_s, log)
