"""What the plan says of a GPU that its host holds back."""

import pytest
import torch
from conftest import TINY, composed

from mae.tools import dry_run
from mae.tools.bottlenecks import HostWork, host_work


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_the_plan_of_a_gpu_says_what_its_host_must_do():
    tiny = [override for override in TINY if override != "device=cpu"]
    cluster = ["launcher=slurm", "launcher.gpus_per_node=2", "device=cuda", "estimate.tflops=1"]
    report = dry_run.report(composed("dry_run=true", *tiny, *cluster, "task.batch_size=32", "data.fraction=1.0"))
    rows = {name: text.strip() for name, text in (line.split("  ", 1) for line in report.splitlines())}
    assert "220 launches of 5 microseconds take 1.1 ms (assumed)" in rows["launch bound"]  # of 3 blocks, compiled
    assert "A GPU holds 16: raise task.batch_size, or set task.compile=graphs" in rows["launch bound"]
    assert "each CPU of launcher.cpus_per_task=4 must load" in rows["data workers"]


def test_the_images_below_which_a_step_is_launch_bound():
    compiled, plain = (host_work(composed(f"task.compile={key}"), 20, 8, 512) for key in ("auto", "off"))
    assert compiled.rows(6056.0, None) == {
        "launch bound": "below 28 images a GPU at a time: 900 launches of 5 microseconds take 4.5 ms (assumed)"
    }
    assert "1,275 launches of 5 microseconds take 6.4 ms" in plain.launch_bound(6056.0)
    graphs = host_work(composed("task.compile=graphs"), 20, 8, 8)
    assert graphs.launch_bound(6056.0).startswith("none: a CUDA graph replays")


def test_launches_follow_the_depth_and_a_frozen_encoder_has_no_backward_pass():
    shallow, deep = (host_work(composed("task.compile=off"), blocks, 1, 64) for blocks in (4, 12))
    assert (shallow.kernels, deep.kernels) == (331, 803)
    probe = host_work(composed("task=linprobe", "init=x", "task.compile=off"), 12, 1, 64)
    assert probe.kernels == round(803 / 3)


@pytest.mark.parametrize(
    ("loaded", "sentence"),
    [
        (16_000.0, "loads 2,000 images/s for a GPU that trains 6,056: set launcher.cpus_per_task=13"),
        (80_000.0, "loads 10,000 images/s for a GPU that trains 6,056"),
    ],
)
def test_too_few_cpus_for_a_gpu_are_said_with_what_suffices(loaded, sentence):
    work = HostWork(kernels=900, cpus_per_task=4, devices_of_machine=8, images=512)
    assert work.rows(6056.0, loaded)["data workers"] == f"launcher.cpus_per_task=4 {sentence}"
