"""The records of a sweep in its folder: its members and its submissions."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from launcher.core.atomic_write import write_file

MEMBERS = "sweep.json"
ARRAYS = "arrays"
ARRAY = "array.json"


def write_members(sweep: Path, members: Sequence[Mapping[str, Any]]) -> None:
    """Record all members, submitted or not."""
    write_file(sweep / MEMBERS, json.dumps(list(members), indent=1, default=str) + "\n")


def read_members(sweep: Path) -> list[dict[str, Any]]:
    """`index`, `name` and `overrides` of each member; empty if the folder is no sweep."""
    try:
        found = json.loads((sweep / MEMBERS).read_text(encoding="utf-8"))
        return [{"index": int(each["index"]), "name": str(each["name"]), "overrides": dict(each["overrides"])}
                for each in found]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_array(folder: Path, **known: Any) -> None:
    """Record a submission in its folder: `cluster`, `indices`, and `job_id` or `pid` and `started`."""
    before = read_array_record(folder)
    values = {"submitted": round(time.time(), 3), "host": os.uname().nodename, **before, **known}
    write_file(folder / ARRAY, json.dumps(values) + "\n")


def read_array_record(folder: Path) -> dict[str, Any]:
    """The record in one folder; empty without one."""
    try:
        found = json.loads((folder / ARRAY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, Mapping) else {}


def read_arrays(sweep: Path) -> list[dict[str, Any]]:
    """All submissions of a sweep, oldest first."""
    folders = sorted((f for f in sweep.glob(f"{ARRAYS}/*") if f.name.isdecimal()), key=lambda f: int(f.name))
    return [record for folder in folders if (record := read_array_record(folder))]


def find_sweep(runs_dir: Path, name: str) -> Path | None:
    """The folder of a sweep; None if no sweep has that name."""
    path = runs_dir / name
    return path if is_name(name) and read_members(path) else None


def is_name(name: str) -> bool:
    """Whether it may name a run or a sweep: without a path separator it cannot lead out of the folder."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name, re.ASCII) is not None
