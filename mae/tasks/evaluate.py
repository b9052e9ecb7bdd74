"""Evaluation of any classifier on any labelled data, exact over any number of ranks."""

import csv
import logging
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig

from mae import data, device
from mae.config.build import build, call
from mae.data.prepare import Prepare
from mae.data.source import Source
from mae.data.sources.robustness import Robustness, corruption_errors, synsets
from mae.metrics import Collector, Results
from mae.models.vit import classifier
from mae.tasks import charts
from mae.tasks.common import (
    bad_files,
    eval_loader,
    kept_classes,
    need_init,
    need_labels,
    read_from,
    same_weights,
    sent,
    warn_of_crop,
    warn_of_statistics,
)
from mae.tasks.linprobe import head as probe_head
from mae.tasks.results import tell, write_all
from mae.weights.load import load_pretrained
from mae.weights.read import PretrainedWeights, read_pretrained

log = logging.getLogger(__name__)


def evaluate(
    run: Path,
    cfg: DictConfig,
    ranks: Any,
    tracker: Any,
    *,
    batch_size: Annotated[int, "[1, inf)"],
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"],
    predictions: Literal["csv", "parquet"],
    calibration_bins: Annotated[int, "[1, inf)"],
) -> dict[str, Any]:
    """top1, top5, loss, calibration, and per class; predictions with file names and pictures in the run."""
    begun = time.perf_counter()
    if predictions == "parquet":
        need_parquet()
    tracker.start(0, 0)
    pretrained = read_pretrained(need_init(cfg))
    source: Source = build(data.SOURCES, cfg.data, "val")
    model, dtype = load_classifier(cfg, pretrained, len(source.classes)), device.number_format(precision, ranks.device)
    same_weights(ranks, model)
    warn_of_statistics(cfg, pretrained)
    warn_of_crop(cfg, pretrained)
    model.to(ranks.device, torch.float64 if dtype is torch.float64 else None)
    names = kept_classes(cfg.init)
    place = places(cfg, source, model.num_classes, names)
    results = predict(cfg, ranks, source, model, dtype, batch_size, place, source.subset, bad_files(run, ranks))
    names = names or list(_names(source, model.num_classes, place))

    figures: dict[str, Any] = results.figures()
    figures["ece"], bins = results.calibration(calibration_bins)
    counts = results.per_class(model.num_classes)
    figures["mean_per_class"] = 100.0 * float((counts[:, 1] / np.maximum(counts[:, 0], 1))[counts[:, 0] > 0].mean())
    if isinstance(source, Robustness) and source.groups:
        errors, mce = corruption_errors(source.groups, source.group[results.index], results.place == 0)
        figures |= {"corruption_errors": errors} | ({"mce": mce} if mce is not None else {})
        if mce is None:
            log.warning("mCE needs all 15 corruptions, and data.root holds %d: it is not given", len(errors))
    where = {"step": 0, "images_seen": len(results), "epoch": 0.0}
    tracker.log(where | {f"val/{k}": v for k, v in figures.items() if isinstance(v, float)})
    if ranks.main:
        write_predictions(run, source, results, names, predictions)
        write_all(run, names, results)
        tell(run, names, source, results, 0, tracker, cfg.data.name)
        path = run / "images" / "calibration.png"
        charts.calibration(bins, figures["ece"], path)
        tracker.picture("calibration", path, 0, f"calibration on {cfg.data.name}")
    seconds = time.perf_counter() - begun
    return {
        "task": "evaluate",
        "steps": 0,
        "epochs": 0,
        "images_seen": len(results),
        "seconds": round(seconds, 2),
        "images_per_second": round(len(results) / seconds, 1),
        "checkpoint": read_from(cfg, pretrained),
        **figures,
    }


def need_parquet() -> Any:
    """The package that writes Parquet. Raises ValueError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("task.predictions=parquet needs the package pyarrow: use task.predictions=csv.") from error
    return pyarrow


def load_classifier(cfg: DictConfig, pretrained: PretrainedWeights, classes: int) -> Any:
    """The classifier in a checkpoint, with as many classes as it knows. Raises ValueError where there is none."""
    theirs = pretrained.head
    count, pool = (theirs.classes, theirs.pool) if theirs else (max(classes, 1), "avg")
    model = call(classifier, cfg.model, num_classes=count, drop_path=0.0, global_pool=pool)
    if theirs is not None and theirs.batch_norm:
        model.add_module("head", probe_head(model.embed_dim, count))
    load_pretrained(model, pretrained, head="require")
    return model.eval()


def places(cfg: DictConfig, source: Source, classes: int, names: list[str] | None) -> np.ndarray:
    """The model's class of each of the data's classes: by name where both are known, else by order.

    Raises ValueError where labels are missing or the classes do not correspond.
    """
    need_labels(cfg, source, "validation")
    if isinstance(source, Robustness) and classes != len(source.classes):
        raise ValueError(
            f"init={cfg.init} knows {classes} classes, but this data is labelled by ImageNet's 1000: evaluate a "
            "classifier of ImageNet-1k on it."
        )
    known = names or (list(synsets()) if classes == 1000 else None)
    if known is not None and set(source.classes) <= set(known):
        number = {name: k for k, name in enumerate(known)}
        return np.array([number[name] for name in source.classes], np.int64)
    if len(source.classes) != classes:
        raise ValueError(
            f"init={cfg.init} knows {classes} classes, but data.name={cfg.data.name} holds {len(source.classes)}: "
            "evaluate on data with the classes it was trained on."
        )
    if known is not None:
        log.warning("the classes have other names than those trained on: they are matched by their order")
    return np.arange(classes)


def _names(source: Source, classes: int, place: np.ndarray) -> list[str]:
    names = list(synsets()) if classes == 1000 else [str(k) for k in range(classes)]
    for name, k in zip(source.classes, place, strict=True):
        names[k] = name
    return names


@torch.no_grad()
def predict(
    cfg: DictConfig,
    ranks: Any,
    source: Source,
    model: Any,
    dtype: torch.dtype,
    batch_size: int,
    place: np.ndarray,
    subset: list[int] | None,
    bad_csv: Path,
) -> Results:
    """What the model says of each image; `place` maps labels to its classes, `subset` are those asked for."""
    prepare = call(Prepare, cfg.data).to(ranks.device)
    target = torch.from_numpy(place).to(ranks.device)
    asked = torch.tensor(subset or range(model.num_classes), device=ranks.device)
    inside = torch.full((model.num_classes,), -1, device=ranks.device)
    inside[asked] = torch.arange(len(asked), device=ranks.device)
    loader, found = eval_loader(cfg, ranks, source, batch_size, bad_csv=bad_csv), Collector()
    for batch in sent(loader, ranks):
        images = prepare(batch["image"]).to(model.pos_embed.dtype)
        with device.autocast(dtype, ranks.device):
            logits = model(images)
        found.add(batch["index"], inside[target[batch["label"]]], logits[:, asked])
    loader.close()
    results = found.results(ranks)
    assert results is not None, "a source is never empty"
    back = asked.cpu().numpy()
    results.label, results.predicted = back[results.label], back[results.predicted]
    return results


def write_predictions(run: Path, source: Source, results: Results, names: list[str], form: str) -> None:
    """predictions.csv or .parquet: file, label, predicted, correct, confidence, loss; a row an image."""
    files = [source.name(int(k)) for k in results.index]
    labels, predicted = ([names[k] for k in column] for column in (results.label, results.predicted))
    columns = {
        "file": files,
        "label": labels,
        "predicted": predicted,
        "correct": (results.place == 0).tolist(),
        "confidence": [round(v, 6) for v in results.confidence.tolist()],
        "loss": [round(v, 6) for v in results.loss.tolist()],
    }
    if form == "parquet":
        pyarrow = need_parquet()
        pyarrow.parquet.write_table(pyarrow.table(columns), run / "predictions.parquet")
        return
    with (run / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
