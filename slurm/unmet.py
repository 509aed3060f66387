"""Whether an attempt ended because a node never came, as the launcher's events in the run's directory say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_EVENTS = "events.jsonl"
_KIND = "nodes_missing"
# Bytes at the end of the file that hold its last line.
_TAIL = 65_536


def missing_nodes(run: Path, since: float) -> tuple[int, ...]:
    """Numbers of the nodes that the last event of a run says never came; none if its last event is another one.

    Args:
        run: the run's directory.
        since: when the attempt began, seconds since 1970; what is older is an earlier one's.
    """
    try:
        with (run / _EVENTS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
        event: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        if event.get("kind") != _KIND or event["time"] < since:
            return ()
        return tuple(int(node) for node in event["nodes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()
