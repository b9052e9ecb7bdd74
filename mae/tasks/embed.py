"""Features of any images, labelled or not, to `.npy` or Parquet: each image once over any number of ranks.

Features are computed in parts of whole batches, and a finished part is a file of the run. So the same command goes on
where it was killed, and rows do not depend on the number of ranks.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from mae.checkpoint import weights_digest
from mae.data.source import Source, fingerprint
from mae.device import Batch, Sender
from mae.distributed.ranks import Ranks
from mae.runs.file_system import remove
from mae.runs.files import read_json, replacing, write_json
from mae.runs.outputs import noted
from mae.runs.summary import Summary, rate
from mae.tasks.batches import bad_files_csv, eval_loader
from mae.tasks.inference import ImageModel, Pooling
from mae.tasks.inputs import (
    Which,
    columns_of,
    image_sets,
    model_of_init,
    need_pyarrow,
    output_file,
    written_names,
)
from mae.tasks.results import write_csv
from mae.tracking.base import Tracker

log = logging.getLogger(__name__)

PARTS, STAMP = "parts", "parts.json"  # a folder of the run, and what its files are features of


def embed(
    run: Path,
    cfg: DictConfig,
    ranks: Ranks,
    tracker: Tracker,
    *,
    files: list[str] | None,
    split: Which,
    pooling: Pooling,
    layer: int | None,
    format: Literal["npy", "parquet"],
    path: str | None,
    dtype: Literal["float32", "float16"],
    batch_size: Annotated[int, "[1, inf)"],
    part_batches: Annotated[int, "[1, inf)"],
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"],
) -> Summary:
    """Writes features, a row an image, with the images' names; images that cannot be used have no row."""
    begun = time.perf_counter()
    tracker.start(0, 0)
    if format == "parquet":
        need_pyarrow("task.format", "npy")
    target = output_file(run, path, f"features.{format}", [".csv"] if format == "npy" else [])
    sets = image_sets(cfg, files, split)
    model, autocast, checkpoint = model_of_init(cfg, ranks, precision)
    model.check("task.pooling", pooling, "task.layer", layer)
    stamp = {"weights": weights_digest(model.network.state_dict()), "pooling": pooling, "layer": layer, "dtype": dtype}
    stamp |= {"batch": [batch_size, part_batches], "roots": {name: each.root for name, each in sets.items()}}
    stamp["images"] = {name: fingerprint(each) for name, each in sets.items()}
    if ranks.main:
        take_parts(run / PARTS, stamp)
    ranks.barrier()
    parts = {
        name: Parts(run / PARTS, name, len(source), batch_size, part_batches, np.dtype(dtype))
        for name, source in sets.items()
    }
    encode = partial(model.embed, pooling=pooling, layer=layer)
    for name, source in sets.items():
        own = parts[name].missing(ranks)
        indices = np.concatenate([np.arange(0), *map(parts[name].indices, own)])
        loader = eval_loader(cfg, ranks, source, batch_size, None, bad_files_csv(run, ranks), indices, name)
        with autocast():
            compute(model, encode, map(Sender(ranks.device), loader), parts[name], own)
        loader.close()
    ranks.barrier()
    count, rows, written = sum(map(len, sets.values())), 0, []
    if ranks.main:
        rows, written = WRITERS[format](target, sets, parts, partial(noted, run))
        log.info("%d of %d images have features, in %s", rows, count, target)
        remove(run / PARTS)
    ranks.barrier()
    seconds = time.perf_counter() - begun
    return Summary(
        "embed",
        seconds,
        images_seen=count,
        images_per_second=rate(count, seconds),
        checkpoint=checkpoint,
        results={"files": written_names(run, written), "rows": rows, "bad": count - rows},
    )


class Parts:
    """The files of one set of images: part k holds the images from k * size on. A file is there whole or not at all."""

    def __init__(self, folder: Path, name: str, count: int, batch_size: int, part_batches: int, dtype: np.dtype):
        self.folder, self.name, self.count, self.dtype = folder, name, count, dtype
        self.size = batch_size * part_batches

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:06d}.npz"

    def indices(self, number: int) -> np.ndarray:
        """The images of a part."""
        return np.arange(number * self.size, min((number + 1) * self.size, self.count))

    def missing(self, ranks: Ranks) -> list[int]:
        """Parts that this rank has still to compute."""
        return [number for number in range(ranks.rank, len(self), ranks.world) if not self.path(number).exists()]

    def write(self, number: int, index: np.ndarray, feature: np.ndarray) -> None:
        with replacing(self.path(number)) as temporary, temporary.open("wb") as file:
            np.savez(file, index=index, feature=feature.astype(self.dtype))

    def rows(self) -> np.ndarray:
        """The images that have features."""
        return np.concatenate([np.arange(0), *(self._member(number, "index") for number in range(len(self)))])

    def features(self) -> Iterator[np.ndarray]:
        """The features (n, ...) of each part."""
        return (self._member(number, "feature") for number in range(len(self)))

    def _member(self, number: int, name: str) -> np.ndarray:
        with np.load(self.path(number)) as stored:
            return stored[name]


def take_parts(folder: Path, stamp: Mapping[str, object]) -> None:
    """Makes the folder of parts, without those of other weights, images or settings than `stamp` says.

    Images of the same names in another folder are others: what a file holds is not looked at."""
    if folder.is_dir() and read_json(folder / STAMP) != stamp:
        log.info("%s holds parts of other weights, images or settings: they are computed again", folder)
        remove(folder)
    folder.mkdir(exist_ok=True)
    write_json(folder / STAMP, stamp)


def compute(
    model: ImageModel,
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    parts: Parts,
    own: Sequence[int],
) -> None:
    """Writes the parts `own`, whose images `batches` are in order. A stand-in for a bad image gives no row."""
    stream = iter(batches)
    for done, number in enumerate(own, start=1):
        expected = parts.indices(number)
        index, feature = np.zeros(0, np.int64), []
        while len(index) < len(expected):
            batch = next(stream)
            feature.append(encode(model.normalised(batch["image"])).float().cpu().numpy())
            index = np.concatenate([index, batch["index"].cpu().numpy()])
        usable = index == expected
        parts.write(number, index[usable], np.concatenate(feature)[usable])
        log.info("%s: %d of %d parts", parts.name, done, len(own))
    assert next(stream, None) is None


Opener = Callable[[Path], AbstractContextManager[Path]]  # of a temporary file that then replaces the target


def write_npy(
    target: Path, sets: Mapping[str, Source], parts: Mapping[str, Parts], replaced: Opener
) -> tuple[int, list[Path]]:
    """features.npy (N, ...), and features.csv with the name of each row; returns the rows and the files."""
    rows = {name: each.rows() for name, each in parts.items()}
    count, names = sum(map(len, rows.values())), target.with_suffix(".csv")
    start = 0
    with replaced(target) as temporary:
        array = None
        for feature in features_of(parts):
            if array is None:
                shape = (count, *feature.shape[1:])
                array = np.lib.format.open_memmap(temporary, "w+", feature.dtype, shape)
            array[start : start + len(feature)] = feature
            start += len(feature)
        assert array is not None
        array.flush()
    columns = columns_of(sets, rows)
    with replaced(names) as temporary:
        write_csv(temporary, columns, zip(*columns.values(), strict=True))
    return count, [target, names]


def write_parquet(
    target: Path, sets: Mapping[str, Source], parts: Mapping[str, Parts], replaced: Opener
) -> tuple[int, list[Path]]:
    """Columns file, split, label and feature, a list of one length; patches (L, D) lie in it one after another."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {name: each.rows() for name, each in parts.items()}
    columns = columns_of(sets, rows)
    start, writer = 0, None
    with replaced(target) as temporary:
        for feature in features_of(parts):
            flat = feature.reshape(len(feature), -1)
            table = pa.table({name: pa.array(c[start : start + len(flat)], pa.string()) for name, c in columns.items()})
            lists = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
            table = table.append_column("feature", lists)
            table = table.replace_schema_metadata({"feature_shape": json.dumps(list(feature.shape[1:]))})
            writer = writer or pq.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
            start += len(flat)
        assert writer is not None
        writer.close()
    return start, [target]


def features_of(parts: Mapping[str, Parts]) -> Iterator[np.ndarray]:
    """The features of all parts of all sets, in the order of the rows."""
    return (feature for each in parts.values() for feature in each.features())


WRITERS = {"npy": write_npy, "parquet": write_parquet}
