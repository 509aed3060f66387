"""Read a run's `.wandb` file, as W&B's service wrote it: LevelDB's log format behind a header of 7 bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _LAST = 1, 2, 4


def records(file: Path) -> Iterator[Any]:
    """Every record of one file, as `wandb_internal_pb2.Record`."""
    data = file.read_bytes()
    at, joined = 7, b""
    while at + _HEADER.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER.size:
            # Too short for a header: the block ends in zeros.
            at += left
            continue
        _, length, kind = _HEADER.unpack_from(data, at)
        part = data[at + _HEADER.size : at + _HEADER.size + length]
        at += _HEADER.size + length
        joined = part if kind in (_FULL, _FIRST) else joined + part
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(joined)
            yield record


def files(folder: Path) -> list[Path]:
    """The `.wandb` files below a folder, oldest first."""
    return sorted(folder.rglob("*.wandb"), key=lambda p: p.stat().st_mtime)


def history_rows(folder: Path) -> list[dict[str, Any]]:
    """The logged rows of all runs below a folder, in their order."""
    return [_items(r.history.item) for file in files(folder) for r in records(file) if r.HasField("history")]


def summary_of(folder: Path) -> dict[str, Any]:
    """The last value of every summary key of all runs below a folder."""
    values: dict[str, Any] = {}
    for file in files(folder):
        for record in records(file):
            if record.HasField("summary"):
                values.update(_items(record.summary.update))
    return values


def alerts(folder: Path) -> list[tuple[str, str]]:
    """Title and text of the alerts of all runs below a folder."""
    return [(r.alert.title, r.alert.text) for file in files(folder) for r in records(file) if r.HasField("alert")]


def config_of(folder: Path) -> dict[str, Any]:
    """The merged config of all runs below a folder."""
    values: dict[str, Any] = {}
    for file in files(folder):
        for record in records(file):
            if record.HasField("run"):
                values.update(_items(record.run.config.update))
            if record.HasField("config"):
                values.update(_items(record.config.update))
    return values


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
