"""What depends on the device, as far as a machine without a GPU can tell."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.utils._python_dispatch import TorchDispatchMode

from mae import checkpoint, device
from mae.distributed.ranks import Ranks, check_own_gpu, start
from mae.errors import UserError
from mae.models import recompute
from mae.models.layers import Block
from mae.perf.graphs import compile_blocks
from mae.tasks import features
from mae.tasks.knn import Neighbours
from mae.tasks.pretrain import Pretrain

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


# ---------------------------------------------------------------- GPUs that are not here


@pytest.fixture
def gpus(monkeypatch):
    """A machine with GPUs of a compute capability, as torch describes them."""

    def describe(capability: tuple[int, int], count: int = 8, kernels: str = "sm_75 sm_80 sm_86 sm_90 sm_120") -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
        monkeypatch.setattr(torch.cuda, "get_arch_list", kernels.split)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device}"))

    previous = torch.get_float32_matmul_precision()
    yield describe
    torch.set_float32_matmul_precision(previous)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), torch.float32)],
)
def test_auto_takes_the_fast_number_format_of_each_card(gpus, capability, dtype):
    gpus(capability)
    assert device.number_format("auto", torch.device("cuda", 0)) is dtype


def test_a_card_without_kernels_is_refused_with_the_versions_that_have_them(gpus):
    gpus((7, 0))
    with pytest.raises(UserError, match=r"no kernels for Tesla V100 \(compute capability 7.0\), only for 7.5, 8.0"):
        device.pick("cuda", 0)
    with pytest.raises(UserError, match="Install torch for CUDA 12.6"):
        device.pick("auto", 0)
    gpus((13, 0))
    with pytest.raises(UserError, match="a newer torch"):
        device.pick("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "kernels", "runs"),
    [
        ((8, 9), "sm_80 sm_90", True),
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_90a", True),
        ((10, 0), "sm_90 compute_90", True),
        ((7, 0), "compute_75", False),
    ],
)
def test_which_kernels_run_on_which_card(capability, kernels, runs):
    assert device.runs_on(capability, kernels.split()) is runs


def test_a_process_takes_the_gpu_of_its_rank_or_the_only_one_it_sees(gpus):
    gpus((9, 0), count=8)
    assert device.pick("cuda", 3).index == 3
    with pytest.raises(UserError, match="process 8 of this machine finds 8 GPUs"):
        device.pick("cuda", 8)
    gpus((9, 0), count=1)  # ROCR_VISIBLE_DEVICES, a container, a cgroup, a MIG slice
    assert device.pick("cuda", 3).index == 0


def test_two_processes_with_the_same_gpu_are_refused(gpus, monkeypatch):
    gpus((9, 0), count=1)
    store, gpu = HashStore(), torch.device("cuda", 0)
    check_own_gpu(store, 0, gpu)
    with pytest.raises(UserError, match="processes 0 and 1 have the same GPU"):
        check_own_gpu(store, 1, gpu)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    check_own_gpu(store, 1, gpu)
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    check_own_gpu(store, 2, gpu)


def test_all_evaluations_copy_on_one_stream_of_a_device(monkeypatch):
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda where: devices.append(where) or SimpleNamespace())
    device.copy_stream.cache_clear()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    streams = [device.Sender(where).copy_stream for where in (first, first, torch.device("cuda:0"), second)]
    device.copy_stream.cache_clear()
    assert devices == [first, second] and streams[0] is streams[1] is streams[2] is not streams[3]


def test_a_run_on_the_cpu_opens_no_context_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: pytest.fail("asked a GPU"))
    state = checkpoint.random_state()
    assert "cuda" not in state
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda _: pytest.fail("asked a GPU"))
    checkpoint.set_random_state(state | {"cuda": torch.zeros(1)})


def test_the_generator_of_mps_is_saved_and_restored(monkeypatch):
    restored: list[int] = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: 7)
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    checkpoint.set_random_state(checkpoint.random_state())
    assert restored == [7]


def test_several_processes_on_one_mps_are_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device=mps is one device"):
        start("auto", timeout_s=1, rendezvous_timeout_s=1, sharding="none")


def test_attention_is_sliced_for_the_cache_of_a_cpu_alone():
    queries = torch.empty(64, 197, 12, 64)
    assert len(recompute._slices(queries, queries)) > 1
    assert recompute._slices(queries.to("meta"), queries.to("meta")) == [slice(None)]


def test_inductor_starts_no_more_workers_than_a_rank_has_cores(monkeypatch):
    from torch._inductor import config as inductor

    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("mae.limits.cpus", lambda: 8)
    with inductor.patch(compile_threads=32):  # monkeypatch would delete the setting at the test's end
        compile_blocks(Block(8, 2), None)
        assert inductor.compile_threads == 2


def test_features_go_to_the_host_as_they_come_and_are_compared_in_full_precision(monkeypatch):
    kinds: list[str] = []
    concatenate, product = torch.cat, torch.Tensor.__matmul__

    def concatenated(tensors, *how):
        kinds.append(tensors[0].device.type)
        return concatenate(tensors, *how)

    monkeypatch.setattr(torch, "cat", concatenated)
    batch = {"index": torch.arange(4), "label": torch.arange(4)}
    bank = features.extract(lambda _: torch.eye(4), [batch], Ranks(torch.device("cpu")), contextlib.nullcontext)
    assert kinds == ["cpu"] * 3
    precisions: list[str] = []

    def noted(a, b):
        precisions.append(torch.get_float32_matmul_precision())
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", noted)
    monkeypatch.setattr(torch, "cat", concatenate)
    torch.set_float32_matmul_precision("high")
    neighbours = Neighbours(bank, 4, [1], 0.07, torch.device("cpu"))
    assert neighbours.predict(torch.eye(4)).flatten().tolist() == [0, 1, 2, 3]
    assert precisions == ["highest"] and torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(bank.feature, torch.eye(4))


class WithoutUint16(TorchDispatchMode):
    """Indexes tensors as CUDA does, which has no kernels for uint16."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_select) and args[0].dtype is torch.uint16:
            raise NotImplementedError("\"index_cuda\" not implemented for 'UInt16'")
        return func(*args, **(kwargs or {}))


def test_the_images_of_pictures_are_chosen_without_indexing_uint16():
    images = (torch.arange(8) * 8191).to(torch.uint16)[:, None, None, None]
    batch = {"image": images, "noise": torch.rand(8, 4), "index": torch.arange(8)}
    task: Any = SimpleNamespace(val_set=range(8), num_images=4)
    with WithoutUint16():
        chosen = Pretrain._choose(task, batch, 1)
    assert chosen["image"].dtype is torch.uint16 and torch.equal(chosen["noise"], batch["noise"][::2])
    assert chosen["image"].flatten().tolist() == [0, 16382, 32764, 49146]


@pytest.mark.skipif(not device.PROCESS_STATUS.exists(), reason="only Linux resets a process's peak")
def test_the_peak_memory_of_a_run_leaves_out_what_an_earlier_one_took():
    cpu = torch.device("cpu")
    device.forget_peak_memory(cpu)
    low = device.peak_memory(cpu)
    block = torch.ones(100 * 2**20)  # 400 MB
    high = device.peak_memory(cpu)
    del block
    device.forget_peak_memory(cpu)
    assert high > low + 300 * 2**20 and device.peak_memory(cpu) < high - 300 * 2**20
