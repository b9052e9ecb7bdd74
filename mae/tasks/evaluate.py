"""Evaluation of any classifier on any labelled data, exact over any number of ranks."""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from omegaconf import DictConfig
from timm.models.vision_transformer import VisionTransformer

from mae import data, device
from mae.config.build import build, call
from mae.data.loader import EvalLoader
from mae.data.prepare import Prepare
from mae.data.source import Source
from mae.data.sources.robustness import Robustness, corruption_errors, synsets
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.metrics import Collector, Results
from mae.runs.summary import VAL_IMAGES, Summary, rate
from mae.tasks import charts
from mae.tasks.base import Autocast
from mae.tasks.batches import bad_files_csv, eval_loader, sent
from mae.tasks.inference import load_classifier
from mae.tasks.init_weights import need_init, read_from, same_weights, warn_of_crop, warn_of_statistics
from mae.tasks.labels import class_numbers, need_labels
from mae.tasks.results import track_results, write_csv, write_results
from mae.tasks.segment_evaluate import evaluate_segmenter
from mae.tracking.base import Tracker
from mae.weights.read import read_pretrained

log = logging.getLogger(__name__)


def evaluate(
    run: Path,
    cfg: DictConfig,
    ranks: Ranks,
    tracker: Tracker,
    *,
    batch_size: Annotated[int, "[1, inf)"],
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"],
    predictions: Literal["csv", "parquet"],
    calibration_bins: Annotated[int, "[1, inf)"],
) -> Summary:
    """top1, top5, loss, calibration, and per class; predictions with file names and pictures in the run.

    Of a segmenter, miou and what `evaluate_segmenter` says."""
    begun = time.perf_counter()
    if predictions == "parquet":
        need_parquet()
    tracker.start(0, 0)
    pretrained = read_pretrained(need_init(cfg))
    if pretrained.decode_head is not None:
        dtype = device.number_format(precision, ranks.device)
        return evaluate_segmenter(run, cfg, ranks, tracker, pretrained, dtype, batch_size)
    source: Source = build(data.SOURCES, cfg.data, "val")
    model, dtype = load_classifier(cfg, pretrained, len(source.classes)), device.number_format(precision, ranks.device)
    same_weights(ranks, model)
    warn_of_statistics(cfg, pretrained)
    warn_of_crop(cfg, pretrained)
    model.to(ranks.device, device.weight_format(dtype))
    stated = pretrained.meta.classes
    names = stated if len(stated) == model.num_classes else None
    classes = model_classes(cfg, source, model.num_classes, names)
    loader = eval_loader(cfg, ranks, source, batch_size, bad_csv=bad_files_csv(run, ranks))
    autocast = partial(device.inference_autocast, dtype, ranks.device)
    results = predict(cfg, ranks, loader, model, classes, autocast)
    loader.close()
    names = names or all_names(source, model.num_classes, classes)

    error, bins = results.calibration(calibration_bins)
    metrics = {**measured(source, results, model.num_classes), "ece": error}
    numbers = {f"val/{name}": value for name, value in metrics.items() if isinstance(value, float)}
    tracker.log({"step": 0, "images_seen": len(results), "epoch": 0.0, **numbers})
    if ranks.main:
        write_predictions(run, source, results, names, predictions)
        write_results(run, names, results)
        track_results(run, names, source, results, 0, tracker)
        path = run / "images" / "calibration.png"
        charts.calibration(bins, error, path)
        tracker.picture("calibration", path, 0, f"calibration on {cfg.data.name}")
    seconds = time.perf_counter() - begun
    return Summary(
        "evaluate",
        seconds,
        images_seen=len(results),
        images_per_second=rate(len(results), seconds),
        checkpoint=read_from(cfg, pretrained),
        results=metrics,
    )


def measured(source: Source, results: Results, classes: int) -> dict[str, object]:
    """Accuracy and loss in percent and nats, overall and as the mean over classes; of ImageNet-C its errors too."""
    counts = results.per_class(classes)
    mean = 100.0 * float((counts[:, 1] / np.maximum(counts[:, 0], 1))[counts[:, 0] > 0].mean())
    metrics: dict[str, object] = {**results.metrics(), VAL_IMAGES: len(results), "mean_per_class": mean}
    if isinstance(source, Robustness) and source.groups:
        errors, mce = corruption_errors(source.groups, source.group[results.index], results.true_rank == 0)
        metrics |= {"corruption_errors": errors} | ({"mce": mce} if mce is not None else {})
        if mce is None:
            log.warning("mCE needs all 15 corruptions, and data.root holds %d: it is not given", len(errors))
    return metrics


def need_parquet() -> None:
    """Raises UserError where the package that writes Parquet is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError("task.predictions=parquet needs the package pyarrow: use task.predictions=csv.") from error


def model_classes(cfg: DictConfig, source: Source, classes: int, names: list[str] | None) -> np.ndarray:
    """The model's class of each of the data's classes; see `class_numbers`. Raises UserError where labels are
    missing or the classes do not correspond."""
    need_labels(cfg, source, "validation")
    if isinstance(source, Robustness) and classes != len(source.classes):
        raise UserError(
            f"init={cfg.init} knows {classes} classes, but this data is labelled by ImageNet's 1000: evaluate a "
            "classifier of ImageNet-1k on it."
        )
    candidates = [known for known in (names, synsets() if classes == 1000 else None) if known]
    return class_numbers(cfg, source.classes, classes, candidates)[0]


def all_names(source: Source, count: int, classes: np.ndarray) -> list[str]:
    """The names of the model's classes, as far as the data or ImageNet say them."""
    names = list(synsets()) if count == 1000 else [str(k) for k in range(count)]
    for name, k in zip(source.classes, classes, strict=True):
        names[k] = name
    return names


@torch.no_grad()
def predict(
    cfg: DictConfig,
    ranks: Ranks,
    loader: EvalLoader,
    model: VisionTransformer,
    classes: np.ndarray,
    autocast: Autocast,
) -> Results:
    """Predictions for each image; `classes` maps its labels to the model's classes.

    Where the source is labelled by a subset of the classes, the prediction is among those.
    """
    prepare = call(Prepare, cfg.data).to(ranks.device)
    target = torch.from_numpy(classes).to(ranks.device)
    chosen = torch.tensor(loader.source.subset or range(model.num_classes), device=ranks.device)
    number = torch.full((model.num_classes,), -1, device=ranks.device)  # of a class among the chosen ones
    number[chosen] = torch.arange(len(chosen), device=ranks.device)
    collector = Collector()
    for batch in sent(loader, ranks):
        images = prepare(batch["image"]).to(next(model.parameters()).dtype)
        with autocast():
            logits = model(images)
        collector.add(batch["index"], number[target[batch["label"]]], logits[:, chosen])
    results = collector.results(ranks)
    assert results is not None, "a source is never empty"
    back = chosen.cpu().numpy()
    results.label, results.predicted = back[results.label], back[results.predicted]
    return results


def write_predictions(run: Path, source: Source, results: Results, names: list[str], file_format: str) -> None:
    """predictions.csv or .parquet: file, label, predicted, correct, confidence, loss; a row an image."""
    labels, predicted = ([names[k] for k in column] for column in (results.label, results.predicted))
    columns = {
        "file": [source.name(int(k)) for k in results.index],
        "label": labels,
        "predicted": predicted,
        "correct": (results.true_rank == 0).tolist(),
        "confidence": [round(v, 6) for v in results.confidence.tolist()],
        "loss": [round(v, 6) for v in results.loss.tolist()],
    }
    if file_format == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), run / "predictions.parquet")
    else:
        write_csv(run / "predictions.csv", columns, zip(*columns.values(), strict=True))
