"""What a device gives the tasks that do not train: whole float32."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, run_here

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
