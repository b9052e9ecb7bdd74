"""What a device gives the tasks that do not train: whole float32, and advice where its memory does not suffice."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, composed, run_here

from mae.errors import UserError
from mae.perf.micro_batch import memory_advice

TASKS = {
    "evaluate": [],
    "knn": ["task.k=[5]"],
    "embed": [],
    "predict": [],
    "visualize": ["task.reconstruction=false"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run whose classifier every task takes."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert run_here(run, *TINY, "task=finetune", "task.batch_size=32", "task.max_steps=1") == 0
    return run


@pytest.mark.parametrize(("task", "precision"), [*((task, "fp32") for task in TASKS), ("knn", "bf16")])
def test_tasks_that_do_not_train_compute_float32_without_tf32(tmp_path, monkeypatch, trained, task, precision):
    settings = set()
    forward = torch.nn.Linear.forward

    def noted(layer, x):
        settings.add((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return forward(layer, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", noted)
    torch.set_float32_matmul_precision("high")  # as on a GPU
    try:
        command = [*TINY, f"task={task}", *TASKS[task], f"init={trained}", f"task.precision={precision}"]
        assert run_here(tmp_path, *command) == 0
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert settings == ({("highest", False)} if precision == "fp32" else {("high", True)})


@pytest.mark.parametrize("task", TASKS)
def test_out_of_memory_names_the_number_of_images_to_lower(tmp_path, monkeypatch, trained, task):
    def hungry(layer, x):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.nn.Linear, "forward", hungry)
    key = "task.num_images" if task == "visualize" else "task.batch_size"
    expected = rf"^Out of memory on cpu, \d+ GiB. Set {key} to less than 6. \(CUDA out of memory.\)$"
    with pytest.raises(UserError, match=expected):
        run_here(tmp_path, *TINY, f"task={task}", *TASKS[task], f"init={trained}", f"{key}=6")


def test_a_task_of_single_images_is_advised_a_smaller_model():
    assert memory_advice(composed("task=evaluate", "init=x", "task.batch_size=1"), 1) == (
        "Choose a smaller model, or device=cpu."
    )
