"""The folder that a packing fills: its plan and notes while it is under way, its index when it is complete."""

import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from mae.data import flat
from mae.data.shards.index import Index
from mae.data.shards.splits import INDEX
from mae.data.shards.tar import Members, joined
from mae.data.source import Source
from mae.errors import UserError
from mae.runs.files import digest

NOTES = "packing"  # folder of the shards' notes until the index is written
PLAN = "plan.json"
BAD = "bad_files.csv"
LATER = ("root", "names")  # in a plan: what earlier versions did not record
PARQUET = "mae-parquet-1"  # what the index of Parquet files says it is


class Complete(UserError):
    """A folder that this very packing has filled."""


def note_of(path: Path) -> Path:
    """The note on a shard that was written: its checksum, its bad images, where its images lie."""
    return path.parent / NOTES / f"{path.name}.note"


def done(path: Path) -> bool:
    """Whether a shard and its note are there and agree."""
    try:
        head, _ = flat.read_head(note_of(path))
        return path.stat().st_size == head["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def prepare(out: Path, plan: Mapping[str, object]) -> None:
    """An empty folder, or one that the same packing has begun to fill. Raises Complete where it is full, UserError."""
    if (out / INDEX).exists():
        kind = Complete if filled(out, plan) else UserError
        raise kind(f"{out} is packed already: choose another folder, or remove this one first.")
    begun = out / NOTES / PLAN
    if begun.exists():
        earlier = json.loads(begun.read_text())
        if differing := [key for key, value in plan.items() if earlier.get(key, value) != value]:
            raise UserError(
                f"{out} was begun with another source or other options ({', '.join(differing)}): choose another folder."
            )
        return
    if out.exists() and any(path.name != f".{NOTES}" for path in out.iterdir()):
        raise UserError(f"{out} is not empty, and nothing is overwritten: choose another folder.")
    aside = out / f".{NOTES}"  # so that the folder is there with its plan, or not
    aside.mkdir(parents=True, exist_ok=True)
    (aside / PLAN).write_text(json.dumps(plan))
    aside.rename(begun.parent)


def filled(out: Path, plan: Mapping[str, object]) -> bool:
    """Whether it is this packing that filled a folder."""
    try:
        head, _ = flat.read_head(out / INDEX)
        plans = plan, {key: value for key, value in plan.items() if key not in LATER}
        return head["plan"] in [hashlib.sha256(json.dumps(each).encode()).hexdigest() for each in plans]
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or of a version that wrote no plan
        return False


def finish(source: Source, out: Path, paths: list[Path], max_bad_fraction: float) -> dict[str, int]:
    """Verifies the shards by their checksums, writes the index and the list of bad files.

    Where more files than allowed were bad, their shards are removed, so that a start makes them anew: a place that
    could not be reached for a time has lost nothing. Raises UserError.
    """
    columns, heads, bad = [], [], []
    for path in paths:
        head, arrays = flat.read(note_of(path))
        if digest(path) != head["sha256"]:
            path.unlink()
            raise UserError(f"{path} is not what was written, and was removed: start again to write it anew.")
        columns.append(arrays)
        heads.append(head)
        bad += head["bad"]
    if len(bad) > max_bad_fraction * len(source):
        for path, head in zip(paths, heads, strict=True):
            if head["bad"]:
                path.unlink()
                note_of(path).unlink()
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
    more = {"sha256": sums, "plan": digest(out / NOTES / PLAN)}
    if paths[0].suffix == ".tar":
        members = joined([Members(**arrays) for arrays in columns])
        Index(names, sizes, counts, members, source.classes).save(out / INDEX, **more)
    else:
        files = {"format": PARQUET, "names": names, "sizes": sizes, "counts": counts}
        flat.write(out / INDEX, files | more | {"classes": source.classes}, {})
    for note in (out / NOTES).iterdir():
        note.unlink()
    (out / NOTES).rmdir()
    return {"images": sum(counts), "bad": len(bad), "shards": len(paths), "bytes": sum(sizes)}
