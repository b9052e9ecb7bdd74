"""Evaluation of a segmenter on images with maps, exact over any number of ranks."""

import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from mae import data, device
from mae.config.build import build, call
from mae.data.prepare import Prepare
from mae.data.source import IGNORED, Source, has_class_maps
from mae.device import Batch
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.models.segmenter import Segmenter, segmenter
from mae.runs.summary import Summary, rate
from mae.tasks.batches import bad_files_csv, sent, whole_loader
from mae.tasks.init_weights import read_from, same_weights, warn_of_statistics
from mae.tasks.labels import class_numbers
from mae.tasks.segment_maps import WINDOWS, Overlays, count_pixels
from mae.tasks.segment_results import track_pixels, write_pixels
from mae.tracking.base import Tracker
from mae.weights.heads import EVAL_WINDOWS
from mae.weights.load import load_pretrained
from mae.weights.metadata import section
from mae.weights.read import PretrainedWeights

EVAL_STRIDE = 0.6667  # where the file does not say its own: 341 of 512 pixels, as conf/task/segment.yaml
PICTURES = 8  # in the sheet of overlays


def evaluate_segmenter(
    run: Path,
    cfg: DictConfig,
    ranks: Ranks,
    tracker: Tracker,
    pretrained: PretrainedWeights,
    dtype: torch.dtype,
    batch_size: int,
) -> Summary:
    """miou, pixel_accuracy, mean_accuracy and loss of whole images, with tables and pictures in the run.

    At most `batch_size` windows of an image are computed at a time.
    """
    begun = time.perf_counter()
    source: Source = build(data.SOURCES, cfg.data, "val")
    model = load_segmenter(cfg, pretrained)
    same_weights(ranks, model)
    warn_of_statistics(cfg, pretrained)
    model.to(ranks.device, device.weight_format(dtype))
    names, numbers = model_classes(cfg, source, model.decode_head.num_classes, pretrained)
    eval_size, eval_stride = window_settings(pretrained)
    loader = whole_loader(cfg, ranks, source, eval_size, bad_files_csv(run, ranks))
    autocast = partial(device.inference_autocast, dtype, ranks.device)
    prepare, overlays = call(Prepare, cfg.data).to(ranks.device), Overlays(len(source), PICTURES)
    windows = min(WINDOWS, batch_size)
    fewer = f"Set task.batch_size to less than {windows}, the windows of an image that are computed at a time."
    smaller = "Evaluate on smaller images, or by device=cpu."
    with device.explaining_memory(ranks.device, fewer if windows > 1 else smaller):
        batches = renumbered(sent(loader, ranks), numbers)
        results = count_pixels(model, prepare, batches, ranks, autocast, eval_stride, overlays, windows)
    loader.close()
    if results is None:
        raise UserError(f"the maps of data.name={cfg.data.name} ignore every pixel (data.ignore).")
    metrics = results.metrics()
    numbers = {f"val/{name}": value for name, value in metrics.items()}
    tracker.log({"step": 0, "images_seen": len(source), "epoch": 0.0, **numbers})
    if ranks.main:
        write_pixels(run, names, results)
        track_pixels(run, names, results, 0, tracker)
        path = run / "images" / "segmentation.png"
        if overlays.save(path, len(names)):
            tracker.picture("segmentation", path, 0, f"segmentation of {cfg.data.name}")
    seconds = time.perf_counter() - begun
    return Summary(
        "evaluate",
        seconds,
        images_seen=len(source),
        images_per_second=rate(len(source), seconds),
        checkpoint=read_from(cfg, pretrained),
        results=metrics,
    )


def load_segmenter(cfg: DictConfig, pretrained: PretrainedWeights) -> Segmenter:
    """The segmenter in a checkpoint, in evaluation mode. Raises UserError where it holds none."""
    head = pretrained.decode_head
    if head is None:
        raise UserError(f"init={pretrained.path} ({pretrained.kind}) holds no segmenter: train one with task=segment.")
    model = call(segmenter, cfg.model, num_classes=head.classes, drop_path=0.0, head=head.kind)
    load_pretrained(model, pretrained, head="require")
    return model.eval()


def window_settings(pretrained: PretrainedWeights) -> tuple[int | None, float]:
    """`task.eval_size` and `task.eval_stride` of the run that a segmenter comes from, as it or its export says."""
    stated = section(pretrained.meta.config, "task") or pretrained.meta.args
    size, stride = (stated.get(key) for key in EVAL_WINDOWS)
    return size if isinstance(size, int) else None, stride if isinstance(stride, float) else EVAL_STRIDE


def model_classes(
    cfg: DictConfig, source: Source, classes: int, pretrained: PretrainedWeights
) -> tuple[list[str], np.ndarray]:
    """The names of a segmenter's classes, and its class of each of the data's. Raises UserError where the data has
    none, or others."""
    if not has_class_maps(source):
        raise UserError(
            f"init={cfg.init} is a segmenter, and the images of data.name={cfg.data.name} have no maps of classes: "
            "evaluate it on data with maps, such as data=segmentation_folder."
        )
    known = pretrained.meta.classes
    numbers, by_name = class_numbers(cfg, source.classes, classes, [known])
    return (known if by_name else source.classes), numbers


def renumbered(batches: Iterable[Batch], numbers: np.ndarray) -> Iterator[Batch]:
    """Batches whose maps hold the model's classes, `numbers` of the data's."""
    if np.array_equal(numbers, np.arange(len(numbers))):
        yield from batches
        return
    table = torch.full((IGNORED + 1,), IGNORED, dtype=torch.uint8)
    table[: len(numbers)] = torch.from_numpy(numbers)
    for batch in batches:
        yield {**batch, "label": table.to(batch["label"].device)[batch["label"].long()]}
