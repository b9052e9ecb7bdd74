"""Files that a run writes where a user's own may lie: its restarts replace them, and no others. Imports no torch.

A file is noted in the run before it appears, by its size and time of writing, which renaming leaves as they are.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mae.runs.files import read_json_lines, replacing
from mae.runs.layout import OUTPUTS


@contextmanager
def noted(run: Path, target: Path, rank: int = 0) -> Iterator[Path]:
    """As `replacing`, for a file that the run is to know again as its own. Ranks have lists of their own."""
    with replacing(target) as temporary:
        yield temporary
        os.utime(temporary)  # now, so that no delayed write sets another time
        row = json.dumps(_identity(target, temporary.stat()))
        name = OUTPUTS if rank == 0 else OUTPUTS.replace(".", f"_{rank}.")
        with (run / name).open("a") as file:
            file.write(f"\n{row}")  # the line break comes first: it ends a line that a kill cut short


def others_files(run: Path, paths: Iterable[Path]) -> list[Path]:
    """Those of the files that are there and that the run has not written."""
    stem, _, suffix = OUTPUTS.partition(".")
    rows = [row for path in run.glob(f"{stem}*.{suffix}") for row in read_json_lines(path)]
    own = {tuple(row.values()) for row in rows}
    return [path for path in paths if path.exists() and tuple(_identity(path, path.stat()).values()) not in own]


def _identity(path: Path, stat: os.stat_result) -> dict[str, object]:
    return {"path": os.path.abspath(path), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
