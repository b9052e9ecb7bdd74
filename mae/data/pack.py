"""Packs any source into tar shards: `python -m mae.data.pack OUT data=folder data.root=DIR`.

The images are shuffled once, for a loader reads them shard by shard. Their files are kept as they are or,
with --size, made smaller and encoded anew (the model's inputs then change). Each shard is written beside,
flushed and renamed, with a note of what it holds; started again, the program goes on with the shards that
are missing. The index comes last, and only then is the packing complete.
"""

import argparse
import csv
import hashlib
import inspect
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch.utils.data import DataLoader, Dataset

from mae.data import SOURCES, flat
from mae.data.shards import INDEX, Index
from mae.data.source import BadImage, Source
from mae.data.tar import Collector, Members, joined

NOTES = "packing"  # folder of the shards' notes until the index is written
PLAN = "plan.json"
KINDS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp", b"II": "tif", b"MM": "tif"}


class Form(NamedTuple):
    """How images are written."""

    size: int | None  # pixels of the shorter side, or None to keep the files as they are
    quality: int  # of JPEG, where they are encoded anew


def encoded(source: Source, index: int, form: Form) -> bytes:
    """The file of an image. Raises BadImage or OSError."""
    raw = getattr(source, "raw", None)
    if form.size is None and raw is not None and (data := _raw(source, index)) is not None:
        source[index]  # a damaged file shall not be packed
        return bytes(data)
    image = source[index][0]
    if image.dtype != torch.uint8 or image.shape[0] not in (1, 3, 4):
        raise BadImage(f"{image.shape[0]} channels of {image.dtype} do not fit an image file")
    pixels = image.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
    picture = Image.fromarray(pixels)
    if form.size is not None and min(picture.size) > form.size:
        scale = form.size / min(picture.size)
        width, height = (max(form.size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if form.size is None or picture.mode == "RGBA":
        picture.save(out, "PNG")
    else:
        picture.save(out, "JPEG", quality=form.quality)
    return out.getvalue()


def _raw(source: Source, index: int) -> bytes | None:
    try:
        return source.raw(index)  # type: ignore[attr-defined]
    except AttributeError:  # a part of a source that has no files
        return None


def write_shard(source: Source, indices: np.ndarray, path: Path, form: Form) -> tuple[Members, list, str]:
    """One tar file: what it holds, the images left out (index, name, reason), and its SHA-256."""
    found, bad, digest = Collector(), [], hashlib.sha256()
    temporary = path.with_name(f"{path.name}.part")
    with open(temporary, "wb") as file:

        def put(name: str, data: bytes) -> int:
            head = tarfile.TarInfo(name)
            head.size, head.mtime, head.mode = len(data), 0, 0o644
            block = head.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
            digest.update(block)
            file.write(block)
            return file.tell() - len(block) + tarfile.BLOCKSIZE

        for index in indices.tolist():
            try:
                data = encoded(source, index, form)
            except (BadImage, OSError) as error:
                bad.append([index, source.name(index), str(error)])
                continue
            key, label = f"{index:010}", -1 if source.labels is None else int(source.labels[index])
            offset = put(f"{key}.{KINDS.get(data[:2], 'img')}", data)
            if label >= 0:
                put(f"{key}.cls", str(label).encode())
            found.add(key, offset, len(data), label)
        ending = bytes(2 * tarfile.BLOCKSIZE)
        digest.update(ending)
        file.write(ending)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return found.members(), bad, digest.hexdigest()


class Jobs(Dataset):
    """The shards still to be written: item k writes the k-th, with its note, and gives its number of images.
    A data set, so that torch's workers hold the source once each and take the items in turn."""

    def __init__(self, source: Source, parts: list[np.ndarray], paths: list[Path], form: Form):
        self.source, self.parts, self.paths, self.form = source, parts, paths, form

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> int:
        path = self.paths[number]
        found, bad, digest = write_shard(self.source, self.parts[number], path, self.form)
        note = path.parent / NOTES / f"{path.name}.note"
        head = {"sha256": digest, "bytes": path.stat().st_size, "bad": bad}
        flat.write(note, head, found._asdict())
        return len(self.parts[number])


def done(path: Path) -> bool:
    """Whether a shard and its note are there and agree."""
    try:
        head, _ = flat.read_head(path.parent / NOTES / f"{path.name}.note")
        return path.stat().st_size == head["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def pack(source: Source, out: Path, form: Form, per_shard: int, workers: int, seed: int = 0) -> dict[str, Any]:
    """Packs a source into `out`. Returns counts. Raises ValueError where `out` holds something else."""
    plan = {"images": len(source), "first": source.name(0), "per_shard": per_shard, "seed": seed}
    plan |= form._asdict() | {"classes": source.classes}
    prepare(out, plan)
    order = np.random.default_rng(seed).permutation(len(source))
    parts = [order[i : i + per_shard] for i in range(0, len(order), per_shard)]
    paths = [out / f"shard-{k:06}.tar" for k in range(len(parts))]
    left = [(part, path) for part, path in zip(parts, paths, strict=True) if not done(path)]
    jobs = Jobs(source, [part for part, _ in left], [path for _, path in left], form)
    count = min(workers, len(jobs)) if workers > 1 else 0
    written = DataLoader(jobs, batch_size=None, num_workers=count, generator=torch.Generator())
    with Progress(disable=not sys.stderr.isatty()) as progress:
        completed = len(source) - sum(len(part) for part, _ in left)
        bar = progress.add_task("packing", total=len(source), completed=completed)
        for images in written:
            progress.advance(bar, images)
    return finish(source, out, paths)


def prepare(out: Path, plan: dict[str, Any]) -> None:
    """An empty folder, or one that the same packing has begun to fill."""
    if (out / INDEX).exists():
        raise ValueError(f"{out} is packed already: choose another folder, or remove this one first.")
    begun = out / NOTES / PLAN
    if begun.exists():
        if json.loads(begun.read_text()) != plan:
            raise ValueError(f"{out} was begun with another source or other options: choose another folder.")
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty, and nothing is overwritten: choose another folder.")
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(plan))


def finish(source: Source, out: Path, paths: list[Path]) -> dict[str, Any]:
    """Verifies the shards by their checksums, writes the index and the list of bad files."""
    parts, sizes, sums, bad = [], [], [], []
    for path in paths:
        head, arrays = flat.read(path.parent / NOTES / f"{path.name}.note")
        if checksum(path) != head["sha256"]:
            path.unlink()
            raise ValueError(f"{path} is not what was written, and was removed: start again to write it anew.")
        parts.append(Members(**arrays))
        sizes.append(head["bytes"])
        sums.append(head["sha256"])
        bad += head["bad"]
    if bad:
        with open(out / "bad_files.csv", "w", newline="") as file:
            csv.writer(file).writerows([("index", "name", "reason"), *bad])
    counts = [len(p.offsets) for p in parts]
    assert sum(counts) + len(bad) == len(source)
    index = Index([p.name for p in paths], sizes, counts, joined(parts), source.classes)
    index.save(out / INDEX, sha256=sums)
    for note in (out / NOTES).iterdir():
        note.unlink()
    (out / NOTES).rmdir()
    return {"images": sum(counts), "bad": len(bad), "shards": len(paths), "bytes": sum(sizes)}


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def composed(overrides: list[str]) -> dict[str, Any]:
    """The `data` group of the configuration, as `run.py` would compose it."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    conf = Path(__file__).parents[2] / "conf"
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            data = OmegaConf.to_container(compose("config", overrides=overrides).data, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(str(error).split("\n")[0]) from error
    assert isinstance(data, dict)
    return {str(k): v for k, v in data.items()}


def opened(data: dict[str, Any], split: str) -> Source:
    """The source that a composed `data` group names."""
    make = SOURCES[data["name"]]
    wanted = [p.name for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return make(split, **{name: data[name] for name in wanted})


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mae.data.pack", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="a new folder; train/ and val/ are made in it")
    parser.add_argument("overrides", nargs="+", help="data=..., data.root=..., as for run.py")
    parser.add_argument("--size", type=int, help="pixels of the shorter side; without it files stay as they are")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG, with --size (default 90)")
    parser.add_argument("--per-shard", type=int, default=2048, help="images in a shard (default 2048)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    try:
        data = composed(options.overrides)
        for split in ("train", "val"):
            form = Form(options.size, options.quality)
            made = pack(opened(data, split), options.out / split, form, options.per_shard, options.workers)
            sys.stdout.write(
                f"{options.out / split}: {made['images']} images in {made['shards']} shards, "
                f"{made['bytes'] / 1e6:.1f} MB, {made['bad']} bad files left out\n"
            )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
