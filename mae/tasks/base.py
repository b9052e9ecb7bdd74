"""What a trained task is: a subclass of `TrainedTask`, which the train loop calls."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from mae.checkpoint import step_name
from mae.config.build import call
from mae.config.saved import stored_overrides, with_format
from mae.config.values import near
from mae.data.phases import Phase
from mae.data.prepare import Prepare
from mae.data.sampler import Masking
from mae.data.source import Source
from mae.device import Batch
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.plan import Plan
from mae.runs.checkpoints import CLASS_NAMES, RUN_CONFIG, RUN_OVERRIDES
from mae.runs.summary import Summary, rate
from mae.tasks.labels import check_classes
from mae.tasks.registry import TASKS, load_task
from mae.tracking.base import Tracker

Autocast = Callable[[], AbstractContextManager[object]]  # within, the forward pass runs in the run's number format
Network = TypeVar("Network", bound=nn.Module)
OPTIONAL = ("cls_token", "pos_embed")  # that conf/optimizer exempts from decay, and that a network may lack


class TrainedTask(nn.Module, Generic[Network]):
    """A task that learns. A subclass sets `model` in its constructor, and overrides `loss` and what else it needs.

    The constructor is called as `Task(cfg, val_set, key=...)`: its keyword-only parameters are the keys of
    `conf/task/NAME.yaml` that are the task's own. Keys that all trained tasks share are declared by `plan.make_plan`,
    `training.set_up`, `engine.train` and `perf.compile.accelerate`. Hooks are called in the order in which they stand
    here, on every rank unless they say otherwise. Most do nothing by default; `loss` must be overridden.

    A batch holds, on the device: image (B, C, H, W) as the source has it, flip (B,) bool, index (B,) int64, weight (),
    and noise (B, L) where `masking` is set; label (B,) int64, or the source's vectors or maps.
    """

    model: Network  # saved in checkpoints and validated
    masking: Masking | None = None  # gives each sample of a batch its noise
    mask_ratios: tuple[float, ...] = ()  # of which each step draws one, number batch["ratio"].shape[0]; lowest first
    phases: tuple[Phase, ...] = ()  # sizes of the images by epoch; the mask ratios are then those of the phases
    whole_images = False  # whether validation batches are one image of full size each, not centre crops
    # methods that hold a whole forward pass beside the call of `trained`; task.compile=model makes each one graph, so
    # that they take tensors, and neither exchange with other ranks nor draw random numbers on the host
    compiled: tuple[str, ...] = ()

    def __init__(self, cfg: DictConfig, val_set: Source):
        super().__init__()
        self.cfg, self.val_set = cfg, val_set
        self.classes: list[str] = []  # names in the order of the outputs of what learns classes; a run stays with them
        self.prepare = call(Prepare, cfg.data)

    @property
    def trained(self) -> nn.Module:
        """The network whose parameters the optimizer changes."""
        return self.model

    def images(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Images (B, C, H, W) as the model takes them: flipped, normalised, in the type of its weights."""
        return self.prepare(batch["image"], batch.get("flip")).to(next(self.model.parameters()).dtype)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`loss`, called as a module, so that gradients are exchanged between ranks."""
        return self.loss(batch)

    # ------------------------------------------------------------ once, before the first step

    def check_data(self, train_set: Source, val_set: Source) -> None:
        """Refuses data that the task cannot learn from, with a UserError. By default it checks the labels of a task
        that needs them."""
        if TASKS[self.cfg.task.name].needs_labels:
            check_classes(self.cfg, train_set, val_set)

    def load_init(self) -> None:
        """Loads the weights that `init` names, into the model on the host. Skipped where a run goes on from its own
        checkpoint. Raises UserError.

        With `launcher.sharding` the weights of all ranks but the first are on the `meta` device, here and in the
        constructor: they have shapes and no values, and get those of the first rank afterwards."""

    def estimate(self, train_set: Source, ranks: Ranks) -> None:
        """Fits what is no trained weight to the training images, the same on every rank; the model is on the device.
        Skipped where a run goes on from its own checkpoint. Weights may be sharded: within `fsdp.whole(self)` every
        rank has all of them."""

    def check_ranks(self, ranks: Ranks) -> None:
        """Raises UserError where ranks have read different files that no checkpoint holds. On all ranks, once the model
        is on its device."""

    def example_target(self, images: int) -> Tensor:
        """What `label` of a batch of so many images could be, for trial steps. By default classes (B,)."""
        return torch.zeros(images, dtype=torch.int64)

    # ------------------------------------------------------------ every step

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`loss` () of a micro-batch, and any other scalars () to log under their names.

        All are means over the micro-batch's images. metrics.jsonl has their mean over the steps since its last line,
        and over ranks. The names must be the same at every call, and no other names of a
        training line, such as lr.
        """
        raise NotImplementedError

    def after_step(self, skipped: Tensor) -> None:
        """After an optimizer step; `skipped` () on the device is 1 where the gradient was not finite, else 0."""

    # ------------------------------------------------------------ every validation

    def validate(self, batch: Mapping[str, Tensor], autocast: Autocast) -> object:
        """The forward pass of a batch as `evaluate` computes it, without gradients: it is compiled before the run."""
        with autocast():
            return self.loss(batch)

    def evaluate(self, batches: Iterable[Batch], ranks: Ranks, autocast: Autocast) -> dict[str, float]:
        """Metrics `val/NAME` of the validation set over all ranks; `batches` are this rank's. The model is in training
        mode before and after."""
        return {}

    def monitor(self, epoch: float, ranks: Ranks, autocast: Autocast) -> dict[str, float]:
        """Further metrics `val/NAME` that are measured at some validations alone."""
        return {}

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether this validation is the best so far: its checkpoint is then saved and stays as `best`."""
        return False

    def log_images(self, run: Path, step: int, epoch: float, tracker: Tracker, autocast: Autocast) -> None:
        """Writes pictures and tables of the validation to `run`. On rank 0 alone."""

    # ------------------------------------------------------------ checkpoints and the end

    def extra_state(self) -> dict[str, object]:
        """What a checkpoint holds of the task beside `model.state_dict()`."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `extra_state` returned."""

    def weights_facts(self) -> dict[str, object]:
        """What no tensor of `model` tells and a reader of its weights needs, for a checkpoint's manifest."""
        return {}

    def manifest_facts(self, run: Path) -> dict[str, object]:
        """`weights_facts`, and classes, config and command line of the run: a copy of a checkpoint's folder is as good
        as the run. No hook."""
        classes = {CLASS_NAMES: self.classes} if self.classes else {}
        config = {RUN_CONFIG: with_format(self.cfg), RUN_OVERRIDES: stored_overrides(run)}
        return config | classes | self.weights_facts()

    def on_train_end(self, run: Path, step: int, tracker: Tracker) -> None:
        """Writes what is made once, after the last validation. On rank 0 alone."""

    def summary(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """The results in summary.json; `metrics` are those of the last validation."""
        return {name.removeprefix("val/"): value for name, value in metrics.items()}


def training_summary(task: str, plan: Plan, seconds: float, results: Mapping[str, object]) -> Summary:
    """The summary of a run that has trained to the end of its plan."""
    seen = plan.images_seen(plan.steps)
    return Summary(
        task,
        seconds,
        steps=plan.steps,
        epochs=plan.steps / plan.steps_per_epoch,
        images_seen=seen,
        images_per_second=rate(seen, seconds),
        checkpoint=f"checkpoints/{step_name(plan.steps)}",
        results=results,
    )


def check_exemptions(model: nn.Module, no_decay: list[str]) -> None:
    """Raises UserError for a name in `no_decay` that no tensor of the model has: it would exempt nothing."""
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]  # fixed positions are a buffer
    for name in no_decay:
        if name not in names and name not in OPTIONAL:
            raise UserError(f"optimizer.no_decay={name} names no parameter of the model.{near(name, names)}")


def build_task(cfg: DictConfig, val_set: Source) -> TrainedTask[nn.Module]:
    """The trained task that a config names, with initial weights."""
    return call(load_task(cfg.task.name), cfg.task, cfg, val_set)
