"""The objects of a training run: built from the config, saved in a checkpoint, restored from one."""

import logging
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae import checkpoint, device, optim
from mae.config.build import build, call
from mae.data.loader import EvalLoader, Loader
from mae.data.sampler import Batches
from mae.data.settings import LoaderSettings
from mae.data.source import Source, fingerprint
from mae.data.transforms import AUGMENTATIONS
from mae.distributed import fsdp
from mae.distributed.ranks import Ranks, assert_same
from mae.errors import UserError
from mae.models.layers import RunningStatistics
from mae.perf.compile import accelerate
from mae.perf.micro_batch import Trial
from mae.plan import Plan, check_batches, make_plan, micro_batch
from mae.progress import Progress
from mae.runs.checkpoints import newest_valid, repair_best
from mae.tasks.base import Autocast, TrainedTask, build_task, check_exemptions
from mae.tasks.batches import bad_files_csv, both_sets, eval_loader, sent, whole_loader
from mae.tasks.labels import refuse_other_classes
from mae.tracking.base import Tracker
from mae.weights.parts import drop_class_token

log = logging.getLogger(__name__)


@dataclass
class Training:
    """The objects of a run."""

    run: Path
    cfg: DictConfig
    ranks: Ranks
    tracker: Tracker
    plan: Plan
    task: TrainedTask[nn.Module]
    model: nn.Module  # the task, wrapped for several ranks
    optimizer: torch.optim.Optimizer
    schedule: optim.Schedule
    scaler: torch.amp.GradScaler
    saver: checkpoint.Checkpoints
    progress: Progress
    loader: Loader
    val_loader: EvalLoader
    dtype: torch.dtype
    images: str  # a fingerprint of the training images
    best_unsaved: bool = False  # the last validation was the best so far, and is not saved yet
    statistics: RunningStatistics = field(init=False)

    def __post_init__(self) -> None:
        self.statistics = RunningStatistics(self.task)

    @property
    def epoch(self) -> float:
        return self.progress.step / self.plan.steps_per_epoch

    def position(self) -> dict[str, float]:
        """The first keys of every line of metrics."""
        step = self.progress.step
        return {"step": step, "images_seen": self.plan.images_seen(step), "epoch": round(self.epoch, 6)}

    def batches(self) -> Iterator[tuple[device.Batch, bool]]:
        """The rest of the run's micro-batches on the host, with whether each is the last of its step."""
        epoch, step = divmod(self.progress.step, self.plan.steps_per_epoch)
        left = self.plan.steps - self.progress.step
        while left:
            for micro_batches in self.loader.steps(epoch, step):
                for number, batch in enumerate(micro_batches, start=1):
                    yield batch, number == len(micro_batches)
                left -= 1
                if not left:
                    return
            epoch, step = epoch + 1, 0

    def autocast(self) -> AbstractContextManager[object]:
        """The forward pass's number format."""
        return device.autocast(self.dtype, self.ranks.device)

    def evaluate(self) -> dict[str, float]:
        """Metrics of the validation set, logged together with pictures."""
        with fsdp.whole(self.model), self.ranks.unwatched():
            position = self.position()
            batches = sent(self.val_loader, self.ranks)
            metrics = self.task.evaluate(batches, self.ranks, self.autocast)
            metrics |= self.task.monitor(position["epoch"], self.ranks, self.autocast)
            self.best_unsaved = self.task.is_best(metrics)
            self.tracker.log(position | metrics)
            if self.ranks.main:
                step = self.progress.step
                self.task.log_images(self.run, step, position["epoch"], self.tracker, self.autocast)
            return metrics

    def save(self) -> None:
        """A checkpoint of this moment; all ranks must call. They wait together for the writing of the last one."""
        with self.ranks.unwatched():
            self.saver.wait()
            sums = {name: float(value) for name, value in self.progress.sums.items()}
            random_states, sums_by_rank = zip(*self.ranks.gather((checkpoint.random_state(), sums)), strict=True)
            states = self.task.model.state_dict(), self.optimizer.state_dict(), self.task.extra_state()
            weights, optimizer, extra = fsdp.on_host(states, self.ranks.main)
            if self.ranks.main:
                trainer = {
                    "optimizer": optimizer,
                    "scaler": self.scaler.state_dict(),
                    "progress": self.progress.state(),
                    "sums": list(sums_by_rank),
                    "task": extra,
                    "random": list(random_states),
                    "images": self.images,
                    "config": OmegaConf.to_yaml(self.cfg),
                }
                facts = self.task.manifest_facts(self.run)
                self.saver.save(self.progress.step, self.epoch, weights, trainer, self.best_unsaved, facts)
            self.best_unsaved = False

    def restore(self, path: Path) -> None:
        """Restores all of a checkpoint but its weights, which `restore_weights` loads."""
        trainer = checkpoint.read_trainer(path, mapped=self.ranks.sharded)  # of which a rank copies its shards
        self.optimizer.load_state_dict(fsdp.local_optimizer_state(trainer["optimizer"], self.optimizer))
        if trainer["scaler"]:  # empty where the run had another number format, on another device
            self.scaler.load_state_dict(trainer["scaler"])
        self.task.load_extra_state(trainer["task"])
        self.progress.load(trainer, self.ranks.rank, self.ranks.world)
        if self.ranks.rank < len(trainer["random"]):
            checkpoint.set_random_state(trainer["random"][self.ranks.rank])
        log.info("goes on from %s", path)
        if self.ranks.main and self.cfg.replay is None:
            repair_best(self.run, path)
        if not self.images.startswith(trainer.get("images", "")):
            log.warning(
                "the training images are not those that the run began with (%s then, %s now): it goes on with them, "
                "and not to the same bits",
                trainer["images"], self.images,
            )  # fmt: skip
            self.tracker.event("the training images have changed", self.progress.step)


def load_training(
    run: Path, cfg: DictConfig, ranks: Ranks, source: Source, task: TrainedTask[nn.Module], micro_batch_size: int | None
) -> tuple[Loader, Plan]:
    """The training batches of at most `micro_batch_size` images, and the plan that follows from their number."""
    micro = micro_batch(cfg.task.batch_size, ranks.world, micro_batch_size)
    batches = Batches(
        cfg.task.batch_size,
        micro,
        cfg.seed,
        ranks.rank,
        ranks.world,
        drop_last=cfg.task.drop_last,
        masking=task.masking,
        mask_ratios=() if task.phases else task.mask_ratios,
        phases=task.phases,
    )
    transform, settings = build(AUGMENTATIONS, cfg.augmentation), call(LoaderSettings, cfg.data)
    for phase in task.phases:
        log.info("task.img_size_schedule: images of %s", phase)
    by_phase = [build(AUGMENTATIONS, {**cfg.augmentation, "img_size": [*phase.size]}) for phase in task.phases]
    on_gpu = ranks.device.type == "cuda"
    if settings.decode_device == "cuda" and not on_gpu:
        raise UserError(f"data.decode_device=cuda needs a GPU, and this run has {ranks.device.type}: set it to cpu.")
    decode_on = ranks.device if settings.decode_device == "cuda" else None
    loader = Loader(source, transform, batches, settings, bad_files_csv(run, ranks), on_gpu, by_phase, decode_on)
    plan = call(make_plan, cfg.task, len(loader.source), loader.steps_per_epoch, ranks.world, micro_batch_size=micro)
    check_batches(plan, cfg.task, cfg.data.repeats)
    return loader, plan


def set_up(
    run: Path,
    cfg: DictConfig,
    ranks: Ranks,
    tracker: Tracker,
    *,
    warmup_epochs: Annotated[float, "[0, inf)"],
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"],
) -> Training:
    """Builds the objects of a run, the same on every rank, and restores its newest checkpoint."""
    torch.manual_seed(cfg.seed)  # the same initial weights everywhere
    train_set, val_set = both_sets(cfg)
    dtype = device.number_format(precision, ranks.device)
    restored = newest_valid(run)
    task = initial_task(cfg, ranks, train_set, val_set, restored, dtype)
    if restored is None:
        check_exemptions(task.model, cfg.optimizer.no_decay)
        task.estimate(train_set, ranks)
    if ranks.world > 1:  # a digest of large weights takes seconds
        assert_same(ranks, checkpoint.weights_digest(fsdp.unsharded(task.model.state_dict())), "weights")
    task.check_ranks(ranks)
    micro = prepare_model(run, cfg, ranks, task, partial(device.autocast, dtype, ranks.device))
    loader, plan = load_training(run, cfg, ranks, train_set, task, micro)
    images = fingerprint(loader.source)
    assert_same(ranks, images, "images")
    model = ranks.wrap(task, accumulating=plan.accumulation > 1)
    groups = call(optim.param_groups, cfg.optimizer, task.trained)
    schedule = call(optim.Schedule, cfg.optimizer, plan.batch_size, plan.epochs, warmup_epochs)
    t = Training(
        run=run,
        cfg=cfg,
        ranks=ranks,
        tracker=tracker,
        plan=plan,
        task=task,
        model=model,
        optimizer=build(optim.OPTIMIZERS, cfg.optimizer, groups),
        schedule=schedule,
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=dtype is torch.float16),  # type: ignore[attr-defined]
        saver=call(checkpoint.Checkpoints, cfg.checkpoint, run),
        progress=Progress.new(ranks.device),
        loader=loader,
        val_loader=validation_loader(run, cfg, ranks, val_set, task, plan.micro_batch_size),
        dtype=dtype,
        images=images,
    )
    seed_everything(cfg.seed + 1000003 * ranks.rank)  # drop path and mixup differ between ranks
    if restored is not None:
        t.restore(restored)
    tracker.start(t.progress.step, plan.steps)
    if t.progress.step:
        tracker.event(f"resumed at step {t.progress.step}", t.progress.step)
    log.info("%s", plan.in_words(schedule.peak, str(dtype).removeprefix("torch."), str(ranks.device)))
    return t


def initial_task(
    cfg: DictConfig, ranks: Ranks, train_set: Source, val_set: Source, restored: Path | None, dtype: torch.dtype
) -> TrainedTask[nn.Module]:
    """The task on the device, sharded where asked, with initial weights, those of `init`, or of a checkpoint.

    Of sharded weights the first rank alone holds all, on the host, and no device ever does.
    """
    with fsdp.without_memory(ranks.sharded and not ranks.main):
        task = build_task(cfg, val_set)
    task.check_data(train_set, val_set)
    if dtype is torch.float64:
        task.double()
    with fsdp.loading_nowhere():
        if restored is None:
            task.load_init()
        else:
            refuse_other_classes(cfg.data.root, restored, task.classes)
            restore_weights(restored, task.model)
    task.train()  # a task may leave frozen modules in evaluation mode
    if ranks.sharded:
        ranks.shard(task, dtype)
    else:
        task.to(ranks.device)
    return task


def validation_loader(
    run: Path, cfg: DictConfig, ranks: Ranks, source: Source, task: TrainedTask[nn.Module], micro_batch_size: int
) -> EvalLoader:
    """The validation images as the task reads them."""
    bad_csv = bad_files_csv(run, ranks)
    if task.whole_images:
        return whole_loader(cfg, ranks, source, cfg.task.eval_size, bad_csv)
    return eval_loader(cfg, ranks, source, micro_batch_size, task.masking, bad_csv)


def prepare_model(
    run: Path, cfg: DictConfig, ranks: Ranks, task: TrainedTask[nn.Module], autocast: Autocast
) -> int | None:
    """Compiles the model, and returns how many images a device holds at a time; None: its whole share."""
    trial = Trial(cfg, task, task.masking, ranks.device, autocast, task.example_target)
    micro = call(accelerate, cfg.task, run, ranks, trial, task.trained)
    device.forget_peak_memory(ranks.device)  # trials are not the run's
    return micro


def restore_weights(path: Path, model: nn.Module) -> None:
    """Loads the weights of a checkpoint, into a model that may have begun without a class token."""
    weights = checkpoint.read_weights(path)
    if "cls_token" not in weights:
        assert isinstance(model, VisionTransformer)
        drop_class_token(model)
    model.load_state_dict(weights)


def seed_everything(seed: int) -> None:
    """Seeds python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
