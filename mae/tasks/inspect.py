"""What a training run will see, and how long it will wait for it: samples, classes, sizes, loading speed."""

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from mae import device, optim
from mae.config.build import build, call
from mae.data.crops import pair
from mae.data.loader import Loader
from mae.data.paths import printable
from mae.data.prepare import Prepare
from mae.data.sampler import Batches
from mae.data.settings import LoaderSettings
from mae.data.source import Source
from mae.data.stats import Statistics, class_counts, contact_sheet, loading_speed, statistics, worker_counts
from mae.data.subsets import reduced
from mae.data.transforms import AUGMENTATIONS
from mae.data.workers import worker_count
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.models.masking import bind_masking
from mae.models.vit import classifier
from mae.runs.summary import Summary
from mae.tasks import charts
from mae.tasks.autoencoder import build_autoencoder
from mae.tasks.batches import both_sets
from mae.tasks.results import write_csv
from mae.tasks.stats import as_typed, write_bad
from mae.tracking.base import Tracker

log = logging.getLogger(__name__)
STEPS = 5  # timed, after two that are not
FAR = 0.5  # deviations from data.mean and data.std that are worth a warning; ImageNet is 0.25 from its own


def inspect(
    run: Path,
    cfg: DictConfig,
    ranks: Ranks,
    tracker: Tracker,
    *,
    batch_size: Annotated[int, "[1, inf)"],
    num_images: Annotated[int, "[1, inf)"],
    measured_images: Annotated[int, "[1, inf)"],
    max_workers: Annotated[int, "[1, inf)"] | None,
    batches: Annotated[int, "[1, inf)"],
    step: Literal["pretrain", "finetune"] | None,
    mask_ratio: Annotated[float, "(0, 1)"],
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"],
) -> Summary:
    """`images/samples.png` and `sizes.png`, `classes.csv`, and figures in the summary. Rank 0 does it all."""
    begun = time.perf_counter()
    tracker.start(0, 0)
    figures: dict[str, Any] = {}
    if ranks.main:
        train_set, val_set = both_sets(cfg)
        train_set = reduced(train_set, cfg.data.fraction, cfg.data.per_class, cfg.seed)
        sample = first_batches(cfg, train_set, batch_size, num_images)
        path = run / "images" / "samples.png"
        path.parent.mkdir(exist_ok=True)
        contact_sheet(sample["image"][:num_images], sample["flip"][:num_images]).save(path)
        tracker.picture("samples", path, 0, f"{cfg.data.name}, augmentation {cfg.augmentation.name}")
        figures |= write_classes(run, train_set, val_set)
        figures |= measure(run, cfg, train_set, measured_images)
        counts = list(worker_counts(max(1, worker_count(max_workers))))
        speeds = loading_speed(lambda workers: loader(cfg, train_set, batch_size, workers), counts, batches)
        figures |= {"loading": {str(workers): round(speed, 1) for workers, speed in speeds.items()}}
        if step is not None:
            network = network_of(cfg, step, mask_ratio, len(train_set.classes)).to(ranks.device)
            batch = {name: values[:batch_size] for name, values in sample.items()}
            figures |= waiting(speeds, step_speed(cfg, network, device.send(batch, ranks.device), precision))
        log_figures(figures)
    ranks.barrier()
    return Summary(
        "inspect",
        time.perf_counter() - begun,
        images_seen=figures.get("measured_images", 0),
        images_per_second=max(figures["loading"].values()) if figures else None,
        results=figures | {"files": ["images/samples.png", "images/sizes.png", "classes.csv"]},
    )


def loader(cfg: DictConfig, source: Source, batch_size: int, workers: int) -> Loader:
    """Training batches as a run would get them, from so many workers; any number of images may be bad."""
    (height, width), (down, across) = pair(cfg.model.img_size), pair(cfg.model.patch_size)
    masking = bind_masking(cfg.masking, (height // down, width // across), cfg.task.mask_ratio)
    transform = build(AUGMENTATIONS, cfg.augmentation)
    batches = Batches(batch_size, batch_size, cfg.seed, masking=masking)
    settings = call(LoaderSettings, cfg.data, num_workers=workers, max_bad_fraction=1.0, fraction=1.0, per_class=None)
    return Loader(source, transform, batches, settings)


def first_batches(cfg: DictConfig, source: Source, batch_size: int, count: int) -> dict[str, Tensor]:
    """The first samples of the first epoch, `count` of them or all and a whole batch at least."""
    feed = loader(cfg, source, batch_size, 0)
    batches = [micro for step in itertools.islice(feed.steps(0), -(-count // batch_size)) for micro in step]
    feed.close()
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("image", "flip", "label", "noise")}


def write_classes(run: Path, train_set: Source, val_set: Source) -> dict[str, object]:
    """Images by split and class; all classes in classes.csv."""
    train, val = class_counts(train_set), class_counts(val_set)
    names = [*train, *sorted({*val} - {*train})]
    rows = ((name, train.get(name, 0), val.get(name, 0)) for name in names)
    write_csv(run / "classes.csv", ("class", "train", "val"), rows)
    figures: dict[str, object] = {
        "train_images": len(train_set), "val_images": len(val_set), "classes": len(train)
    }  # fmt: skip
    if train:
        ordered = sorted(train, key=lambda name: (train[name], name))
        figures["smallest_class"] = [ordered[0], train[ordered[0]]]
        figures["largest_class"] = [ordered[-1], train[ordered[-1]]]
    return figures


def measure(run: Path, cfg: DictConfig, source: Source, count: int) -> dict[str, object]:
    """Sizes, mean and deviation of `count` training images. Raises UserError where none can be read."""
    indices = np.random.default_rng(cfg.seed).permutation(len(source))[:count]
    stats = statistics(source, indices, worker_count(cfg.data.num_workers))
    if not stats.images:
        raise UserError(f"none of the {len(indices)} images of data.name={cfg.data.name} that were tried can be read.")
    if stats.bad:
        write_bad(run, stats.bad)
        share = len(stats.bad) / len(indices)
        log.warning(
            "%d of %d images cannot be read, %.2g %%: see bad_files.csv", len(stats.bad), len(indices), 100 * share
        )
    charts.sizes(stats.sizes, run / "images" / "sizes.png")
    check_normalisation(cfg, stats)
    return {
        "measured_images": stats.images,
        "bad": len(stats.bad),
        "values": stats.dtype,
        "mean": stats.mean,
        "std": stats.std,
        "height": spread(stats.sizes, 0),
        "width": spread(stats.sizes, 1),
    }


def check_normalisation(cfg: DictConfig, stats: Statistics) -> None:
    """Warns where `data.mean` and `data.std` are far from those measured."""
    shift = np.abs(stats.moments.mean - np.array(cfg.data.mean)) / np.array(cfg.data.std)
    ratio = np.array(stats.std) / np.array(cfg.data.std)
    if shift.max() > FAR or ratio.max() > 1 + FAR or ratio.min() < 1 - FAR:
        log.warning(
            "data.mean and data.std are not those of these images: data.mean=%s data.std=%s (task=stats reads all)",
            as_typed(stats.mean),
            as_typed(stats.std),
        )


def spread(sizes: Counter, side: int) -> list[int]:
    """Smallest, median and largest height (side 0) or width (side 1)."""
    values = np.repeat([size[side] for size in sizes], list(sizes.values()))
    return [int(values.min()), int(np.median(values)), int(values.max())]


# ---------------------------------------------------------------- the step that waits


class Network(nn.Module):
    """A network with its loss."""

    def __init__(self, cfg: DictConfig, model: nn.Module, loss: Callable[[dict[str, Tensor], Tensor], Tensor]):
        super().__init__()
        self.model, self.loss, self.prepare = model, loss, call(Prepare, cfg.data)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        images = self.prepare(batch["image"], batch["flip"])
        return self.loss(batch, images.to(next(self.model.parameters()).dtype))


def network_of(cfg: DictConfig, step: str, mask_ratio: float, classes: int) -> Network:
    """The network of `model=` as the task `step` trains it."""
    if step == "pretrain":
        mae = build_autoencoder(cfg, cfg.target, cfg.target.name == "pixels", call(Prepare, cfg.data))
        return Network(cfg, mae, lambda batch, images: mae(images, mask_ratio, batch["noise"]).loss)
    vit = call(classifier, cfg.model, num_classes=max(2, classes), drop_path=0.0, global_pool="avg")
    label = "label"
    return Network(cfg, vit, lambda batch, images: nn.functional.cross_entropy(vit(images), batch[label].clamp(min=0)))


def step_speed(cfg: DictConfig, model: Network, batch: dict[str, Tensor], precision: str) -> float:
    """Images a second that one device trains on, where it never waits."""
    here = batch["image"].device
    dtype = device.number_format(precision, here)
    model.to(dtype=device.weight_format(dtype))
    optimizer = build(optim.OPTIMIZERS, cfg.optimizer, call(optim.param_groups, cfg.optimizer, model.model))
    seconds = []
    for _ in range(2 + STEPS):
        start = time.perf_counter()
        with device.autocast(dtype, here):
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return len(batch["image"]) / float(np.median(seconds[2:]))


def waiting(speeds: dict[int, float], step: float) -> dict[str, object]:
    """The share of its time that one device's step would wait, with each number of workers."""
    shares = {str(n): round(max(0.0, 1 - speed / step), 4) for n, speed in speeds.items()}
    return {"step_images_per_second": round(step, 1), "data_wait": shares}


def log_figures(figures: Mapping[str, Any]) -> None:
    """The figures in words."""
    log.info("%d training and %d validation images", figures["train_images"], figures["val_images"])
    if figures["classes"]:
        (small, least), (large, most) = figures["smallest_class"], figures["largest_class"]
        log.info(
            "%d classes, from %d images (%s) to %d (%s)",
            figures["classes"],
            least,
            printable(small),
            most,
            printable(large),
        )
    else:
        log.info("no labels: pre-training needs none, task=finetune, linprobe and knn do")
    for side in ("height", "width"):
        log.info("%s %d to %d pixels, median %d", side, figures[side][0], figures[side][2], figures[side][1])
    if "step_images_per_second" in figures:
        log.info("a training step goes through %.0f images/s where it never waits", figures["step_images_per_second"])
    for count, speed in figures["loading"].items():
        wait = figures.get("data_wait", {}).get(count)
        share = "" if wait is None else f", the step would wait {100 * wait:.0f} % of its time"
        log.info("%s worker%s load %.0f images/s%s", count, "s" * (count != "1"), speed, share)
