"""The event log, one JSON line per event: the only source of reports and tests."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

FILE_NAME = "events.jsonl"


class EventLog:
    """Appends events of one rank to the run's `events.jsonl`, which gets mode 0600.

    A line is one `write` to a file opened for appending, so the lines of several ranks do not mix. A full disk does not
    stop the training: `lost` counts the lost lines.
    """

    def __init__(self, path: Path, rank: int, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._rank = rank
        self._clock = clock
        self._cut = False
        self.lost = 0

    def write(self, kind: str, **fields: Any) -> None:
        """Append `{"time", "rank", "kind", **fields}`; non-finite numbers become text ('nan', 'inf')."""
        record = {"time": round(self._clock(), 6), "rank": self._rank, "kind": kind, **_finite(fields)}
        line = ("\n" if self._cut else "") + json.dumps(record, separators=(",", ":"), default=str) + "\n"
        data = line.encode()
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            try:
                # A full disk may accept only a part: the next event must start on a new line.
                self._cut = os.write(descriptor, data) < len(data)
            finally:
                os.close(descriptor)
            self.lost += self._cut
        except OSError:
            self.lost += 1


def read_events(path: Path, on_foreign: Callable[[], None] | None = None) -> Iterator[dict[str, Any]]:
    """The events of a run, oldest first; `on_foreign` is called for each incomplete or foreign line instead."""
    # As `json.loads`, without its search for white space: a long run has 200,000 lines.
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in map(str.strip, lines):
            try:
                record, end = decode(line)
            except (ValueError, RecursionError):  # also a number of 5,000 digits, or deeply nested brackets
                record, end = None, 0
            if isinstance(record, dict) and "kind" in record and end == len(line):
                yield record
            elif on_foreign is not None and line:
                on_foreign()


def _finite(value: Any) -> Any:
    """JSON has no NaN: write it as text, which every reader accepts."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in cast("list[Any]", value)]
    return value
