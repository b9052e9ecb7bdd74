"""Packs any source: `python -m mae.data.pack OUT data=folder data.root=DIR`, for data=shards.

Into tar shards, or with --format parquet into Parquet files, for data=hf and Hugging Face's `datasets`.
The images are shuffled once, for a loader reads them shard by shard. Their files are kept as they are or,
with --size, made smaller and encoded anew (the model's inputs then change). Each shard is written beside,
flushed and renamed, with a note of what it holds; started again, the program goes on with the shards that
are missing. The index comes last, and only then is the packing complete.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch.utils.data import DataLoader, Dataset

from mae import limits
from mae.config.build import build, call
from mae.data import SOURCES, flat
from mae.data.dataset import Failure
from mae.data.settings import LoaderSettings
from mae.data.shards.packing import Complete, done, finish, note_of, prepare
from mae.data.shards.splits import INDEX
from mae.data.shards.write import WRITERS, Form, write_file
from mae.data.source import Source, fingerprint, reason
from mae.data.subsets import reduced
from mae.errors import UserError
from mae.program import usage_name


class Jobs(Dataset):
    """The shards still to be written: item k writes the k-th, with its note, and gives its number of images.
    A data set, so that torch's workers hold the source once each and take the items in turn."""

    def __init__(self, source: Source, indices: list[np.ndarray], paths: list[Path], form: Form):
        self.source, self.indices, self.paths, self.form = source, indices, paths, form

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> int | Failure:
        try:
            return self.write(number)
        except (OSError, ValueError, MemoryError) as error:  # home whole, instead of as a traceback in a traceback
            message = getattr(error, "strerror", None) or reason(error)
            return Failure(f"{self.paths[number]} cannot be written: {message.rstrip('.')}.")

    def write(self, number: int) -> int:
        """Writes a shard and its note; its number of images."""
        path = self.paths[number]
        written = write_file(self.source, self.indices[number], path, self.form)
        head = {"sha256": written.sha256, "bytes": path.stat().st_size, "bad": written.bad, "count": written.num_images}
        flat.write(note_of(path), head, written.members._asdict() if written.members else {})
        return len(self.indices[number])


def pack(
    source: Source,
    out: Path,
    form: Form,
    per_shard: int,
    workers: int,
    seed: int = 0,
    kind: str = "tar",
    max_bad_fraction: float = 1.0,
) -> dict[str, int]:
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
    plan |= {"root": source.root, "names": fingerprint(source)}
    prepare(out, plan)
    order = np.random.default_rng(seed).permutation(len(source))
    shards = {
        out / f"shard-{k:06}.{kind}": order[k * per_shard :][:per_shard] for k in range(-(-len(order) // per_shard))
    }
    paths = list(shards)
    left = [path for path in paths if not done(path)]
    jobs = Jobs(source, [shards[path] for path in left], left, form)
    count = min(workers, len(jobs)) if workers > 1 else 0
    written = DataLoader(jobs, batch_size=None, num_workers=count, generator=torch.Generator())
    with Progress(disable=not sys.stderr.isatty()) as progress:
        completed = len(source) - sum(len(shards[path]) for path in left)
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


def data_group(overrides: list[str]) -> tuple[dict[str, Any], int]:
    """The `data` group of the configuration, as `run.py` would compose it, and its seed."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from mae.config.compose import composed

    try:
        cfg = composed(overrides)
        data = OmegaConf.to_container(cfg.data, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(error).split("\n")[0]) from error
    assert isinstance(data, dict)
    return {str(k): v for k, v in data.items()}, cfg.seed


def positive(text: str) -> int:
    """A number of the command line that must be 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog=usage_name("data.pack", "pack"), description=(__doc__ or "").split("\n")[0])
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
        data, seed = data_group(options.overrides)
        if data["name"] == "scientific":
            raise UserError("data=scientific cannot be packed: shards hold images of 1, 3 or 4 channels of 8 bits.")
        for split in ("train", "val"):
            source, out = build(SOURCES, data, split), options.out / split
            if split == "train":
                source = reduced(source, data["fraction"], data["per_class"], seed)
            form, limit = Form(options.size, options.quality), call(LoaderSettings, data).max_bad_fraction
            try:
                counts = pack(source, out, form, options.per_shard, options.workers, 0, options.format, limit)
            except Complete:
                if (options.out / "val" / INDEX).exists():
                    raise
                continue  # stopped after train: val is what is left
            sys.stdout.write(
                f"{out}: {counts['images']} images in {counts['shards']} shards, "
                f"{counts['bytes'] / 1e6:.1f} MB, {counts['bad']} bad files left out\n"
            )
    except (UserError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
