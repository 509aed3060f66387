"""The output of a submitted job outside its ranks' logs: why it ended before a rank started."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.core.events import FILE_NAME, read_events
from launcher.process.rank_log import read_tail
from launcher.runs.submission_record import read_records

_TAIL_BYTES = 64 * 1024
_ERROR = "error: "


@dataclass(frozen=True, slots=True)
class JobOutput:
    """The output of a job without an event; `reason` is the error in it on one line, else its last line."""

    file: Path
    reason: str


def find_job_output(run: Path) -> JobOutput | None:
    """The output of a run's newest submission; None if a rank of it has started, or if there is no output."""
    records = read_records(run)
    if not records or records[-1].get("submitted", 0) <= _last_event(run):
        return None
    return read_job_output(records[-1])


def read_job_output(record: Mapping[str, Any]) -> JobOutput | None:
    """The output of the job of one submission (see `read_records`); None if there is none."""
    outputs = {file: read_tail(file, _TAIL_BYTES) for file in _files(record)}
    for file, text in outputs.items():
        error = find_error(text)
        if error is not None:
            return JobOutput(file, error)
    for file, text in outputs.items():
        last = next((line.strip() for line in reversed(text.split("\n")) if line.strip()), None)
        if last is not None:
            return JobOutput(file, f"its last line: {last}")
    return None


def find_error(text: str) -> str | None:
    """The last error message of a launcher command, on one line; None if there is none. Pure."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(_ERROR)]
    if not starts:
        return None
    first, *after = lines[starts[-1] :]
    # The problems of a config are on indented lines below it.
    details = itertools.takewhile(lambda line: line.startswith("  "), after)
    return " ".join([first.removeprefix(_ERROR), *map(str.strip, details)])


def _files(record: Mapping[str, Any]) -> list[Path]:
    """Files that are not empty, in the order of the record's patterns."""
    found: list[Path] = []
    for pattern in record["output"]:
        folder = Path(record["folder"])
        while pattern.startswith("../"):
            folder, pattern = folder.parent, pattern.removeprefix("../")
        found += sorted(folder.glob(pattern))
    return [file for file in found if file.is_file() and file.stat().st_size > 0]


def _last_event(run: Path) -> float:
    try:
        times = [event.get("time") for event in read_events(run / FILE_NAME)]
    except OSError:
        return 0.0
    return max((time for time in times if isinstance(time, int | float)), default=0.0)
