"""Maps of any images by a segmenter: a PNG with a palette for each, a table of them, and overlays."""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from mae import device
from mae.data.source import IGNORED, Source, Target
from mae.distributed.ranks import Ranks
from mae.errors import UserError
from mae.models.segmenter import Segmenter
from mae.runs.outputs import noted, others_files
from mae.tasks import charts
from mae.tasks.base import Autocast
from mae.tasks.batches import bad_files_csv, sent, whole_loader
from mae.tasks.inputs import columns_of, written_names
from mae.tasks.results import ROWS, write_table
from mae.tasks.segment_inference import SegmentationModel
from mae.tasks.segment_maps import SHOWN, full_size_logits, overlay, palette
from mae.tracking.base import Tracker

log = logging.getLogger(__name__)

MAPS = "maps"  # the folder of maps, beside their table
SHEET_COLUMNS = 4  # of the sheet of overlays


@dataclass(frozen=True)
class PredictJob:
    """The images of task=predict, and where their results go."""

    run: Path
    cfg: DictConfig
    ranks: Ranks
    tracker: Tracker
    sets: Mapping[str, Source]
    autocast: Autocast


class Sized(Source):
    """The images of a source, whose targets are maps of zeros of their sizes: those of the maps to predict."""

    def __init__(self, source: Source):
        self.source, self.classes = source, []

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image = self.source[index][0]
        return image, torch.zeros(image.shape[-2:], dtype=torch.uint8)

    def name(self, index: int) -> str:
        return self.source.name(index)


class Row(NamedTuple):
    """The pixels of a map."""

    image: int
    pixels: np.ndarray  # (classes,) int64, of each class


def write_maps(
    job: PredictJob, model: SegmentationModel, target: Path, top_k: int, num_images: int, windows: int
) -> dict[str, object]:
    """A PNG of each image in `maps`, the table `target`, and a sheet; returns what the summary says of them.

    `windows` of an image are computed at a time. Raises UserError where `task.path` holds maps already.
    """
    folder, ranks = target.parent / MAPS, job.ranks
    names = {name: map_names(name if len(job.sets) > 1 else "", source) for name, source in job.sets.items()}
    if target.parent != job.run:
        check_maps(job.run, folder, [name for each in names.values() for name in each])
    ranks.barrier()
    count, number = sum(map(len, job.sets.values())), 0
    shown = set(np.linspace(0, count - 1, min(count, num_images)).astype(int).tolist())
    rows: dict[str, list[Row]] = {}
    cells: list[Cell] = []
    for name, source in job.sets.items():
        wanted = {index - number for index in shown}
        mine, mine_shown = predict_set(job, model, name, [folder / each for each in names[name]], wanted, windows)
        gathered = [row for each in ranks.gather(mine) for row in each]
        rows[name] = sorted(gathered, key=lambda row: row.image)
        shown_cells = [cell for each in ranks.gather(mine_shown) for cell in each]
        cells += [cell._replace(image=number + cell.image) for cell in shown_cells]
        number += len(source)
    total = sum((row.pixels for each in rows.values() for row in each), np.zeros(len(model.classes), np.int64))
    written = sum(map(len, rows.values()))
    if ranks.main:
        columns = table_of(model.classes, job.sets, rows, names, top_k)
        write_table(job.run, target, columns)
        job.tracker.table("maps", [*columns], list(zip(*columns.values(), strict=True))[:ROWS], 0)
        cells.sort(key=lambda cell: cell.image)
        picture = job.run / "images" / "maps.png"
        title = f"{job.cfg.model.name}: {len(cells)} of {written} images and their maps"
        if cells:  # else all that it would show are bad
            captions = [(cell.name, cell.share) for cell in cells]
            both = [cell.picture for cell in cells]
            charts.captioned(both, captions, title, picture, SHEET_COLUMNS, aspect=2.0)
            job.tracker.picture("maps", picture, 0, f"maps by {job.cfg.init}")
        log.info("%d of %d images have maps, in %s", written, count, folder)
    shares = {model.classes[k]: round(100 * int(total[k]) / max(1, int(total.sum())), 4) for k in np.argsort(-total)}
    files = written_names(job.run, [target, folder])
    return {"files": files, "rows": written, "bad": count - written, "percent_of_pixels": shares}


def check_maps(run: Path, folder: Path, names: Sequence[str]) -> None:
    """Raises UserError where a folder of maps holds files that the run has not written."""
    seen = [path for path in folder.rglob("*") if not path.name.startswith(".") and not path.is_dir()]
    if strange := others_files(run, [*seen, *(folder / name for name in names)]):
        raise UserError(
            f"task.path={folder.parent}: {folder} holds files, which are not overwritten, such as {strange[0].name}. "
            "Choose another path."
        )


class Cell(NamedTuple):
    """An image with its overlay in the sheet."""

    image: int
    picture: Tensor  # (3, h, 2 w) in [0, 1]
    name: str
    share: str  # of the class that has most pixels, in words


@torch.no_grad()
def predict_set(
    job: PredictJob, model: SegmentationModel, name: str, paths: Sequence[Path], wanted: set[int], windows: int
) -> tuple[list[Row], list[Cell]]:
    """Writes the maps of this rank's images of a set. Returns their rows, and the cells of `wanted` images."""
    ranks, source, network = job.ranks, job.sets[name], model.network
    assert isinstance(network, Segmenter)
    weight, colours = next(network.parameters()), png_palette(len(model.classes))
    rows, cells = [], []
    loader = whole_loader(job.cfg, ranks, Sized(source), model.eval_size, bad_files_csv(job.run, ranks), name)
    fewer = "Set task.batch_size to fewer windows of an image that are computed at a time, or predict by device=cpu."
    with device.explaining_memory(ranks.device, fewer):
        for batch in sent(loader, ranks):
            index = int(batch["index"][0])
            height, width = batch["label"].shape[-2:]
            pixels = model.prepare(batch["image"]).to(weight.dtype)
            with job.autocast():
                logits = full_size_logits(network, pixels, (height, width), model.eval_stride, windows)
            values = logits[0].argmax(0).to(torch.uint8).cpu()
            write_map(job, paths[index], values, colours)
            rows.append(Row(index, torch.bincount(values.flatten().long(), minlength=len(model.classes)).numpy()))
            if index in wanted:
                shown = model.prepare.undo(pixels.float())[0].cpu()
                largest = int(rows[-1].pixels.argmax())
                share = f"{model.classes[largest]} {100 * rows[-1].pixels[largest] / values.numel():.0f} %"
                both = side_by_side(shown, values, len(model.classes))
                cells.append(Cell(index, both, paths[index].stem, share))
    loader.close()
    return rows, cells


def map_names(folder: str, source: Source) -> list[str]:
    """Where the map of each image lies in `maps`: in folders as the images, of the same stem, and a PNG.

    Images whose maps would have the same name keep their whole names, as in a.jpg.png. Absolute names are taken from
    their common folder.
    """
    names = [source.name(index) for index in range(len(source))]
    if any(PurePath(name).is_absolute() or ".." in PurePath(name).parts for name in names):
        paths = [os.path.abspath(name) for name in names]
        start = os.path.commonpath([os.path.dirname(path) for path in paths])
        names = [os.path.relpath(path, start) for path in paths]
    whole = [str(PurePath(folder, name)) for name in names]
    maps = [str(PurePath(name).with_suffix("")) for name in whole]
    while True:  # a whole name may be the stem of another image, as a.jpg of a.jpg.png
        often = Counter(maps)
        changed = [name if often[stem] > 1 else stem for stem, name in zip(maps, whole, strict=True)]
        if changed == maps:
            return [f"{name}.png" for name in maps]
        maps = changed


def png_palette(classes: int) -> bytes:
    """256 colours of a PNG: of the classes, as in overlays, and white for ignored pixels."""
    colours = np.zeros((256, 3), np.uint8)
    chosen = (palette(classes)[:256] * 255).round().astype(np.uint8)
    colours[: len(chosen)] = chosen
    colours[IGNORED] = 255
    return colours.tobytes()


def write_map(job: PredictJob, path: Path, values: Tensor, colours: bytes) -> None:
    """A map (H, W) uint8 as a PNG, whose pixels are the classes and whose palette shows them."""
    image = Image.fromarray(values.numpy())
    image.putpalette(colours)
    path.parent.mkdir(parents=True, exist_ok=True)
    with noted(job.run, path, job.ranks.rank) as temporary:
        image.save(temporary, format="PNG")


def side_by_side(image: Tensor, values: Tensor, classes: int) -> Tensor:
    """An image (C, H, W) in [0, 1] and its overlay (3, h, 2 w), of `SHOWN` pixels at most."""
    scale = min(1.0, SHOWN / max(values.shape))
    size = [max(1, round(side * scale)) for side in values.shape]
    grey = image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    small = F.interpolate(grey[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    shown = F.interpolate(values[None, None].float(), size=size)[0, 0].to(torch.uint8).numpy()
    return torch.cat([small, overlay(small, shown, classes)], 2)


def table_of(
    classes: Sequence[str],
    sets: Mapping[str, Source],
    rows: Mapping[str, Sequence[Row]],
    names: Mapping[str, Sequence[str]],
    top_k: int,
) -> dict[str, Sequence[object]]:
    """Columns file, split, map, and class_1, share_1 and so on: the classes of most pixels, and their share."""
    images = {name: np.array([row.image for row in each], np.int64) for name, each in rows.items()}
    columns: dict[str, Sequence[object]] = {**columns_of(sets, images)}
    columns["map"] = [f"{MAPS}/{names[name][row.image]}" for name, each in rows.items() for row in each]
    pixels = [row.pixels for each in rows.values() for row in each]
    order = [np.argsort(-counts, kind="stable") for counts in pixels]
    for k in range(min(top_k, len(classes))):
        present = [int(counts[numbers[k]]) > 0 for counts, numbers in zip(pixels, order, strict=True)]
        columns[f"class_{k + 1}"] = [
            classes[numbers[k]] if is_present else None for numbers, is_present in zip(order, present, strict=True)
        ]
        columns[f"share_{k + 1}"] = [
            round(int(counts[numbers[k]]) / int(counts.sum()), 6) for counts, numbers in zip(pixels, order, strict=True)
        ]
    return columns
