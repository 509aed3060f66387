"""Rows of a CSV logger of a run."""

from __future__ import annotations

import csv
from pathlib import Path

# Columns that the launcher adds.
_MONITORS = ("goodput/", "amp/", "perf/", "alert/", "final/")


def users_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a `metrics.csv` without the launcher's columns, as plain Lightning writes them."""
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    own = [{name: value for name, value in row.items() if not name.startswith(_MONITORS)} for row in rows]
    # A row of the monitor's has only its position besides.
    return [row for row in own if any(value for name, value in row.items() if name not in ("step", "epoch"))]
