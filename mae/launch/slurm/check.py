"""What would fail on the cluster, said on the login node before anything is queued."""

import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae.config.check import ConfigError
from mae.config.values import near
from mae.launch.slurm import queue
from mae.launch.slurm.environment import outside_of_jobs

# File systems that other machines see too
NETWORK = re.compile(r"nfs|lustre|gpfs|beegfs|ceph|fuse|panfs|pvfs|orangefs|weka|vast|glusterfs|quobyte|afs|cifs|9p")


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


def _minutes(text: str) -> float:
    """'infinite', '30:00' or '2-00:00:00' in minutes."""
    if not text[:1].isdigit():
        return float("inf")
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def nodes() -> list[Node]:
    """Every node in every partition. Raises ConfigError where the controller does not answer."""
    code, told, error = queue.command("sinfo", "--noheader", "-N", "-o", "%P|%N|%c|%m|%l|%G", seconds=30)
    if code:
        raise ConfigError(f"launcher=slurm: SLURM's controller does not answer ({error.splitlines()[-1:] or code}).")
    found = []
    for line in told.splitlines():
        partition, name, cpus, memory, limit, gres = line.split("|")
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))
        cpus, memory = cpus.rstrip("+"), memory.rstrip("+")
        default = partition.endswith("*")
        found.append(Node(partition.rstrip("*"), default, name, int(cpus), int(memory), gpus, _minutes(limit)))
    return found


def tasks_per_node(settings: Mapping[str, Any]) -> int:
    """One task a GPU where nothing is said."""
    return settings["tasks_per_node"] or settings["gpus_per_node"] or 1


def problems(settings: Mapping[str, Any], known: list[Node]) -> Iterator[str]:
    """A sentence for each thing that the nodes of the partition cannot give."""
    names = sorted({node.partition for node in known})
    wanted = settings["partition"].split(",") if settings["partition"] else []
    for name in wanted:
        if name not in names:
            yield (
                f"launcher.partition={name} does not exist on this cluster.{near(name, names)} "
                f"Choose one of {', '.join(names)}."
            )
            return
    those = [n for n in known if (n.partition in wanted if wanted else n.default)]
    if not those:
        if not wanted:
            yield f"launcher.partition is not set and this cluster has no default: choose one of {', '.join(names)}."
        return
    where = f"partition {','.join(wanted) or those[0].partition}"
    cpus = tasks_per_node(settings) * settings["cpus_per_task"]
    needs = {"launcher.gpus_per_node": (settings["gpus_per_node"], "gpus", "GPUs")}
    needs["launcher.tasks_per_node x launcher.cpus_per_task"] = (cpus, "cpus", "CPUs")
    needs["launcher.mem_gb x 1024"] = ((settings["mem_gb"] or 0) * 1024, "memory_mb", "MB")
    fitting = those
    for key, (need, name, unit) in needs.items():
        most = max(getattr(node, name) for node in those)
        if need > most:
            yield f"{key}={need:.0f} {unit}, but no node of {where} has more than {most}: ask for less a node."
        fitting = [node for node in fitting if getattr(node, name) >= need]
    count = len({node.name for node in fitting})
    if fitting and settings["nodes"] > count:
        yield f"launcher.nodes={settings['nodes']}, but {where} has {count} such node{'s' * (count > 1)}."
    limit = max(node.limit_min for node in those)
    if settings["timeout_min"] > limit:
        yield (
            f"launcher.timeout_min={settings['timeout_min']} is above the limit of {where}, {limit:g}: lower it; the "
            "job goes on by itself after each limit."
        )


def check(settings: Mapping[str, Any], folder: Path, runs: list[Path]) -> None:
    """Raises ConfigError, a line a problem."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "launcher=slurm needs SLURM's sbatch, which is not on the PATH: type this on a login node of the cluster, "
            "or choose launcher=local."
        )
    if found := [*problems(settings, nodes()), *_slow_saves(settings, runs)]:
        raise ConfigError("\n".join(found))
    _probe(settings, folder)


def _slow_saves(settings: Mapping[str, Any], runs: list[Path]) -> Iterator[str]:
    for run in runs:
        measured = run / "slurm" / "save_seconds"
        seconds = float(measured.read_text()) if measured.exists() else 0.0
        if seconds > settings["signal_delay_s"]:
            yield (
                f"launcher.signal_delay_s={settings['signal_delay_s']} is too short: saving {run} took "
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


def _probe(settings: Mapping[str, Any], folder: Path) -> None:
    """Raises ConfigError where a free node does not see the folder, or may not write there."""
    if not settings["probe_s"] or NETWORK.search(file_system(folder.resolve())):
        return
    options = [f"--{key}={settings[key]}" for key in ("partition", "account", "qos", "constraint", "reservation")
               if settings[key]]  # fmt: skip
    words = ["srun", f"--immediate={settings['probe_s']}", "--nodes=1", "--ntasks=1", "--time=1", "--chdir=/", *options]
    script = 'test -d "$0" || { echo absent; exit; }; test -w "$0" || { echo closed; exit; }; echo good'
    with outside_of_jobs():  # where srun would start a step of the job around it
        _, told, _ = queue.command(*words, "sh", "-c", script, str(folder), seconds=settings["probe_s"] + 30)
    if told.strip() == "absent":
        raise ConfigError(
            f"output_dir: {folder} is not shared: this machine has it, and a node of the cluster does not see it. "
            "Choose a directory on the cluster's network file system."
        )
    if told.strip() == "closed":
        raise ConfigError(f"output_dir: {folder} cannot be written to from a node of the cluster.")
    if told.strip() != "good":
        sys.stderr.write(f"No node was free to say whether it sees {folder}: make sure that it is on shared storage.\n")
