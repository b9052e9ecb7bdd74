"""Under Hydra's own `hydra/launcher=submitit_slurm`, which starts run.py's main once a task.

The tasks are joined to the ranks of one run. An error in any of them ends its process: the plugin would pickle the
exception, look at rank 0 alone, and let SLURM believe that all is well.
"""

import os
import signal
import sys

from mae.launch.slurm.job import ranks_from
from mae.launch.slurm.verdict import INTERRUPTED


def in_plugin_job() -> bool:
    """Whether the plugin started this process on a cluster."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and "SLURM_PROCID" in os.environ


def join() -> None:
    """Makes this task a rank: sets torchrun's variables from the job's node list and id."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    job = SlurmJobEnvironment()
    os.environ.update(ranks_from(os.environ))
    os.environ["MASTER_ADDR"] = job.hostnames[0]
    os.environ["MASTER_PORT"] = str(20000 + int(job.raw_job_id) % 12000)


def leave(code: int) -> None:
    """Ends a task that has not finished its run. Asked to stop, it lets submitit requeue the job, through rank 0."""
    sys.stdout.flush()
    sys.stderr.flush()
    handler = signal.getsignal(signal.SIGUSR2)
    if code == INTERRUPTED and os.environ["RANK"] == "0" and callable(handler):
        handler(signal.SIGUSR2, None)
    os._exit(0 if code == INTERRUPTED else code)
