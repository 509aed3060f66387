"""What W&B wrote into a run's file: LevelDB's log format after a header of 7 bytes, each record a protobuf message."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = 32 * 1024
_HEADER = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class WandbFile:
    """A run's content; nested keys are dotted."""

    run_id: str
    config: dict[str, Any]
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    exit_code: int | None


def read_wandb_file(path: Path) -> WandbFile:
    """Read a `.wandb` file."""
    from wandb.proto import wandb_internal_pb2

    run_id, exit_code = "", None
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            config.update(_items(record.run.config.update))
        elif kind == "config":
            config.update(_items(record.config.update))
        elif kind == "summary":
            summary.update(_items(record.summary.update))
        elif kind == "history":
            history.append(_items(record.history.item))
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return WandbFile(run_id, config, summary, history, exit_code)


def _items(items: Iterable[Any]) -> dict[str, Any]:
    return {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def _records(data: bytes) -> Iterator[bytes]:
    """The log's records: https://github.com/google/leveldb/blob/main/doc/log_format.md."""
    assert data[:4] == b":W&B", data[:_HEADER]
    # The blocks are counted from the file's begin, the header included.
    at, parts = _HEADER, b""
    while at < len(data):
        left = _BLOCK - at % _BLOCK
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        payload = data[at + 7 : at + 7 + length]
        at += 7 + length
        parts = payload if kind in (_FULL, _FIRST) else parts + payload
        if kind in (_FULL, _LAST):
            yield parts
