"""The submissions of a run, one record in each submission's folder."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from launcher.core.atomic_write import write_file

FOLDER = "submissions"
RECORD = "submission.json"


def write_record(folder: Path, cluster: str, **known: Any) -> None:
    """Record a submission in its folder, for `status`, `logs` and `cancel`."""
    values = {"cluster": cluster, "submitted": round(time.time(), 3), "host": os.uname().nodename, **known}
    write_file(folder / RECORD, json.dumps(values) + "\n")


def read_records(run: Path) -> list[dict[str, Any]]:
    """The submissions of a run, oldest first; each with its `folder`."""
    found: list[tuple[int, dict[str, Any]]] = []
    for file in run.glob(f"{FOLDER}/*/{RECORD}"):
        try:
            found.append((int(file.parent.name), {**json.loads(file.read_text()), "folder": str(file.parent)}))
        except (OSError, ValueError, TypeError):
            continue  # not written completely yet, or not a record
    return [record for _, record in sorted(found, key=lambda pair: pair[0])]
