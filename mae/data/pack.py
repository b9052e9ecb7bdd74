"""Packs any source: `python -m mae.data.pack OUT data=folder data.root=DIR`, for data=shards.

Into tar shards, or with --format parquet into Parquet files, for data=hf and Hugging Face's `datasets`.
The images are shuffled once, for a loader reads them shard by shard. Their files are kept as they are or,
with --size, made smaller and encoded anew (the model's inputs then change). Each shard is written beside,
flushed and renamed, with a note of what it holds; started again, the program goes on with the shards that
are missing. The index comes last, and only then is the packing complete.
"""

import argparse
import csv
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch.utils.data import DataLoader, Dataset

from mae import limits
from mae.config.build import build
from mae.data import SOURCES, flat
from mae.data.dataset import Failure
from mae.data.shards.source import INDEX, Index
from mae.data.shards.tar import Members, joined
from mae.data.shards.write import WRITERS, Form, write
from mae.data.source import Source, reason
from mae.errors import UserError

NOTES = "packing"  # folder of the shards' notes until the index is written
PLAN = "plan.json"
BAD = "bad_files.csv"
PARQUET = "mae-parquet-1"  # what the index of Parquet files says it is


class Complete(UserError):
    """A folder that this very packing has filled."""


class Jobs(Dataset):
    """The shards still to be written: item k writes the k-th, with its note, and gives its number of images.
    A data set, so that torch's workers hold the source once each and take the items in turn."""

    def __init__(self, source: Source, parts: list[np.ndarray], paths: list[Path], form: Form):
        self.source, self.parts, self.paths, self.form = source, parts, paths, form

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> int | Failure:
        try:
            return self.write(number)
        except (OSError, ValueError, MemoryError) as error:  # home whole, instead of as a traceback in a traceback
            said = getattr(error, "strerror", None) or reason(error)
            return Failure(f"{self.paths[number]} cannot be written: {said}.")

    def write(self, number: int) -> int:
        """Writes a shard and its note; its number of images."""
        path = self.paths[number]
        part = write(self.source, self.parts[number], path, self.form)
        note = path.parent / NOTES / f"{path.name}.note"
        head = {"sha256": part.sha256, "bytes": path.stat().st_size, "bad": part.bad, "count": part.count}
        flat.write(note, head, part.members._asdict() if part.members else {})
        return len(self.parts[number])


def done(path: Path) -> bool:
    """Whether a shard and its note are there and agree."""
    try:
        head, _ = flat.read_head(path.parent / NOTES / f"{path.name}.note")
        return path.stat().st_size == head["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def pack(
    source: Source,
    out: Path,
    form: Form,
    per_shard: int,
    workers: int,
    seed: int = 0,
    kind: str = "tar",
    max_bad_fraction: float = 1.0,
) -> dict[str, Any]:
    """Packs a source into `out`. Returns counts.

    Raises UserError where `out` holds something else or cannot be written to, or too many images cannot be used.
    """
    if kind == "parquet":
        try:
            import pyarrow  # noqa: F401  # an extra
        except ImportError as error:
            raise UserError("--format parquet needs pyarrow: pip install pyarrow.") from error
    plan = {"images": len(source), "first": source.name(0), "per_shard": per_shard, "seed": seed}
    plan |= form._asdict() | {"classes": source.classes, "format": kind}
    prepare(out, plan)
    order = np.random.default_rng(seed).permutation(len(source))
    parts = [order[i : i + per_shard] for i in range(0, len(order), per_shard)]
    paths = [out / f"shard-{k:06}.{kind}" for k in range(len(parts))]
    left = [(part, path) for part, path in zip(parts, paths, strict=True) if not done(path)]
    jobs = Jobs(source, [part for part, _ in left], [path for _, path in left], form)
    count = min(workers, len(jobs)) if workers > 1 else 0
    written = DataLoader(jobs, batch_size=None, num_workers=count, generator=torch.Generator())
    with Progress(disable=not sys.stderr.isatty()) as progress:
        completed = len(source) - sum(len(part) for part, _ in left)
        bar = progress.add_task("packing", total=len(source), completed=completed)
        try:
            for images in written:
                if isinstance(images, Failure):
                    raise UserError(images.message)
                progress.advance(bar, images)
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise UserError(
                "a packing process was killed, most likely for lack of memory: try fewer --workers."
            ) from error
    return finish(source, out, paths, max_bad_fraction)


def prepare(out: Path, plan: dict[str, Any]) -> None:
    """An empty folder, or one that the same packing has begun to fill. Raises Complete where it is full, UserError."""
    if (out / INDEX).exists():
        kind = Complete if filled(out, plan) else UserError
        raise kind(f"{out} is packed already: choose another folder, or remove this one first.")
    begun = out / NOTES / PLAN
    if begun.exists():
        if json.loads(begun.read_text()) != plan:
            raise UserError(f"{out} was begun with another source or other options: choose another folder.")
        return
    if out.exists() and any(path.name != f".{NOTES}" for path in out.iterdir()):
        raise UserError(f"{out} is not empty, and nothing is overwritten: choose another folder.")
    aside = out / f".{NOTES}"  # so that the folder is there with its plan, or not
    aside.mkdir(parents=True, exist_ok=True)
    (aside / PLAN).write_text(json.dumps(plan))
    aside.rename(begun.parent)


def filled(out: Path, plan: dict[str, Any]) -> bool:
    """Whether it is this packing that filled a folder."""
    try:
        head, _ = flat.read_head(out / INDEX)
        return head["plan"] == hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or of a version that told no plan
        return False


def finish(source: Source, out: Path, paths: list[Path], max_bad_fraction: float) -> dict[str, Any]:
    """Verifies the shards by their checksums, writes the index and the list of bad files.

    Where more files than allowed were bad, their shards are removed, so that a start makes them anew: a place that
    could not be reached for a time has lost nothing. Raises UserError.
    """
    parts, heads, bad = [], [], []
    for path in paths:
        head, arrays = flat.read(path.parent / NOTES / f"{path.name}.note")
        if checksum(path) != head["sha256"]:
            path.unlink()
            raise UserError(f"{path} is not what was written, and was removed: start again to write it anew.")
        parts.append(arrays)
        heads.append(head)
        bad += head["bad"]
    if len(bad) > max_bad_fraction * len(source):
        for path, head in zip(paths, heads, strict=True):
            if head["bad"]:
                path.unlink()
                (path.parent / NOTES / f"{path.name}.note").unlink()
        names = ", ".join(f"{name} ({reason})" for _, name, reason in bad[:3])
        raise UserError(
            f"{len(bad)} of {len(source)} images cannot be used, more than data.max_bad_fraction={max_bad_fraction:g} "
            f"allows; the first: {names}. Start again to try them anew."
        )
    if bad:
        with open(out / BAD, "w", newline="") as file:
            csv.writer(file).writerows([("index", "name", "reason"), *bad])
    names, counts = [path.name for path in paths], [head["count"] for head in heads]
    sizes, sums = ([head[key] for head in heads] for key in ("bytes", "sha256"))
    assert sum(counts) + len(bad) == len(source)
    more = {"sha256": sums, "plan": checksum(out / NOTES / PLAN)}
    if paths[0].suffix == ".tar":
        members = joined([Members(**arrays) for arrays in parts])
        Index(names, sizes, counts, members, source.classes).save(out / INDEX, **more)
    else:
        told = {"format": PARQUET, "names": names, "sizes": sizes, "counts": counts}
        flat.write(out / INDEX, told | more | {"classes": source.classes}, {})
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


def data_group(overrides: list[str]) -> dict[str, Any]:
    """The `data` group of the configuration, as `run.py` would compose it."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from mae.config.compose import composed

    try:
        data = OmegaConf.to_container(composed(overrides).data, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(error).split("\n")[0]) from error
    assert isinstance(data, dict)
    return {str(k): v for k, v in data.items()}


def positive(text: str) -> int:
    """A number of the command line that must be 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mae.data.pack", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="a new folder; train/ and val/ are made in it")
    parser.add_argument("overrides", nargs="+", help="data=..., data.root=..., as for run.py")
    parser.add_argument("--format", choices=sorted(WRITERS), default="tar", help="of the shards (default tar)")
    parser.add_argument("--size", type=positive, help="pixels of the shorter side; without it files stay as they are")
    parser.add_argument(
        "--quality",
        type=int,
        choices=range(1, 101),
        metavar="1-100",
        default=90,
        help="of JPEG, with --size (default 90)",
    )
    parser.add_argument("--per-shard", type=positive, default=2048, help="images in a shard (default 2048)")
    parser.add_argument("--workers", type=positive, default=limits.cpus(), help="processes")
    options = parser.parse_intermixed_args(arguments)  # overrides may follow options
    try:
        data = data_group(options.overrides)
        if data["name"] == "scientific":
            raise UserError("data=scientific cannot be packed: shards hold images of 1, 3 or 4 channels of 8 bits.")
        for split in ("train", "val"):
            form = Form(options.size, options.quality)
            given = (form, options.per_shard, options.workers)
            limit = data.get("max_bad_fraction", 1.0)
            source, out = build(SOURCES, data, split), options.out / split
            try:
                made = pack(source, out, *given, kind=options.format, max_bad_fraction=limit)
            except Complete:
                if (options.out / "val" / INDEX).exists():
                    raise
                continue  # stopped after train: val is what is left
            sys.stdout.write(
                f"{out}: {made['images']} images in {made['shards']} shards, "
                f"{made['bytes'] / 1e6:.1f} MB, {made['bad']} bad files left out\n"
            )
    except (UserError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
