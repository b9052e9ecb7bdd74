"""Reads what the W&B client writes in offline mode: a LevelDB log of protobuf records."""

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

MESSAGES: Any = wandb_internal_pb2  # whose classes are made when it is imported
HEADER, BLOCK = 7, 32768  # bytes of the file's header, and of a block


def records(path: Path) -> list[Any]:
    """All records of a run-ID.wandb file; one that is cut short by a kill ends the list."""
    data, at, found, parts = path.read_bytes(), HEADER, [], b""
    assert data[:4] == b":W&B"
    while at + HEADER <= len(data):
        room = BLOCK - at % BLOCK
        if room < HEADER:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if kind == 0 or at + HEADER + length > len(data):
            break
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = MESSAGES.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def items(message: Any) -> dict[str, Any]:
    """Key -> value of a history, summary or config record; a picture or table is a dict of its own."""
    found: dict[str, Any] = {}
    for item in message:
        *parents, last = list(item.nested_key) or [item.key]
        place = found
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
    return found


class OfflineRun:
    """An offline run read back."""

    def __init__(self, path: Path):
        self.id, self.config, self.summary, self.history = "", {}, {}, []
        self.alerts, self.artifacts, self.metrics, self.group = [], [], {}, ""
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.id, self.group = record.run.run_id, record.run.run_group
                self.tags, self.job_type, self.notes = list(record.run.tags), record.run.job_type, record.run.notes
                self.config |= items(record.run.config.update)
            elif kind == "config":
                self.config |= items(record.config.update)
            elif kind == "history":
                self.history.append(items(record.history.item))
            elif kind == "summary":
                self.summary |= items(record.summary.update)
            elif kind == "metric":
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric
            elif kind == "alert":
                self.alerts.append(record.alert)
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
                self.artifacts.append(record.request.log_artifact.artifact)
