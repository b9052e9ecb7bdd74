"""File systems that lack what others have, and disks that are full: a run goes on without, or says so in a sentence."""

import errno
import fcntl
import io
import json
import os
import stat
import subprocess
import sys
import threading

import pytest
import safetensors
import torch
from conftest import TINY, TINY_PRETRAIN, composed, run_here

from mae import checkpoint, engine
from mae.data import remote
from mae.launch import errors, launch
from mae.runs import file_system, locks
from mae.tools import search
from mae.tools.search_trial import SearchSettings
from mae.weights.files import open_checkpoint
from mae.weights.metadata import section


@pytest.fixture
def lacks(monkeypatch):
    """Takes a call away, as a file system without it answers."""
    fsync = os.fsync

    def refuse(number, *_):
        raise OSError(number, os.strerror(number))

    def no_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            refuse(errno.EINVAL)
        fsync(handle)

    def take(what: str) -> None:
        if what == "links":
            monkeypatch.setattr(os, "symlink", lambda *_, **__: refuse(errno.EOPNOTSUPP))
        if what == "hard links":
            monkeypatch.setattr(os, "link", lambda *_, **__: refuse(errno.EPERM))
        if what == "fsync":
            monkeypatch.setattr(os, "fsync", no_folders)
        if what == "flock":
            monkeypatch.setattr(fcntl, "flock", lambda *_: refuse(errno.ENOLCK))

    yield take
    locks.flock_error.cache_clear()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    run = tmp_path_factory.mktemp("pretrained")
    assert run_here(run, *TINY_PRETRAIN, "task.max_steps=2") == 0
    return run


def finetune(pretrained, *more: str) -> list[str]:
    short = ["task.batch_size=32", "task.epochs=1", "task.max_steps=3", "task.warmup_epochs=0"]
    return [*TINY, "task=finetune", f"init={pretrained}", *short, *more]


def warnings(run) -> list[str]:
    """The warnings of a run's log."""
    return [line.split(" WARNING ", 1)[1] for line in (run / "log.txt").read_text().splitlines() if " WARNING " in line]


@pytest.mark.parametrize("also", ["", "hard links"])
def test_without_symbolic_links_the_best_checkpoint_is_a_copy(pretrained, tmp_path, lacks, also):
    lacks("links")
    lacks(also)
    often = ["task.eval_every_epochs=0.2", "checkpoint.keep=1", "task.max_steps=4"]
    assert run_here(tmp_path / "run", *finetune(pretrained, *often)) == 0
    best = tmp_path / "run" / "checkpoints" / "best"
    assert best.is_dir() and not best.is_symlink()
    step = json.loads((best / "manifest.json").read_text())["step"]
    (warning,) = warnings(tmp_path / "run")
    assert "has no symbolic links (Operation not supported): checkpoints/best is a copy" in warning
    opened = open_checkpoint(str(best))
    assert opened.origin == "ours" and opened.meta.step == step
    assert section(opened.meta.config, "task")["name"] == "finetune"
    assert run_here(tmp_path / "again", *TINY, "task=evaluate", f"init={best}") == 0
    names = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names <= {"best", "step_00000004", checkpoint.step_name(step)}


def test_where_folders_cannot_be_flushed_checkpoints_are_written_all_the_same(tmp_path, lacks):
    lacks("fsync")
    assert run_here(tmp_path, *TINY_PRETRAIN, "task.max_steps=2") == 0
    (path,) = checkpoint.checkpoints_of(tmp_path)
    assert checkpoint.verify(path)["step"] == 2
    (warning,) = warnings(tmp_path)
    assert "cannot flush folders (Invalid argument): a loss of power may cost the newest checkpoint" in warning


def test_a_disk_that_does_not_take_a_file_s_bytes_still_ends_the_run(tmp_path, monkeypatch):
    def broken(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(ValueError, match=r"a file cannot be flushed in .* \(Input/output error\)"):
        run_here(tmp_path, *TINY_PRETRAIN, "task.max_steps=2")
    assert (tmp_path / "metrics.jsonl").exists() is False  # before the first step


def test_what_a_run_cannot_do_without_is_tried_before_the_first_step(tmp_path, monkeypatch):
    rename = os.rename

    def no_folders(source, target):
        if os.path.isdir(source):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target)

    monkeypatch.setattr(os, "rename", no_folders)
    with pytest.raises(ValueError, match=r"output_dir: a folder cannot be renamed in .* \(Invalid cross-device link\)"):
        run_here(tmp_path, *TINY_PRETRAIN, "task.max_steps=2")
    assert not checkpoint.checkpoints_of(tmp_path) and not list((tmp_path / "checkpoints").iterdir())


def test_a_file_system_with_everything_gives_no_warning_and_is_left_as_it_was(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert file_system.check_needs(tmp_path) == []
    assert [p.name for p in tmp_path.rglob("*")] == ["checkpoints"]


# ---------------------------------------------------------------- without flock


def test_without_flock_a_run_says_so_once_and_is_still_alone(tmp_path, lacks):
    lacks("flock")
    with locks.held_run(tmp_path):
        code = "import sys, fcntl, errno\ndef no(*_): raise OSError(errno.ENOLCK, 'No locks available')\n"
        code += "fcntl.flock = no\nfrom pathlib import Path\nfrom mae.runs.locks import held_run\n"
        code += "with held_run(Path(sys.argv[1])): print('alone')"
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert f"process {os.getpid()} on" in other.stderr and "alone" not in other.stdout
    assert run_here(tmp_path / "run", *TINY_PRETRAIN, "task.max_steps=1") == 0
    (warning,) = warnings(tmp_path / "run")
    assert "has no file locks (No locks available): lock files named *.soft stand in for them" in warning


def test_without_flock_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path, lacks):
    lacks("flock")
    code = "import sys, os, fcntl, errno, signal\ndef no(*_): raise OSError(errno.ENOLCK, 'No locks available')\n"
    code += "fcntl.flock = no\nfrom pathlib import Path\nfrom mae.runs.locks import held_run\n"
    code += "with held_run(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert list(tmp_path.glob("*.soft"))
    with locks.held_run(tmp_path):
        assert locks.holder(tmp_path)["pid"] == os.getpid()


def test_without_flock_a_file_is_still_fetched_by_one_at_a_time(tmp_path, lacks):
    lacks("flock")
    order: list[str] = []
    first = remote.locked(tmp_path / "a.tar")
    with first:
        other = threading.Thread(target=lambda: (remote.locked(tmp_path / "a.tar").acquire(), order.append("other")))
        other.start()
        other.join(0.3)
        order.append("first")
    other.join(10)
    assert order == ["first", "other"]


@pytest.mark.slow
def test_without_flock_a_search_finishes(pretrained, tmp_path, lacks):
    lacks("flock")
    words = ["task=knn", f"init={pretrained}", *TINY, "task.k=[5]", "task.temperature=interval(0.05,0.1)"]
    search.search(tmp_path / "search", SearchSettings(1, "knn", seed=0, prune=False), words)
    assert json.loads((tmp_path / "search" / "trial_0000" / "summary.json").read_text())["knn"]


# ---------------------------------------------------------------- full


class Full(io.RawIOBase):
    """A file on a disk that takes `room` bytes."""

    def __init__(self, room: int, number: int):
        self.room, self.number = room, number

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(self.number, os.strerror(self.number))
        return len(data)


@pytest.mark.parametrize("number", file_system.FULL)
def test_the_system_s_word_is_found_behind_torch_s(number):
    with pytest.raises(Exception) as caught:
        torch.save({"w": torch.zeros(100_000)}, Full(1000, number))  # type: ignore[arg-type]
    assert errors.explain(caught.value).startswith(f"{file_system.FULL[number]}. What was saved before is whole")


@pytest.mark.parametrize("number", file_system.FULL)
def test_the_system_s_word_is_found_in_other_libraries_and_processes(number):
    rust = safetensors.SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    remote = RuntimeError(f"Process 1 of the run failed: OSError: [Errno {number}] {os.strerror(number)}: '/x'")
    for error in (rust, remote, OSError(number, os.strerror(number), "/x")):
        assert errors.explain(error).startswith(f"{file_system.FULL[number]}. What was saved before is whole")
    assert "make room on the disk of /x and" in errors.explain(OSError(number, os.strerror(number), "/x"))
    assert file_system.system_error(safetensors.SafetensorError("(os error 27)")).errno == errno.EFBIG  # type: ignore


def test_a_disk_that_fills_up_inside_trainer_pt(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        target = disk / "run" / "checkpoints" / "step_00000001"
        with pytest.raises(OSError) as caught:
            checkpoint.write(target, {"w": torch.zeros(10)}, {"m": torch.zeros(10**6)}, {"step": 1})
        assert caught.value.errno == errno.ENOSPC
        assert f"The disk is full. What was saved before is whole; make room on the disk of {target} and" in (
            errors.explain(caught.value)
        )
        assert not list(target.parent.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_not_the_fault_of_a_server_of_shards(tmp_path):
    fetched = remote.Remote("memory://nowhere", tmp_path, 1.0, 60.0)

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/a.tar")

    with pytest.raises(ValueError, match=r"data\.cache_dir: The disk is full\..* Or lower data\.cache_gb\."):
        fetched.tried("a.tar", full)


def test_a_full_disk_while_a_config_is_written_is_said_in_the_same_words(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(self))

    monkeypatch.setattr(engine.Path, "write_bytes", full)
    with pytest.raises(ValueError, match="The disk quota is used up"):
        launch.prepare(composed(*TINY_PRETRAIN, f"output_dir={tmp_path}"), [])
