"""The settings of `launcher=slurm`. conf/launcher/slurm.yaml explains each and holds its default."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

PLACEMENT = ("partition", "account", "qos", "constraint", "reservation")  # flags of every job of a submission


@dataclass(frozen=True, kw_only=True)
class SbatchFlags:
    """Flags of sbatch under their own names. A new one is a field here and a line in the YAML. One that every job
    of a submission needs, such as the partition, stands in `PLACEMENT` as well."""

    nodes: Annotated[int, "[1, inf)"]
    gpus_per_node: Annotated[int, "[0, inf)"]
    cpus_per_task: Annotated[int, "[1, inf)"]
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    exclude: str | None
    reservation: str | None
    dependency: str | None


@dataclass(frozen=True, kw_only=True)
class SlurmSettings(SbatchFlags):
    """Size and limits of a job, and how it is submitted and watched."""

    tasks_per_node: Annotated[int, "[1, inf)"] | None
    mem_gb: Annotated[float, "[0, inf)"] | None
    timeout_min: Annotated[int, "[1, inf)"]
    additional_parameters: dict
    srun_args: list[str]
    setup: list[str]
    python: str | None
    array_parallelism: Annotated[int, "[1, inf)"]
    max_requeues: Annotated[int, "[0, inf)"]
    signal_delay_s: Annotated[int, "[1, 65535]"]
    nccl_interface: str | None
    gloo_interface: str | None
    probe_s: Annotated[int, "[0, inf)"]
    wait: bool
    poll_s: Annotated[float, "(0, inf)"]

    @property
    def tasks(self) -> int:
        """Tasks of a node: by default one for each GPU."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def placement(self) -> dict[str, str]:
        """The flags, where set, that say to which part of the cluster a job goes and who pays."""
        return {name: value for name in PLACEMENT if (value := getattr(self, name))}

    def flags(self) -> dict[str, object]:
        """All flags of sbatch for a run's job. `additional_parameters` replace the others."""
        names = [field.name for field in dataclasses.fields(SbatchFlags)]
        flags = {name: value for name in names if (value := getattr(self, name))}
        flags |= {"ntasks_per_node": self.tasks, "time": self.timeout_min}
        if self.mem_gb is not None:
            flags["mem"] = f"{int(self.mem_gb * 1024)}M"
        if self.dependency:
            flags["kill-on-invalid-dep"] = "yes"
        return {**flags, **self.additional_parameters, "requeue": True}
