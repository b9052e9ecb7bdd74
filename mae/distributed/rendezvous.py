"""How ranks meet before a run, and whose fault it is when one of them is gone."""

import datetime
import os
import re
import time

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from mae.device import out_of_memory
from mae.errors import UserError

PEER = re.compile(r"connection (closed|reset|refused|was|broken)|broken pipe|timed out|socket|gloo|nccl", re.I)


class Absent(UserError):
    """Some ranks did not come to the rendezvous in time."""

    def __init__(self, missing: list[int], address: str, seconds: float):
        hosts = os.environ.get("RANK_HOSTS", "").split(",")
        names = [f"{rank} ({hosts[rank]})" if rank < len(hosts) and hosts[rank] else str(rank) for rank in missing[:16]]
        more = f" and {len(missing) - 16} others" if len(missing) > 16 else ""
        super().__init__(
            f"Rank{'s' * (len(missing) > 1)} {', '.join(names)}{more} never came to the rendezvous at {address} within "
            f"{seconds:g} s: look at their logs, or raise launcher.rendezvous_timeout_s."
        )


def rendezvous(rank: int, world: int, seconds: float) -> TCPStore:
    """The store through which ranks exchange addresses, once all ranks are there. Raises Absent.

    It polls, since torch's own wait cannot be interrupted by a signal.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    address, end, store = f"{host}:{port}", time.monotonic() + seconds, None
    while store is None:
        left = datetime.timedelta(seconds=max(1.0, min(5.0, end - time.monotonic())))
        try:
            store = TCPStore(host, port, None, rank == 0, left, wait_for_workers=False)
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
            if rank == 0:
                raise RuntimeError(f"rank 0 cannot listen at {address}: {error}") from error
            if time.monotonic() > end:
                raise Absent([0], address, seconds) from error
    store.set(f"here/{rank}", "")
    while not store.check(["complete"]):
        if rank == 0:
            missing = [other for other in range(world) if not store.check([f"here/{other}"])]
            if not missing:
                store.set("complete", "")
            elif time.monotonic() > end:
                raise Absent(missing, address, seconds)
        elif time.monotonic() > end + 5:  # so that rank 0 reports first
            raise Absent([r for r in range(world) if not store.check([f"here/{r}"])], address, seconds)
        time.sleep(0.1)
    store.set_timeout(datetime.timedelta(seconds=seconds))
    return store


def lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone, or never came: not this rank's own fault.

    NCCL reports a lack of memory on this rank by the same type of error.
    """
    if out_of_memory(error):
        return False
    if isinstance(error, Absent | dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return type(error) is RuntimeError and PEER.search(str(error)) is not None
