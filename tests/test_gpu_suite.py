"""The acceptance suite itself: it is whole, skips with a reason where there is no GPU, and its checks run on a CPU."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

MODULES = sorted((ROOT / "tests").glob("test_gpu_[!s]*.py")) + [ROOT / "tests" / "test_gpu_steps.py"]
CHECKS = range(1, 26)


def suite(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """pytest on the suite, where torch sees no GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *map(str, MODULES), *arguments]
    env = {name: value for name, value in os.environ.items() if name != "MAE_GPU_SUITE_DEVICE"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=850)


@pytest.mark.slow
def test_the_suite_has_every_check_and_skips_all_of_them_with_a_reason_without_a_gpu():
    text = "".join(path.read_text() for path in MODULES)
    numbers = {int(number) for number in re.findall(r"^def test_(\d\d)_", text, re.MULTILINE)}
    section = (ROOT / "docs" / "gpu.md").read_text().split("## The checks")[1].split("\n## ")[0]
    documented = {int(number) for number in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}
    assert numbers == documented == set(CHECKS)
    result = suite("-rs")
    assert result.returncode == 0, result.stdout
    assert re.search(r"^\d+ skipped in", result.stdout, re.MULTILINE) and "passed" not in result.stdout
    assert "needs 1 GPU, and 0 are here; MAE_GPU_SUITE_DEVICE=cpu runs it on the CPU" in result.stdout


@pytest.mark.slow
def test_the_checks_run_on_a_cpu():
    result = suite("-rs", "--durations=5", MAE_GPU_SUITE_DEVICE="cpu")
    assert result.returncode == 0, result.stdout[-8000:]
    skips = [line for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all("on a CPU: " in line or "no such value" in line or "without a row" in line for line in skips)
