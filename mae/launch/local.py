"""The launchers on this machine: a run in this process, or in several that torch's elastic launcher starts."""

import logging
import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated


def work(run: str) -> int:
    """Runs one process of a run; the engine, and with it torch, is imported here and not before."""
    from torch.distributed.elastic.multiprocessing.errors import record

    from mae import engine

    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return engine.work(Path(run))
    with ends_with_launcher():
        code = record(engine.work)(Path(run))
    assert isinstance(code, int)
    return code


def rank_work(run: str) -> int:
    """`work` for torch's launcher, which would wait forever for the result of a process that Ctrl-C ended."""
    try:
        return work(run)
    except KeyboardInterrupt:  # before the run handles signals itself
        return 128 + signal.SIGINT


@contextmanager
def ends_with_launcher() -> Iterator[None]:
    """Within, a rank whose launcher is gone is asked to stop, and ends when it has.

    torch's launcher, killed alone, leaves ranks behind that would wait forever for it to take their results.
    """
    launcher, finished = os.getppid(), threading.Event()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        if not finished.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
        finished.wait()
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        finished.set()


def inline(run: Path) -> int:
    """Runs in this very process."""
    return work(str(run))


def local(run: Path, *, processes: Annotated[int, "[1, inf)"]) -> int:
    """Runs in `processes` processes of this machine; where torchrun started us, as one of its processes."""
    if processes == 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return work(str(run))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from mae import limits
    from mae.distributed.signals import Interruption
    from mae.launch.errors import RankFailed
    from mae.runs.failure import read_failure

    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # `RankFailed` reports it in one sentence
    settings = LaunchConfig(
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    if hasattr(settings, "signals_to_handle"):  # we forward the others ourselves
        settings.signals_to_handle = "SIGHUP,SIGQUIT"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, limits.cpus() // processes)))
    with forwarded(Interruption.SIGNALS) as received:
        try:
            return max(elastic_launch(settings, rank_work)(str(run)).values())
        except ChildFailedError as error:
            if received:  # before the ranks could handle it, or a second Ctrl-C
                return 128 + received[0]
            rank, failure = error.get_first_failure()
            first = read_failure(run)  # the launcher may report a rank whose peer is gone before the peer
            if first is not None and first["rank"] in error.failures and not first["lost_peer"]:
                rank, failure = first["rank"], error.failures[first["rank"]]
            raise RankFailed(rank, failure, run) from error
        except SignalException as error:
            return 128 + error.sigval


@contextmanager
def forwarded(signals: tuple[int, ...]) -> Iterator[list[int]]:
    """Within, signals that ask a run to stop are forwarded to its ranks, and listed.

    The ranks save and return. torch's launcher would ignore their results, and kill them after a time.
    """
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        ranks = multiprocessing.active_children()
        for process in ranks:
            if process.pid is not None:
                os.kill(process.pid, number)
        if not ranks:
            raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()  # no other may set a handler
    previous = {number: signal.signal(number, forward) for number in signals if main}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
