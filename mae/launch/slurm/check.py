"""What would fail on the cluster, reported on the login node before anything is queued."""

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mae.config.values import near
from mae.errors import UserError
from mae.launch.slurm import queue
from mae.launch.slurm.environment import outside_of_jobs
from mae.launch.slurm.settings import SlurmSettings

# File systems that other machines see too
NETWORK = re.compile(r"nfs|lustre|gpfs|beegfs|ceph|fuse|panfs|pvfs|orangefs|weka|vast|glusterfs|quobyte|afs|cifs|9p")
# Run on a node by the probe of the run's folder
PROBE = 'test -d "$0" || { echo absent; exit; }; test -w "$0" || { echo closed; exit; }; echo good'


@dataclass(frozen=True)
class Node:
    """A node in one of its partitions."""

    partition: str
    default: bool
    name: str
    cpus: int
    memory_mb: int
    gpus: int
    limit_min: float


def check_cluster(settings: SlurmSettings, folder: Path, runs: list[Path]) -> None:
    """Raises UserError with a line for each problem."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "launcher=slurm needs SLURM's sbatch, which is not on the PATH: type this on a login node of the cluster, "
            "or choose launcher=local."
        )
    if problems := [*unmet_requests(settings, nodes()), *_slow_saves(settings, runs)]:
        raise UserError("\n".join(problems))
    _probe(settings, folder)


def nodes() -> list[Node]:
    """Every node in every partition. Raises UserError where the controller does not answer."""
    code, table, error = queue.command("sinfo", "--noheader", "-N", "-o", "%P|%N|%c|%m|%l|%G", seconds=30)
    if code:
        reason = (error.splitlines() or [f"sinfo ended with exit code {code}"])[-1]
        raise UserError(f"launcher=slurm: SLURM's controller does not answer ({reason}).")
    rows = []
    for line in table.splitlines():
        partition, name, cpus, memory, limit, gres = line.split("|")
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))
        cpus, memory = cpus.rstrip("+"), memory.rstrip("+")
        default = partition.endswith("*")
        rows.append(Node(partition.rstrip("*"), default, name, int(cpus), int(memory), gpus, _minutes(limit)))
    return rows


def _minutes(text: str) -> float:
    """'infinite', '30:00' or '2-00:00:00' in minutes."""
    if not text[:1].isdigit():
        return float("inf")
    days, _, clock = text.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    hours, minutes, seconds = [0] * (3 - len(numbers)) + numbers
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def unmet_requests(settings: SlurmSettings, known: list[Node]) -> Iterator[str]:
    """A sentence for each request that the nodes of the partition cannot meet."""
    names = sorted({node.partition for node in known})
    wanted = settings.partition.split(",") if settings.partition else []
    for name in wanted:
        if name not in names:
            yield (
                f"launcher.partition={name} does not exist on this cluster.{near(name, names)} "
                f"Choose one of {', '.join(names)}."
            )
            return
    members = [node for node in known if (node.partition in wanted if wanted else node.default)]
    if not members:
        if not wanted:
            yield f"launcher.partition is not set and this cluster has no default: choose one of {', '.join(names)}."
        return
    partition = f"partition {','.join(wanted) or members[0].partition}"
    needs: dict[str, tuple[float, str, str]] = {
        "launcher.gpus_per_node": (settings.gpus_per_node, "gpus", "GPUs"),
        "launcher.tasks_per_node x launcher.cpus_per_task": (settings.tasks * settings.cpus_per_task, "cpus", "CPUs"),
        "launcher.mem_gb x 1024": ((settings.mem_gb or 0) * 1024, "memory_mb", "MB"),
    }
    suitable = members
    for key, (need, resource, unit) in needs.items():
        most = max(getattr(node, resource) for node in members)
        if need > most:
            yield f"{key}={need:.0f} {unit}, but no node of {partition} has more than {most}: ask for less a node."
        suitable = [node for node in suitable if getattr(node, resource) >= need]
    count = len({node.name for node in suitable})
    if suitable and settings.nodes > count:
        yield f"launcher.nodes={settings.nodes}, but {partition} has {count} such node{'s' * (count > 1)}."
    limit = max(node.limit_min for node in members)
    if settings.timeout_min > limit:
        yield (
            f"launcher.timeout_min={settings.timeout_min} is above the limit of {partition}, {limit:g}: lower it; the "
            "job continues by itself after each limit."
        )


def _slow_saves(settings: SlurmSettings, runs: list[Path]) -> Iterator[str]:
    for run in runs:
        measured = run / "slurm" / "save_seconds"
        seconds = float(measured.read_text()) if measured.exists() else 0.0
        if seconds > settings.signal_delay_s:
            yield (
                f"launcher.signal_delay_s={settings.signal_delay_s} is too short: saving {run} took "
                f"{seconds:.0f} s. Give it {2 * seconds:.0f}."
            )


def file_system(path: Path) -> str:
    """The type of the file system that holds a path; empty where the machine does not say."""
    best, kind = "", ""
    table = Path("/proc/mounts")
    for line in table.read_text().splitlines() if table.exists() else []:
        _, mounted, name, *_ = line.split()
        if len(mounted) >= len(best) and (path == Path(mounted) or Path(mounted) in path.parents):
            best, kind = mounted, name
    return kind


def _probe(settings: SlurmSettings, folder: Path) -> None:
    """Raises UserError where a free node does not see the folder, or may not write there."""
    if not settings.probe_s or NETWORK.search(file_system(folder.resolve())):
        return
    options = [f"--{flag}={value}" for flag, value in settings.placement().items()]
    words = ["srun", f"--immediate={settings.probe_s}", "--nodes=1", "--ntasks=1", "--time=1", "--chdir=/", *options]
    with outside_of_jobs():  # where srun would start a step of the job around it
        _, output, _ = queue.command(*words, "sh", "-c", PROBE, str(folder), seconds=settings.probe_s + 30)
    if output.strip() == "absent":
        raise UserError(
            f"output_dir: {folder} is not shared: this machine has it, and a node of the cluster does not see it. "
            "Choose a directory on the cluster's network file system."
        )
    if output.strip() == "closed":
        raise UserError(f"output_dir: {folder} cannot be written to from a node of the cluster.")
    if output.strip() != "good":
        sys.stderr.write(f"No node was free to check that it sees {folder}: make sure that it is on shared storage.\n")
