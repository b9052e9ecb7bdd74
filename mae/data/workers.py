"""Who makes the batches: this process itself, threads, or processes. The batches are the same.

Decoding and resizing let go of Python's lock, so threads do them side by side and save what processes pay
for memory that they share: 0.4 of 2.4 ms an image of ImageNet, measured. But each image needs the lock for
some 0.07 ms, so that many threads slow down each other and the train loop. What uses the process' own random
generators (RandAugment) cannot run in threads at all.
"""

import logging
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # before Python 3.11 not the builtin
from contextlib import contextmanager

import numpy as np
import torch
import torch.multiprocessing
from torch.utils.data import DataLoader

from mae import limits
from mae.data.dataset import Batch, Failure, Loaded, Reader, Record
from mae.data.sampler import Ticket
from mae.data.settings import LoaderSettings
from mae.errors import UserError

log = logging.getLogger(__name__)

MAX_THREADS = 8  # above so many, `auto` takes processes
SMALL = 1 << 30  # bytes of shared memory: below so many, it is reckoned whether batches fit
FILES = 16  # that a batch on its way from a worker process may keep open
ENDING_S = 5.0  # how long the end of threads is waited for: one may hang on dead storage


class Tickets:
    """Where work comes from; it can be set to another place between passes."""

    def __init__(self, make: Callable[[], Iterator[Ticket]]):
        self.make = make

    def __iter__(self) -> Iterator[Ticket]:
        return self.make()


class Threads:
    """Batches in the order of their tickets, made by daemon threads up to `prefetch` batches each ahead.
    Daemons, because a thread that hangs on dead storage must not keep the program from ending."""

    def __init__(self, reader: Reader, tickets: Tickets, count: int, settings: LoaderSettings, pin_memory: bool):
        self.reader, self.tickets, self.count = reader, tickets, count
        self.ahead, self.timeout_s = count * settings.prefetch, settings.timeout_s
        self.device = torch.cuda.current_device() if pin_memory else None
        self.orders: queue.SimpleQueue = queue.SimpleQueue()  # of the pass that is going on
        self.over = threading.Event()
        self.threads: list[threading.Thread] = []

    def __iter__(self) -> Iterator[Loaded]:
        self.stop()  # one pass at a time
        self.orders, self.over = queue.SimpleQueue(), threading.Event()
        work = self.orders, self.over
        self.threads = [threading.Thread(target=self._work, args=work, daemon=True) for _ in range(self.count)]
        for thread in self.threads:
            thread.start()
        return self._in_order(self.orders, self.over)

    def stop(self) -> None:
        """Ends the threads, each after the image that it is at."""
        self.over.set()
        for _ in range(self.count):
            self.orders.put(None)

    def join(self, timeout_s: float) -> None:
        """Waits until they have ended: the interpreter aborts where it ends while one of them decodes."""
        until = time.monotonic() + timeout_s
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _in_order(self, orders: queue.SimpleQueue, over: threading.Event) -> Iterator[Loaded]:
        coming: deque[Future[Loaded]] = deque()
        tickets = iter(self.tickets)
        while not over.is_set():
            while len(coming) < self.ahead and (ticket := next(tickets, None)) is not None:
                coming.append(Future())
                orders.put((ticket, coming[-1]))
            if not coming:
                self.stop()
                return
            yield coming.popleft().result(self.timeout_s)

    def _work(self, orders: queue.SimpleQueue, over: threading.Event) -> None:
        if self.device is not None:
            torch.cuda.set_device(self.device)  # else pinning would take memory on the first device
            torch.set_num_threads(1)  # for copies to pinned memory, as in torch's own thread for that
        while (order := orders.get()) is not None and not over.is_set():
            ticket, future = order
            try:
                loaded = self.reader.load(ticket, over)
                if self.device is not None:
                    loaded = loaded._replace(batch={k: v.pin_memory() for k, v in loaded.batch.items()})
                future.set_result(loaded)
            except BaseException as error:  # raised where the batch is waited for
                future.set_exception(error)


def worker_count(num_workers: int | None) -> int:
    """`data.num_workers`, or one for each CPU that this process may use."""
    if num_workers is not None:
        return num_workers
    return max(1, limits.cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def makers(
    reader: Reader, tickets: Tickets, settings: LoaderSettings, images: int, pin_memory: bool
) -> DataLoader | Threads:
    """What gives a batch of up to `images` for each ticket when gone through. Raises UserError for threads that cannot
    be, and for processes whose batches do not fit into shared memory.

    For processes it is torch's loader, used for its workers alone; its own seeds come from a generator of
    its own, so that the main process' generators are left as they are.
    """
    count, workers, prefetch = worker_count(settings.num_workers), settings.workers, settings.prefetch
    draws = reader.transform.draws_itself
    if workers == "thread" and draws:
        raise UserError(
            "data.workers=thread: this augmentation draws from the process' own generators, which threads share. "
            "Use data.workers=process."
        )
    if count and not draws and (workers == "thread" or workers == "auto" and count <= MAX_THREADS):
        return Threads(reader, tickets, count, settings, pin_memory)
    need, room = shared_memory(reader, count * prefetch + 2, images) if count else (0, 1)
    if need > room and workers == "process":
        raise UserError(limits.little_shared_memory(need))
    if need > room // 2 and workers == "auto":  # the other half is the validation's
        instead = "this process itself makes them" if draws else f"{MAX_THREADS} threads make them"
        log.warning("%s has too little room for batches of worker processes: %s", limits.SHARED_MEMORY, instead)
        if not draws:
            return Threads(reader, tickets, MAX_THREADS, settings, pin_memory)
        count = 0
    if count and limits.open_files() < 128 + FILES * count * prefetch:
        torch.multiprocessing.set_sharing_strategy("file_system")  # which keeps no file open for each tensor
    return DataLoader(
        reader,
        sampler=tickets,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=count,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        timeout=settings.timeout_s if count else 0,
        generator=torch.Generator(),
        persistent_workers=count > 0,
        prefetch_factor=prefetch if count else None,
        worker_init_fn=_leave_signals_to_main,
    )


def shared_memory(reader: Reader, batches: int, images: int) -> tuple[int, int]:
    """Bytes that `batches` batches of up to `images` take, and those that this process has of shared memory. Where that
    is large, the first is not reckoned and 0."""
    free = limits.shared_memory()
    if free is None or free >= SMALL or not len(reader.source):
        return 0, 1
    batch, _, files = reader.load(Ticket(0, np.zeros(1, np.int64), 1.0))
    size = batch["image"].nbytes + (batch["label"].nbytes if batch["label"].ndim > 1 else 0)
    size += 0 if files is None else files.data.nbytes
    images = min(images, len(reader.source) * reader.repeats)
    return batches * images * size // len(batch["index"]), free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _leave_signals_to_main(worker: int) -> None:
    """Ctrl-C and a cluster's warning reach the whole process group: the main process decides when to stop."""
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if "SLURM_JOB_ID" in os.environ:  # which sends TERM to workers too, and KILL to what is left in the end
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _as_it_is(loaded: object) -> object:
    return loaded


@contextmanager
def naming_killed_workers() -> Iterator[None]:
    """Within, a worker process that was killed, or met a limit of the machine, is a UserError.

    torch tells the first by a signal, wherever the main process is just then."""
    try:
        yield
    except RuntimeError as error:
        if limit := limits.limit_reached(error):
            raise UserError(limit) from error
        if "DataLoader worker" in str(error) and ("exited unexpectedly" in str(error) or "is killed by" in str(error)):
            raise UserError(
                "a data worker was killed, most likely for lack of memory: try a smaller data.num_workers."
            ) from error
        raise


def received(
    iterator: Iterator[Loaded | Failure],
    record: Record,
    timeout_s: float,
    complete: Callable[[Loaded], Loaded] | None = None,
) -> Batch:
    """The next batch, with errors about workers in plain words. `complete` decodes the files that workers left."""
    try:
        with naming_killed_workers():
            loaded = next(iterator)
    except (EOFError, ConnectionError) as error:  # a worker process could open no file to hand a batch over
        raise UserError(limits.too_many_open_files()) from error
    except (RuntimeError, TimeoutError, FutureTimeoutError) as error:
        if isinstance(error, TimeoutError | FutureTimeoutError) or "timed out" in str(error):
            raise UserError(
                f"no batch came within data.timeout_s={timeout_s:g} s: the storage under data.root may hang."
            ) from error
        raise
    return record.receive(complete(loaded) if complete and isinstance(loaded, Loaded) else loaded)


def shut(made_by: DataLoader | Threads) -> None:
    """Ends the workers."""
    if isinstance(made_by, Threads):
        made_by.stop()
        made_by.join(ENDING_S)
        return
    iterator = made_by._iterator  # torch has no public way to end persistent workers
    if made_by.num_workers and iterator is not None:
        iterator._shutdown_workers()  # type: ignore[attr-defined]
        made_by._iterator = None
