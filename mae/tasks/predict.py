"""Labels or maps of any images, labelled or not, with a contact sheet: each image once over all ranks."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig

from mae.data.source import Source
from mae.distributed.ranks import Ranks
from mae.runs.summary import Summary, rate
from mae.tasks import charts
from mae.tasks.batches import bad_files_csv, eval_loader, sent
from mae.tasks.inference import ImageModel
from mae.tasks.inputs import (
    Which,
    columns_of,
    image_sets,
    model_of_init,
    need_pyarrow,
    output_file,
    rank_batches,
    written_names,
)
from mae.tasks.results import ROWS, write_table
from mae.tasks.segment_inference import SegmentationModel
from mae.tasks.segment_maps import WINDOWS
from mae.tasks.segment_predict import PredictJob, write_maps
from mae.tracking.base import Tracker

log = logging.getLogger(__name__)


class Labels(NamedTuple):
    """The most probable classes of the usable images of a set, in its order and the same on every rank."""

    images: np.ndarray  # (N,) int64
    classes: np.ndarray  # (N, k) int64, the most probable first
    probabilities: np.ndarray  # (N, k) float32


def predict(
    run: Path,
    cfg: DictConfig,
    ranks: Ranks,
    tracker: Tracker,
    *,
    files: list[str] | None,
    split: Which,
    top_k: Annotated[int, "[1, inf)"],
    format: Literal["csv", "parquet"],
    path: str | None,
    num_images: Annotated[int, "[1, inf)"],
    batch_size: Annotated[int, "[1, inf)"],
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"],
) -> Summary:
    """Writes file, class_1, probability_1 ... of each image; one that cannot be used has no row.

    Of a segmenter it writes a map for each image, and file, map, class_1, share_1 ... of its pixels.
    """
    begun = time.perf_counter()
    tracker.start(0, 0)
    if format == "parquet":
        need_pyarrow("task.format", "csv")
    sets = image_sets(cfg, files, split)
    model, autocast, checkpoint = model_of_init(cfg, ranks, precision)
    job = PredictJob(run, cfg, ranks, tracker, sets, autocast)
    if isinstance(model, SegmentationModel):
        target = output_file(run, path, f"maps.{format}")
        results = write_maps(job, model, target, top_k, num_images, min(WINDOWS, batch_size))
    else:
        model.need_classes()
        target = output_file(run, path, f"labels.{format}")
        results = write_labels(job, model, target, top_k, num_images, batch_size)
    ranks.barrier()
    count, seconds = sum(map(len, sets.values())), time.perf_counter() - begun
    return Summary(
        "predict",
        seconds,
        images_seen=count,
        images_per_second=rate(count, seconds),
        checkpoint=checkpoint,
        results=results,
    )


def write_labels(
    job: PredictJob, model: ImageModel, target: Path, top_k: int, num_images: int, batch_size: int
) -> dict[str, object]:
    """The table of labels and the contact sheet; returns what the summary says of them."""
    cfg, ranks, labels = job.cfg, job.ranks, {}
    for name, source in job.sets.items():
        indices = rank_batches(len(source), batch_size, ranks.rank, ranks.world)
        loader = eval_loader(cfg, ranks, source, batch_size, None, bad_files_csv(job.run, ranks), indices, name)
        with job.autocast(), torch.no_grad():
            batches = [
                (batch["index"].cpu(), *model.top(model.logits(model.normalised(batch["image"])), top_k))
                for batch in sent(loader, ranks)
            ]
        loader.close()
        labels[name] = together(ranks, batches)
    count, rows = sum(map(len, job.sets.values())), sum(len(each.images) for each in labels.values())
    if ranks.main:
        columns = table_of(model, job.sets, labels)
        write_table(job.run, target, columns)
        picture = job.run / "images" / "labels.png"
        contact_sheet(cfg, model, job.sets, labels, num_images, picture)
        job.tracker.picture("labels", picture, 0, f"labels by {cfg.init}")
        job.tracker.table("labels", [*columns], list(zip(*columns.values(), strict=True))[:ROWS], 0)
        log.info("%d of %d images have labels, in %s", rows, count, target)
    first = Counter(model.classes[number] for each in labels.values() for number in each.classes[:, 0].tolist())
    written = written_names(job.run, [target])
    return {"files": written, "rows": rows, "bad": count - rows, "predicted": dict(first.most_common())}


def together(ranks: Ranks, batches: list[tuple[torch.Tensor, ...]]) -> Labels:
    """All ranks' labels in the order of the images."""
    mine = [torch.cat(columns).numpy() for columns in zip(*batches, strict=True)]
    gathered = [columns for columns in ranks.gather(mine) if columns]
    columns = [np.concatenate(column) for column in zip(*gathered, strict=True)]
    order = np.argsort(columns[0])
    return Labels(*(column[order] for column in columns))


def table_of(
    model: ImageModel, sets: Mapping[str, Source], labels: Mapping[str, Labels]
) -> dict[str, Sequence[object]]:
    """Columns file, split, label, and class_1, probability_1 and so on; a row an image."""
    columns: dict[str, Sequence[object]] = {**columns_of(sets, {name: each.images for name, each in labels.items()})}
    classes = np.concatenate([each.classes for each in labels.values()])
    probabilities = np.concatenate([each.probabilities for each in labels.values()])
    for k in range(classes.shape[1]):
        columns[f"class_{k + 1}"] = [model.classes[number] for number in classes[:, k].tolist()]
        columns[f"probability_{k + 1}"] = [round(value, 6) for value in probabilities[:, k].tolist()]
    return columns


def contact_sheet(
    cfg: DictConfig,
    model: ImageModel,
    sets: Mapping[str, Source],
    labels: Mapping[str, Labels],
    count: int,
    path: Path,
) -> None:
    """Images spread over all sets, as the network sees them, with label and probability below each."""
    rows = [(sets[name], each, row) for name, each in labels.items() for row in range(len(each.images))]
    images, captions = [], []
    for k in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)).tolist():
        source, each, row = rows[k]
        image = model.crop(source[int(each.images[row])][0])
        images.append(model.prepare.undo(model.prepare(image[None].to(model.prepare.mean.device)))[0])
        captions.append((model.classes[each.classes[row, 0]], f"{100 * each.probabilities[row, 0]:.1f} %"))
    charts.captioned(images, captions, f"{cfg.model.name}: {len(images)} of {len(rows)} images", path)
