"""Ranks: start-up, reductions, and decisions that all ranks share."""

import datetime
import inspect
import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous as environment_store
from torch.nn.parallel import DistributedDataParallel

from mae import device as devices
from mae.distributed.rendezvous import rendezvous
from mae.distributed.watchdog import Watchdog, watchdog
from mae.errors import UserError

RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # the older name then warns
UNSYNCED: dict[str, Any] = {"forward_sync_buffers" if RENAMED else "broadcast_buffers": False}
Item = TypeVar("Item")

STARTS = itertools.count()  # of this process


@dataclass
class Ranks:
    """This process among the others of its run."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    control: dist.ProcessGroup | None = None  # gloo on the CPU, for decisions; gradients use the default group
    sharding: str = "none"
    timeout_s: float = 600.0
    _watchdog: Watchdog | None = field(default=None, repr=False)
    _pending: tuple[Tensor, dist.Work] | None = field(default=None, repr=False)

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a shard of the weights, gradients and optimizer states."""
        return self.world > 1 and self.sharding != "none"

    def shard(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Shards the module where asked: over all ranks, or with `hybrid` over those of a node; see `fsdp.shard`."""
        if self.sharded:
            from mae.distributed.fsdp import shard  # seconds to import

            shard(module, self.device, dtype, self.ranks_of_a_node() if self.sharding == "hybrid" else self.world)

    def ranks_of_a_node(self) -> int:
        """How many ranks a host has. Raises UserError where hosts differ in it."""
        hosts = self.gather(socket.gethostname())
        sizes = {len(list(group)) for _, group in itertools.groupby(hosts)}
        if len(sizes) > 1:
            raise UserError(
                f"launcher.sharding=hybrid needs as many processes on each node, got {sorted(sizes)}: use full."
            )
        return sizes.pop()

    def wrap(self, module: nn.Module, accumulating: bool) -> nn.Module:
        """The module with gradients averaged over ranks at the end of each step's backward pass."""
        if self.world == 1 or self.sharded:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # a static graph wants gradients exchanged in its first pass, which an accumulating step does not do
        return DistributedDataParallel(
            module,
            device_ids=ids,
            gradient_as_bucket_view=True,
            static_graph=not accumulating,
            **UNSYNCED,  # the probe's statistics are the same everywhere
        )

    def accumulating(self, module: nn.Module, more: bool) -> AbstractContextManager[object]:
        """Leaves gradients local while more micro-batches of the same step follow."""
        if self.sharded:
            from torch.distributed.fsdp import FSDPModule  # seconds to import

            assert isinstance(module, FSDPModule)
            module.set_requires_gradient_sync(not more)
            return nullcontext()
        return module.no_sync() if more and isinstance(module, DistributedDataParallel) else nullcontext()

    @contextmanager
    def watched(self, run: Path) -> Iterator[None]:
        """Within, a rank that does not call `alive` for `timeout_s` ends the run (`mae.distributed.watchdog`)."""
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
        """Within, the watchdog does not expect steps."""
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

    def gather(self, value: Item) -> list[Item]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values = [value] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.control)

    def agree(self, *wishes: bool) -> list[bool]:
        """Whether any rank had each wish at the previous call; the exchange runs while the step computes.

        Every rank gets the same values at the same step, so that none branches alone. A single rank gets its own wishes
        at once.
        """
        if self.world == 1:
            return list(wishes)
        mine = torch.tensor(wishes, dtype=torch.int32)
        exchange = dist.all_reduce(mine, dist.ReduceOp.MAX, self.control, True)
        assert exchange is not None
        previous, self._pending = self._pending, (mine, exchange)
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
    sharding: Literal["none", "full", "hybrid"],
) -> Ranks:
    """Joins the other ranks, as torchrun's environment variables name them.

    An exchange that takes longer than `timeout_s` ends the run. Raises ValueError where the device does not exist, and
    Absent where ranks do not come within `rendezvous_timeout_s`.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    here = devices.pick(device, local)
    if world == 1:
        return Ranks(here)
    if here.type == "mps":
        raise UserError("device=mps is one device: launcher.processes must be 1, or use device=cpu.")
    timeout = datetime.timedelta(seconds=1.5 * timeout_s)  # later than the watchdog, which knows who is late
    backend, own_gpu = ("nccl", here) if here.type == "cuda" else ("gloo", None)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # whose agent has gathered the ranks already
        agent_store, *_ = next(environment_store("env://", rank, world, timeout=timeout))
        store = PrefixStore(f"start_{next(STARTS)}", agent_store)  # stages of a pipeline share the agent's store
    else:
        store = rendezvous(rank, world, rendezvous_timeout_s)
    if own_gpu is not None:
        check_own_gpu(store, rank, own_gpu)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world, device_id=own_gpu)
    dist.all_reduce(torch.zeros(1, device=here))  # connects now: NCCL's buffers are there before memory is measured
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)
    return Ranks(here, rank, world, local, control, sharding, timeout_s)


def check_own_gpu(store: Store, rank: int, device: torch.device) -> None:
    """Raises UserError where another rank uses the same GPU, which NCCL does not allow."""
    owner = store.compare_set(f"gpu/{devices.gpu_identity(device)}", "", str(rank)).decode()
    if owner != str(rank):
        raise UserError(
            f"device=cuda: processes {owner} and {rank} have the same GPU, since each sees that one alone. Use fewer "
            "processes (launcher.processes, launcher.tasks_per_node), or show each process a GPU of its own."
        )


def assert_same(ranks: Ranks, digest: str, what: str) -> None:
    """Raises RuntimeError where ranks differ in what must be equal, such as initial weights."""
    digests = ranks.gather(digest)
    if len(set(digests)) > 1:
        raise RuntimeError(f"ranks start from different {what}: {digests}")
