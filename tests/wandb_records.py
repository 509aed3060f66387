"""Reads the file of an offline W&B run: LevelDB's log format after a header of 7 bytes, one protobuf in each record."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER = 7
_BLOCK = 32 * 1024
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Any]:
    """The `wandb_internal_pb2.Record`s of a `.wandb` file, oldest first."""
    from wandb.proto import wandb_internal_pb2

    for payload in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        yield record


def _payloads(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    position, parts = _HEADER, b""
    while position + _HEADER <= len(data):
        # The end of a block that has no place for a record's own header is filled with zeros.
        if _BLOCK - position % _BLOCK < _HEADER:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        assert kind in (_FULL, _FIRST, _MIDDLE, _LAST), f"a record of kind {kind} at byte {position}"
        position += _HEADER
        parts += data[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""


def history_rows(path: Path) -> list[dict[str, Any]]:
    """What was logged, row by row."""
    return [
        _items(record.history.item) for record in read_records(path) if record.WhichOneof("record_type") == "history"
    ]


def summary(path: Path) -> dict[str, Any]:
    """What the run's summary was set to."""
    values: dict[str, Any] = {}
    for record in read_records(path):
        if record.WhichOneof("record_type") == "summary":
            values.update(_items(record.summary.update))
    return values


def alerts(path: Path) -> list[tuple[str, str]]:
    """Title and text of the alerts."""
    return [
        (record.alert.title, record.alert.text)
        for record in read_records(path)
        if record.WhichOneof("record_type") == "alert"
    ]


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
