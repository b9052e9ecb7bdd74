"""Ranks: start-up, reductions, decisions all ranks share, and signals that ask a run to stop."""

import datetime
import inspect
import itertools
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous as environment_store
from torch.nn.parallel import DistributedDataParallel

from mae import device as devices
from mae.distributed.watchdog import Watchdog, watchdog

log = logging.getLogger(__name__)

RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # the older name then warns
UNSYNCED: Any = {"forward_sync_buffers" if RENAMED else "broadcast_buffers": False}


STARTS = itertools.count()  # of this process


@dataclass
class Ranks:
    """This process among the others of its run."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    control: Any = None  # a group on the CPU for decisions, beside the one that carries gradients
    sharding: str = "none"
    timeout_s: float = 600.0
    _watchdog: Watchdog | None = field(default=None, repr=False)
    _pending: tuple[Tensor, Any] | None = field(default=None, repr=False)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module, accumulating: bool) -> nn.Module:
        """The module with gradients averaged over ranks at the end of each step's backward pass.

        With `sharding="full"` also its weights, and what the optimizer makes of them, are spread over ranks.
        """
        if self.world == 1:
            return module
        if self.sharding == "full":
            from mae.distributed.fsdp import shard  # seconds to import

            return shard(module, self.device)
        ids = [self.device.index] if self.device.type == "cuda" else None
        # a static graph wants gradients exchanged in its first pass, which an accumulating step does not do
        return DistributedDataParallel(
            module,
            device_ids=ids,
            gradient_as_bucket_view=True,
            static_graph=not accumulating,
            **UNSYNCED,  # the probe's statistics are the same everywhere
        )

    def accumulating(self, module: Any, more: bool) -> Any:
        """Leaves gradients local while more micro-batches of the same step follow."""
        if self.world > 1 and self.sharding == "full":
            module.set_requires_gradient_sync(not more)
            return nullcontext()
        return module.no_sync() if more and isinstance(module, DistributedDataParallel) else nullcontext()

    @contextmanager
    def watched(self, run: Path) -> Iterator[None]:
        """Within, a rank that does not call `alive` for `timeout_s` ends the run (see `mae.distributed.watchdog`)."""
        if self.world == 1:
            yield
            return
        with watchdog(self.rank, self.world, self.timeout_s, run / "log.txt") as self._watchdog:
            yield
        self._watchdog = None

    def alive(self) -> None:
        """This rank has advanced."""
        if self._watchdog is not None:
            self._watchdog.count += 1

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Within, a rank may take as long as it likes without a step."""
        if self._watchdog is not None:
            self._watchdog.paused = True
        yield
        if self._watchdog is not None:
            self._watchdog.paused = False

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.control)

    def agree(self, *wishes: bool) -> list[bool]:
        """Whether any rank had each wish, one call ago: the exchange runs while the step computes.

        Every rank gets the same answer at the same step, so that none branches alone; a wish is
        answered at the next call. With one rank, at once.
        """
        if self.world == 1:
            return list(wishes)
        mine = torch.tensor(wishes, dtype=torch.int32)
        previous, self._pending = (
            self._pending,
            (mine, dist.all_reduce(mine, dist.ReduceOp.MAX, self.control, True)),
        )
        if previous is None:
            return [False] * len(wishes)
        agreed, work = previous
        work.wait()
        return [bool(flag) for flag in agreed.tolist()]

    def close(self) -> None:
        if self.world > 1:
            if self._pending is not None:
                self._pending[1].wait()
            dist.destroy_process_group()


def start(
    device: str,
    *,
    timeout_s: Annotated[float, "(0, inf)"],
    rendezvous_timeout_s: Annotated[float, "[1, inf)"],
    sharding: Literal["none", "full"],
) -> Ranks:
    """Joins the other ranks, as torchrun's environment variables name them.

    An exchange that takes longer than `timeout_s` ends the run; `sharding="full"` spreads weights over ranks. Raises
    ValueError where there is no such device, Absent where ranks do not come within `rendezvous_timeout_s`.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    here = devices.pick(device, local)
    if world == 1:
        return Ranks(here)
    timeout = datetime.timedelta(
        seconds=1.5 * timeout_s
    )  # so that the watchdog, which knows who is late, says it first
    backend = "nccl" if here.type == "cuda" else "gloo"
    if "TORCHELASTIC_RUN_ID" in os.environ:  # whose agent has gathered the ranks already
        found, *_ = next(environment_store("env://", rank, world, timeout=timeout))
        store = PrefixStore(f"start_{next(STARTS)}", found)  # at the same store, a pipeline's stages meet one by one
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    else:
        store = rendezvous(rank, world, rendezvous_timeout_s)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    return Ranks(here, rank, world, local, dist.new_group(backend="gloo", timeout=timeout), sharding, timeout_s)


class Absent(RuntimeError):
    """Some ranks did not come to the rendezvous in time."""

    def __init__(self, missing: list[int], where: str, seconds: float):
        hosts = os.environ.get("RANK_HOSTS", "").split(",")
        named = [f"{rank} ({hosts[rank]})" if rank < len(hosts) and hosts[rank] else str(rank) for rank in missing[:16]]
        more = f" and {len(missing) - 16} others" if len(missing) > 16 else ""
        super().__init__(
            f"Rank{'s' * (len(missing) > 1)} {', '.join(named)}{more} never came to the rendezvous at {where} within "
            f"{seconds:g} s: look at their logs, or raise launcher.rendezvous_timeout_s."
        )


def rendezvous(rank: int, world: int, seconds: float) -> TCPStore:
    """The store through which ranks find each other, once all are there. Raises Absent.

    Waits in slices, so that a signal is seen in between: torch's own wait cannot be interrupted.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where, end, store = f"{host}:{port}", time.monotonic() + seconds, None
    while store is None:
        left = datetime.timedelta(seconds=max(1.0, min(5.0, end - time.monotonic())))
        try:
            store = TCPStore(host, port, None, rank == 0, left, wait_for_workers=False)
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
            if rank == 0:
                raise RuntimeError(f"rank 0 cannot listen at {where}: {error}") from error
            if time.monotonic() > end:
                raise Absent([0], where, seconds) from error
    store.set(f"here/{rank}", "")
    while not store.check(["complete"]):
        if rank == 0:
            missing = [other for other in range(world) if not store.check([f"here/{other}"])]
            if not missing:
                store.set("complete", "")
            elif time.monotonic() > end:
                raise Absent(missing, where, seconds)
        elif time.monotonic() > end + 5:  # rank 0 says it first
            raise Absent([r for r in range(world) if not store.check([f"here/{r}"])], where, seconds)
        time.sleep(0.1)
    store.set_timeout(datetime.timedelta(seconds=seconds))
    return store


PEER = re.compile(r"connection (closed|reset|refused|was|broken)|broken pipe|timed out|socket|gloo|nccl", re.I)


def lost_peer(error: BaseException) -> bool:
    """Whether an error says only that another rank is gone, or was never there: not this rank's own fault."""
    if isinstance(error, Absent | dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return type(error) is RuntimeError and PEER.search(str(error)) is not None


def assert_same(ranks: Ranks, digest: str, what: str) -> None:
    """Raises RuntimeError where ranks hold different things that must be equal, such as initial weights."""
    digests = ranks.gather(digest)
    if len(set(digests)) > 1:
        raise RuntimeError(f"ranks start from different {what}: {digests}")


class Interruption:
    """Turns SIGTERM, SIGUSR2 and Ctrl-C into a flag that the train loop reads between steps.

    A second Ctrl-C interrupts at once: one that comes a second later, since a rank hears the same one from the
    terminal and from its launcher. Earlier handlers are put back at the end.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    SAME_S = 1.0

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.received_at = 0.0
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler if isinstance(handler, Callable | int) else signal.SIG_DFL)

    def _note(self, number: int, frame: Any) -> None:
        again = self.received is signal.SIGINT and number == signal.SIGINT
        if again and time.monotonic() - self.received_at < self.SAME_S:
            return
        self.received, self.received_at = signal.Signals(number), time.monotonic()
        if again:
            raise KeyboardInterrupt
