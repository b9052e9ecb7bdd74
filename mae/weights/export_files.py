"""Files of an export: written to a temporary folder, compared with existing ones, and moved all together."""

import filecmp
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mae.errors import UserError


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, whose files are moved into `folder` at the end, all or none.

    Raises UserError if `folder` holds one of the files already and it differs: nothing is overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"task.path={folder} is a file where a folder is needed: choose another path.")
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        yield stage
        files = sorted(stage.iterdir())
        existing = [f.name for f in files if (folder / f.name).exists()]
        differing = [name for name in existing if not filecmp.cmp(stage / name, folder / name, shallow=False)]
        if differing:
            raise UserError(
                f"task.path={folder} already holds another {', '.join(differing)}, which is not overwritten: "
                "choose another path or remove it."
            )
        for file in files:
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if created and not any(folder.iterdir()):
            folder.rmdir()


def target_of(path: str, default: str) -> tuple[Path, str, str]:
    """Folder, file name and model card's name of an export of one file.

    `path` is a file if it ends as `default` does, and the card is then named after it; otherwise a folder.
    """
    location = Path(path).expanduser()
    if location.suffix == Path(default).suffix:
        return location.parent, location.name, f"{location.stem}.md"
    return location, default, "README.md"


def sort_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file, whose order is random, so that the same export has the same bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(length))
