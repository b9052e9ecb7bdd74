"""What a container or a shell limits: cores, open files, shared memory. Defaults respect it; the rest is a sentence."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_PRETRAIN, run_here
from PIL import Image

from mae import limits
from mae.data import workers
from mae.data.dataset import Reader
from mae.data.sampler import Batches, Ticket
from mae.data.settings import LoaderSettings
from mae.data.source import Source
from mae.data.transforms import Transform
from mae.data.workers import naming_killed_workers
from mae.launch import errors


def groups(root: Path, membership: str, **files: str) -> float | None:
    """The quota of a machine whose control groups are these files (`__` for a slash)."""
    for name, text in files.items():
        path = root / "cgroup" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    root.mkdir(exist_ok=True)
    (root / "membership").write_text(membership)
    return limits.cpu_quota(root / "cgroup", root / "membership")


def test_the_quota_of_version_two_is_the_least_of_a_group_and_those_around_it(tmp_path):
    assert groups(tmp_path / "a", "0::/\n", cpu_max="50000 100000\n") == 0.5  # as a container sees its own
    nested = {"pod__box__cpu_max": "max 100000", "pod__cpu_max": "150000 100000"}
    assert groups(tmp_path / "b", "0::/pod/box\n", **nested) == 1.5
    assert groups(tmp_path / "c", "0::/pod\n", pod__cpu_max="max 100000", unified__pod__cpu_max="200000 100000") == 2.0
    assert groups(tmp_path / "d", "0::/../../outside\n", cpu_max="max 100000") is None
    assert groups(tmp_path / "e", "") is None


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_the_quota_of_version_one(tmp_path, mount):
    half = {f"{mount}__cfs_quota_us": "50000\n", f"{mount}__cfs_period_us": "100000\n"}
    assert groups(tmp_path / "a", f"4:{mount}:/docker/1f\n3:memory:/x\n", **half) == 0.5  # the path is the host's
    job = {f"{mount}__job__cfs_quota_us": "300000", f"{mount}__job__cfs_period_us": "100000"}
    free = {f"{mount}__cfs_quota_us": "-1", f"{mount}__cfs_period_us": "100000"}
    assert groups(tmp_path / "b", f"4:{mount}:/job\n", **free, **job) == 3.0
    assert groups(tmp_path / "c", f"4:{mount}:/job\n", **free) is None


@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (1.5, 2), (3.0, 3), (99.0, 8), (None, 8)])
def test_cores_are_counted_by_affinity_and_quota(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(limits, "cpu_quota", lambda: quota)
    assert limits.cpus() == workers.worker_count(None) == cores
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert limits.cpus() == min(2, cores)


def test_a_run_takes_no_more_threads_than_its_quota_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "cpu_quota", lambda: 0.5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(4)
    assert run_here(tmp_path, *TINY_PRETRAIN, "task.max_steps=1") == 0
    assert torch.get_num_threads() == 1


# ---------------------------------------------------------------- open files


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for k in range(60):
        Image.new("RGB", (70, 70), (4 * k, 9, 9)).save(folder / f"{k}.jpg")
    return folder


def limited(files: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """run.py in a shell with other limits."""
    words = ["bash", "-c", f'{files} && exec "$0" "$@"', sys.executable, str(ROOT / "run.py"), *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


FEW = [
    "data=folder",
    "data.img_size=64",
    "model.patch_size=16",
    "task.batch_size=8",
    "task.max_steps=2",
    "data.fraction=1",
]


@pytest.mark.parametrize("files", [pytest.param("ulimit -n 64", marks=pytest.mark.slow), "ulimit -Sn 40"])
def test_few_open_files_are_enough_for_worker_processes(photos, tmp_path, files):
    many = ["data.workers=process", "data.num_workers=2", "data.prefetch=8", f"data.root={photos}"]
    done = limited(files, *TINY_PRETRAIN, *FEW, *many, f"output_dir={tmp_path}")
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    assert not (tmp_path / "bad_files.csv").exists()


def test_a_process_may_open_as_many_files_as_its_hard_limit_allows():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        limits.raise_open_files()
        assert limits.open_files() == min(hard, limits.OPEN_FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class NoFiles(Source):
    """A source whose images cannot be opened for want of open files."""

    def __len__(self) -> int:
        return 3

    def name(self, index: int) -> str:
        return f"{index}.jpg"

    def __getitem__(self, index: int):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), self.name(index))


class Whole(Transform):
    """The image as it is."""

    def __call__(self, image, draw, out=None):
        return image


class NoSharedMemory(NoFiles):
    def __getitem__(self, index: int):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (NoFiles(), r"Too many open files: this process may open \d+ \(ulimit -n\)"),
        (NoSharedMemory(), "lie in /dev/shm, which is full"),
    ],
)
def test_an_image_that_a_limit_keeps_from_being_read_is_not_replaced(source, sentence):
    reader = Reader(source, Whole(), Batches(1, 1, 0))
    ticket = Ticket(0, np.zeros(1, np.int64), 1.0)
    with pytest.raises(ValueError, match=sentence):
        reader.load(ticket)
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/x")
    assert errors.explain(error).startswith("Too many open files: this process may open")


# ---------------------------------------------------------------- shared memory


def test_worker_processes_that_do_not_fit_into_shared_memory_are_refused_at_once(photos, tmp_path):
    mount = "mount -t tmpfs -o size=200k tmpfs /dev/shm && "
    alone = ["unshare", "-m", "--propagation", "private"]
    if subprocess.run([*alone, "bash", "-c", mount + "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")

    def run(name: str, *more: str) -> subprocess.CompletedProcess[str]:
        given = [*TINY_PRETRAIN, *FEW, f"data.root={photos}", *more, f"output_dir={tmp_path / name}"]
        words = [*alone, "bash", "-c", mount + 'exec "$0" "$@"', sys.executable, str(ROOT / "run.py"), *given]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)

    refused = run("process", "data.workers=process", "data.num_workers=2")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "lie in /dev/shm, which has 0.2 MB free, and they need 0.6. Give it more" in refused.stderr
    auto = run("auto", "data.workers=auto", "data.num_workers=9")
    assert auto.returncode == 0 and "/dev/shm has too little room for batches of worker processes: 8 threads" in (
        auto.stderr
    )


def test_batches_of_an_augmentation_for_processes_alone_are_made_by_the_run_itself(monkeypatch, caplog):
    class Empty(NoFiles):
        def __getitem__(self, index: int):
            return torch.zeros(3, 8, 8, dtype=torch.uint8), 0

    transform = Whole()
    transform.draws_itself = True
    reader = Reader(Empty(), transform, Batches(1, 1, 0))
    settings = LoaderSettings(2, "auto", 2, 10.0, 0.0, 1.0, None, 1, "cpu")
    monkeypatch.setattr(limits, "shared_memory", lambda: 1000)
    made = workers.makers(reader, workers.Tickets(lambda: iter(())), settings, 8, False)
    assert isinstance(made, torch.utils.data.DataLoader) and made.num_workers == 0
    assert "this process itself makes them" in caplog.text
    monkeypatch.setattr(limits, "shared_memory", lambda: 10**6)
    made = workers.makers(reader, workers.Tickets(lambda: iter(())), settings, 8, False)
    assert isinstance(made, torch.utils.data.DataLoader) and made.num_workers == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", "which is full"),
        ("DataLoader worker (pid 1) is killed by signal: Bus error. workers are out of shared memory", "which is full"),
        ("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)", "ulimit -n"),
        ("received 0 items of ancdata", "ulimit -n"),
    ],
)
def test_what_torch_says_of_a_limit_becomes_a_sentence(words, sentence):
    with pytest.raises(ValueError) as caught, naming_killed_workers():
        raise RuntimeError(words)
    assert sentence in errors.explain(caught.value) and "The disk is full" not in errors.explain(caught.value)
