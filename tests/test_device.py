"""What hangs on the device, as far as a machine without a GPU can tell."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mae import device

GB = 1 << 30


def group(path, **values):
    path.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (path / f"memory.{name}").write_text(f"{value}\n")


def test_memory_that_a_job_may_take_is_what_its_groups_leave(tmp_path):
    group(tmp_path / "slurm" / "job_1", max=8 * GB, current=5 * GB, stat=f"anon 1\ninactive_file {GB}")
    group(tmp_path / "slurm" / "job_1" / "step_0", max="max", current=GB, stat="inactive_file 0")
    group(tmp_path / "slurm", max=2 * GB, current=3 * GB, stat="inactive_file 0")
    group(tmp_path, stat="inactive_file 0")  # the root has no limit
    left = device.free_in_cgroups("1:name=systemd:/other\n0::/slurm/job_1/step_0\n", tmp_path)
    assert list(left) == [4 * GB, 0]
    assert list(device.free_in_cgroups("0::/\n", tmp_path)) == []
    assert list(device.free_in_cgroups("4:memory:/slurm\n", tmp_path)) == []  # version 1
    assert 0 < device.free_memory(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize(
    ("kind", "skips", "kept"), [("cuda", True, "cuda"), ("cpu", True, "cpu"), ("mps", False, "cpu")]
)
def test_what_each_kind_of_device_can(kind, skips, kept):
    where, weight = torch.device(kind), torch.nn.Parameter(torch.ones(1))
    assert device.skips_by_itself(torch.optim.AdamW([weight], fused=True), where) is skips
    assert device.skips_by_itself(torch.optim.Adagrad([weight]), where) is False
    assert device.exact(where).type == kept  # Metal has no float64
    asked: list[Any] = []
    batch: Any = {"image": SimpleNamespace(to=lambda place, non_blocking: asked.append((place, non_blocking)))}
    device.send(batch, where)
    assert asked == [(where, kind == "cuda")]
