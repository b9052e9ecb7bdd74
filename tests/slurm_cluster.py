"""A real SLURM cluster on this machine, for tests: slurmctld, one slurmd a node, munge, accounting.

Everything lies under one folder and is ended by the pids in it. A node has its own host name, hosts file and
process namespace: `kill_node` is a loss of power. Needs root and the packages that `.ci/run` installs.
"""

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd", "mariadb-install-db", "unshare")
INHERITED = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
GPUS = 2  # stand-ins: SLURM wants a character device and never opens it


def missing() -> str:
    """Why no cluster can be started here, or nothing."""
    if os.name != "posix" or os.geteuid() != 0:
        return "a SLURM cluster needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None]
    if absent:
        return f"SLURM is not installed: no {', '.join(absent)}"
    alone = subprocess.run(["unshare", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return "" if alone.returncode == 0 else "namespaces are not allowed here"


def wait_for(what: str, true: Callable[[], Any], seconds: float = 30.0, every: float = 0.05) -> Any:
    """What `true` gives, once it is true. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if given := true():
            return given
        time.sleep(every)
    raise TimeoutError(f"waited {seconds:g} s for {what}")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Cluster:
    """`with Cluster(folder, nodes=2) as cluster:`; the folder's path must be short (sockets lie in it)."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 8, memory_mb: int = 8000):
        self.folder, self.cpus, self.memory_mb = folder.resolve(), cpus, memory_mb
        self.nodes = [f"node{i + 1}" for i in range(nodes)]

    @property
    def env(self) -> dict[str, str]:
        """The environment of a login node of this cluster."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(INHERITED)}
        kept["PATH"] += ":/usr/sbin:/sbin"
        return kept | {"SLURM_CONF": f"{self.folder}/slurm.conf"}

    def run(self, *command: str, timeout: float = 60) -> str:
        """A command's output, on the login node; empty where it fails."""
        ended = subprocess.run(command, env=self.env, text=True, capture_output=True, timeout=timeout)
        return ended.stdout if ended.returncode == 0 else ""

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return next((w.split("=", 1)[1] for w in words if w.startswith(f"{name}=")), "")

    # ------------------------------------------------------------ daemons

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool", "log", "run", "pids"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        try:
            self._configure()
            self._start_munge()
            self._start_accounting()
            self._spawn("slurmctld", ["slurmctld", "-D"])
            for node in self.nodes:
                self.start_node(node)
            wait_for("the controller", lambda: "UP" in self.run("scontrol", "ping"))
            self.wait_idle()
        except BaseException:
            for log in sorted((self.folder / "log").glob("*.log")):
                print(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-10:]))  # noqa: T201
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_idle(self, seconds: float = 60) -> None:
        """Until every node is free."""

        def idle() -> bool:
            states = self.run("sinfo", "-h", "-p", "main", "-N", "-o", "%t").split()
            return states == ["idle"] * len(self.nodes)

        wait_for("idle nodes", idle, seconds, 0.2)

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.folder / "log" / f"{name}.log").open("ab") as log:  # the kernel ends it if pytest is killed
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                cwd="/",
                start_new_session=True,
            )
        (self.folder / "pids" / name).write_text(str(process.pid))

    def _configure(self) -> None:
        folder, ports = self.folder, _free_ports(3 + len(self.nodes))
        self.sql_port = ports[2]
        for gpu in range(GPUS):
            os.mknod(folder / f"gpu{gpu}", 0o600 | stat.S_IFCHR, os.makedev(240, gpu))
        values = {"folder": folder, "controller": ports[0], "accounting": ports[1], "sql": ports[2]}
        text = CONTROLLER.format(**values)
        for node, port in zip(self.nodes, ports[3:], strict=True):
            text += (
                f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
                f"RealMemory={self.memory_mb} Gres=gpu:{GPUS} State=UNKNOWN\n"
            )
        (folder / "slurm.conf").write_text(text + PARTITIONS)
        gres = f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]"
        (folder / "gres.conf").write_text("".join(f"NodeName={node} {gres}\n" for node in self.nodes))
        accounting = folder / "slurmdbd.conf"
        accounting.write_text(ACCOUNTING.format(**values))
        accounting.chmod(0o600)
        hosts = ["localhost", *self.nodes, socket.gethostname()]
        (folder / "hosts").write_text("".join(f"127.0.0.1 {host}\n" for host in hosts))

    def _start_munge(self) -> None:
        folder = self.folder
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": folder / "munge.sock", "pid-file": folder / "run/munged.pid"}
        files |= {"log-file": folder / "log/munge.log", "seed-file": folder / "run/munged.seed"}
        options = [f"--{name}={path}" for name, path in files.items()]
        self._spawn("munged", ["munged", "--foreground", "--force", "--num-threads=2", *options])
        wait_for("munge", lambda: self.run("munge", "-n", "-S", f"{folder}/munge.sock"))

    def _start_accounting(self) -> None:
        folder, data = self.folder, self.folder / "mysql"
        install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-test-db"]
        install += ["--auth-root-authentication-method=normal", "--skip-name-resolve"]
        with (folder / "log" / "mariadb-install.log").open("wb") as log:
            subprocess.run(install, check=True, stdout=log, stderr=log, env=self.env)
        (folder / "init.sql").write_text(
            "CREATE DATABASE IF NOT EXISTS slurm_acct_db;\n"
            "CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';\n"
            "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';\n"
        )
        server = ["mariadbd", "--no-defaults", f"--datadir={data}", "--user=root", f"--socket={folder}/mysql.sock"]
        server += [f"--port={self.sql_port}", "--bind-address=127.0.0.1", f"--init-file={folder}/init.sql"]
        server += [f"--pid-file={folder}/run/mariadbd.pid", "--skip-name-resolve", "--performance-schema=off"]
        server += ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M", "--innodb-doublewrite=0"]
        server += ["--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900"]
        self._spawn("mariadbd", server)

        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.sql_port), 0.2):
                return True
            return False

        wait_for("the database", answers)
        self._spawn("slurmdbd", ["slurmdbd", "-D"])
        wait_for("accounting", lambda: "Cluster" in self.run("sacctmgr", "show", "cluster"))

    def start_node(self, node: str) -> None:
        """Switches a node on."""
        (self.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
        (self.folder / "local").mkdir(exist_ok=True)  # each node has another, empty one: a disk of its own
        inside = (
            f"hostname {node} && mount --bind {self.folder}/hosts /etc/hosts && mount -t tmpfs none "
            f"{self.folder}/local && {{ slurmd -D -N {node} & wait $!; sleep infinity; }}"
        )
        machine = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        self._spawn(node, [*machine, "--propagation", "private", "bash", "-c", inside])

    # ------------------------------------------------------------ what a test breaks

    def kill_node(self, node: str) -> None:
        """A loss of power: slurmd and every task of the node are gone."""
        pid = int((self.folder / "pids" / node).read_text())
        os.kill(pid, signal.SIGKILL)
        wait_for(f"the end of {node}", lambda: not alive(pid))

    def kill_slurmd(self, node: str) -> None:
        """Only slurmd dies; the tasks live on, and SLURM takes the node for lost."""
        for pid in self.processes():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if command[0].endswith(b"slurmd") and node.encode() in command:
                os.kill(pid, signal.SIGKILL)

    def processes(self, *holding: str) -> list[int]:
        """Processes of this cluster (daemons and tasks) whose environment holds all these `NAME=VALUE`."""
        wanted = {entry.encode() for entry in (f"SLURM_CONF={self.folder}/slurm.conf", *holding)}
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted <= set((path / "environ").read_bytes().split(b"\0")) and alive(int(path.name)):
                    found.append(int(path.name))
        return found

    # ------------------------------------------------------------ the end

    def stop(self) -> None:
        """Ends every process of this cluster, and waits until it is gone."""
        self.run("scancel", "--user=root", timeout=20)
        pids = {p.name: int(p.read_text()) for p in (self.folder / "pids").glob("*")}
        nodes = [name for name in pids if name.startswith("node")]
        for name in (*nodes, "slurmctld", "slurmdbd", "mariadbd", "munged"):
            number = signal.SIGKILL if name in nodes else signal.SIGTERM
            if name in pids and alive(pids[name]):
                os.kill(pids[name], number)
                with contextlib.suppress(TimeoutError):
                    wait_for(name, lambda name=name: not alive(pids[name]), 8, 0.02)
        for pid in self.processes():
            command = Path(f"/proc/{pid}/comm")
            with contextlib.suppress(OSError):
                daemon = command.read_text().startswith(("slurm", "munged", "mariadbd"))
                if daemon or b"\0SLURM_JOB_ID=" in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


# Waits are short where a cluster's are long: a job that is requeued waits cred_expire (5 s at least), a dead node is
# noticed after SlurmdTimeout, TERM is followed by KILL after KillWait. Other loopback addresses than 127.0.0.1 make
# srun hang.
CONTROLLER = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=512
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=3
SlurmdTimeout=10
MessageTimeout=5
InactiveLimit=0
MinJobAge=3600
SlurmctldDebug=info
SlurmdDebug=info
PrologFlags=Alloc
GresTypes=gpu
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={folder}/munge.sock
"""
PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=brief Nodes=ALL MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE
"""
ACCOUNTING = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accounting}
SlurmUser=root
PidFile={folder}/run/slurmdbd.pid
DebugLevel=info
CommunicationParameters=NoInAddrAny
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""
