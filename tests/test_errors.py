"""A user's mistake is a sentence; any other exception is called a bug, with its last frame and its traceback's file."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY_PRETRAIN, run_cli

from mae.errors import UserError, error_name, is_bug
from mae.launch import errors
from mae.runs.checkpoints import DamagedCheckpoint


def faulty(tmp_path: Path, kind: str) -> dict[str, str]:
    """An environment in which rank 0 raises an exception of a kind at its first step."""
    (tmp_path / "raise").write_text("0 0")
    (tmp_path / "kind").write_text(kind)
    return {"PYTHONPATH": f"{ROOT / 'tests' / 'faults'}:{ROOT}", "MAE_TEST_FOLDER": str(tmp_path)}


BUG = r"This is a bug: {kind}: a deliberate mistake \(tests/faults/sitecustomize.py:\d+, in take_step\)\. "
BUG += r"The traceback is in {log}; MAE_DEBUG=1 prints it\.\n"


@pytest.mark.parametrize(
    ("kind", "processes"),
    [
        ("ValueError", 1),
        pytest.param("RuntimeError", 1, marks=pytest.mark.slow),
        pytest.param("ValueError", 2, marks=pytest.mark.slow),
    ],
)
def test_a_bug_is_called_one(tmp_path, kind, processes):
    run = tmp_path / "run"
    command = [*TINY_PRETRAIN, f"launcher.processes={processes}", f"output_dir={run}"]
    ended = run_cli(*command, env=faulty(tmp_path, kind))
    expected = BUG.format(kind=kind, log=re.escape(str(run / "log.txt")))
    assert ended.returncode == 1 and re.search(expected, ended.stderr), ended.stderr
    assert "Traceback" not in ended.stderr.splitlines()[-1] and "a deliberate mistake" in (run / "log.txt").read_text()
    debugged = run_cli(*command, env=faulty(tmp_path, kind) | {"MAE_DEBUG": "1"})
    assert debugged.returncode == 1 and "Traceback" in debugged.stderr and "in take_step" in debugged.stderr


def test_a_mistake_of_the_user_is_one_sentence_with_a_traceback_for_those_who_ask(tmp_path):
    ended = run_cli("task.mask_ratio=2", f"output_dir={tmp_path / 'run'}")
    assert ended.returncode == 1 and ended.stderr == "task.mask_ratio must lie in (0, 1), got 2.0.\n"
    debugged = run_cli("task.mask_ratio=2", f"output_dir={tmp_path / 'run'}", env={"MAE_DEBUG": "1"})
    assert debugged.returncode == 1 and "Traceback" in debugged.stderr
    assert debugged.stderr.rstrip().endswith("task.mask_ratio must lie in (0, 1), got 2.0.")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_mistake_that_shows_in_a_rank_is_the_same_sentence(tmp_path, processes):
    command = [*TINY_PRETRAIN, f"launcher.processes={processes}", f"output_dir={tmp_path / 'run'}"]
    (tmp_path / "images").mkdir()
    ended = run_cli(*command, "data=folder", f"data.root={tmp_path / 'images'}")
    assert ended.returncode == 1 and "bug" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"data.root: no image lies under {tmp_path / 'images'}"), (
        ended.stderr
    )


@pytest.mark.slow
def test_torchrun_s_ranks_call_a_bug_one(tmp_path):
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*torchrun, str(ROOT / "run.py"), *TINY_PRETRAIN, f"output_dir={run}"],
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"} | faulty(tmp_path, "ValueError"),
        text=True,
        capture_output=True,
        timeout=240,
    )
    expected = BUG.format(kind="ValueError", log=re.escape(str(run / "log.txt")))
    assert ended.returncode and re.search(expected, ended.stderr), ended.stderr


def test_a_bug_outside_of_a_run_leaves_its_traceback_in_a_file():
    def broken() -> None:
        raise ValueError("no sentence for users")

    with pytest.raises(ValueError, match="no sentence") as caught:
        broken()
    explanation = errors.explain(caught.value)
    found = re.fullmatch(
        r"This is a bug: ValueError: no sentence for users \(tests/test_errors\.py:\d+, in broken\)\. "
        r"The traceback is in (.+); MAE_DEBUG=1 prints it\.",
        explanation,
    )
    assert found, explanation
    assert "Traceback" in Path(found[1]).read_text()
    Path(found[1]).unlink()


def test_which_errors_are_bugs():
    assert not is_bug(error_name(UserError("x"))) and not is_bug(error_name(DamagedCheckpoint("x")))
    assert not is_bug(error_name(FileNotFoundError("x"))) and not is_bug("DistBackendError: x")
    assert is_bug(error_name(ValueError("x"))) and is_bug(error_name(KeyError("x"))) and is_bug("OddError: x")
    assert errors.explain(DamagedCheckpoint("a sentence.")) == "a sentence."
    assert errors.explain(PermissionError(13, "Permission denied", "/x")) == "/x: Permission denied."
