"""The submissions of a run, one record in each submission's folder."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from launcher.core.atomic_write import write_file
from launcher.process.background import OUTPUT
from launcher.runs.sweep_record import ARRAYS

FOLDER = "submissions"
RECORD = "submission.json"


def write_record(folder: Path, cluster: str, **known: Any) -> None:
    """Record a submission in its folder, for `status`, `logs` and `cancel`.

    Args:
        folder: of the submission.
        cluster: name of the job's back end.
        known: what the back end needs to find the job again, and `output`: patterns of its output files, relative to
            the folder.
    """
    values = {"cluster": cluster, "submitted": round(time.time(), 3), "host": os.uname().nodename, **known}
    write_file(folder / RECORD, json.dumps(values) + "\n")


def read_records(run: Path) -> list[dict[str, Any]]:
    """The submissions of a run, oldest first; each with its `folder` and `output`."""
    found: list[tuple[int, dict[str, Any]]] = []
    for file in run.glob(f"{FOLDER}/*/{RECORD}"):
        try:
            record = json.loads(file.read_text())
            # Records of earlier versions have no `output`.
            output = [OUTPUT, *list_slurm_output(str(record.get("job_id")), record.get("sweep"))]
            found.append((int(file.parent.name), {"output": output, **record, "folder": str(file.parent)}))
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # not written completely yet, or not a record
    return [record for _, record in sorted(found, key=lambda pair: pair[0])]


def list_slurm_output(job_id: str, sweep: str | None = None) -> list[str]:
    """Patterns of submitit's output files, standard error first; those of array members are in the sweep's folder."""
    folders = ("",) if sweep is None else ("", f"../../../{sweep}/{ARRAYS}/*/")
    return [f"{folder}{job_id}_*_log.{kind}" for kind in ("err", "out") for folder in folders]
