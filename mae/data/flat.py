"""A file of flat arrays: one line of JSON, then each array at a multiple of 64 bytes. No pickle."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mae.runs.files import replacing

ALIGNMENT = 64


def write(path: Path, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Written beside, flushed, and renamed into place."""
    shapes = {name: [a.dtype.str, len(a)] for name, a in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(json.dumps(head | {"arrays": shapes}).encode() + b"\n")
        for values in arrays.values():
            file.write(bytes(-file.tell() % ALIGNMENT))
            values.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def read_head(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON and where it ends. Raises OSError, ValueError."""
    with open(path, "rb") as file:
        head = json.loads(file.readline())
        return head, file.tell()


def parse(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `read` gives, of a file's bytes, which the arrays share. Raises ValueError, KeyError where damaged."""
    at = data.index(b"\n") + 1
    head, arrays = json.loads(data[:at]), {}
    for name, (kind, count) in head["arrays"].items():
        at += -at % ALIGNMENT
        arrays[name] = np.frombuffer(data, kind, count, at) if count else np.empty(0, kind)
        at += arrays[name].nbytes
    return head, arrays


def gathered(text: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> bytes:
    """The pieces of a text (bytes,) from `starts` (n,) to `ends` (n,), one after another, and their lengths."""
    lengths = ends - starts
    positions = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    return text[positions].tobytes() + lengths.tobytes()


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Raises OSError or ValueError where the file is absent, damaged or cut short."""
    head, at = read_head(path)
    arrays = {}
    for name, (kind, count) in head["arrays"].items():
        at += -at % ALIGNMENT
        arrays[name] = np.fromfile(path, kind, count, offset=at)
        if len(arrays[name]) != count:
            raise ValueError(f"{path} is cut short")
        at += arrays[name].nbytes
    return head, arrays
