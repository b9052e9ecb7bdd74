"""Files that appear whole or not at all, JSON that may not be there yet, and digests. Imports no torch."""

import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mae.errors import UserError
from mae.runs.file_system import full_disk, remove


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path`, with its suffix, to be written: it replaces `path` at the end of the block.

    An error in the block removes it and leaves `path` as it was.
    """
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")  # other nodes have the same process ids
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        remove(temporary)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all. Raises UserError where the disk does not take it."""
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UserError(full_disk(error) or f"{path} cannot be written ({error.strerror}).") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    """Writes a JSON file as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or none yet."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line; without a line that a kill cut short. Empty where there is no file."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
