"""The environment of a new job: without what the job around this process has set for itself."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from mae.runs import attempt

# The site's and the user's wishes (controller, account, partition), which hold in a job as on a login node
PASSED_ON = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
PASSED_ON += tuple(f"SBATCH_{name}" for name in ("ACCOUNT", "PARTITION", "QOS", "RESERVATION", "CONSTRAINT", "WCKEY"))
# Ranks and devices of a job's step, and variables that our own supervisor sets for its tasks
OF_STEPS = ("RANK_HOSTS", "MAE_SIGNAL_DELAY_S", attempt.NAME, "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
OF_STEPS += ("GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK", "GROUP_RANK", "ROLE_RANK", "GROUP_WORLD_SIZE")


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Within, the environment is that of a login node, also in a process of a job.

    sbatch and srun take options from `SLURM_*` and `SBATCH_*`, so a new job would get ranks, devices and limits of this
    one. Outside of a job nothing changes: there these variables are the user's own wishes.
    """
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    from submitit.helpers import clean_env

    before = dict(os.environ)
    with clean_env():
        for name in OF_STEPS:
            os.environ.pop(name, None)
        os.environ.update({name: before[name] for name in PASSED_ON if name in before})
        try:
            yield
        finally:
            os.environ.update({name: before[name] for name in OF_STEPS if name in before})
