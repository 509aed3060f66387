"""The record of a run of a plain script: what `launcher run` started, in the run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE_NAME = "script.json"


def is_script_run(run: Path) -> bool:
    """Whether `launcher run` has started this run."""
    return (run / FILE_NAME).exists()


def read_script_record(run: Path) -> dict[str, Any]:
    """What was started: kind, target, arguments, cwd, ranks on each node; empty if it cannot be read."""
    try:
        values = json.loads((run / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
