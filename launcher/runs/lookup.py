"""Lists the runs of a folder, and finds one by its name."""

from __future__ import annotations

import difflib
from pathlib import Path

from launcher.core.errors import NoSuchRunError
from launcher.runs.sweep_record import is_name

_MOST_NAMES = 3


def find_runs(runs_dir: Path) -> list[Path]:
    """The directories of all runs, oldest first."""
    try:
        found = [path for path in runs_dir.iterdir() if _is_run(path)]
    except OSError:
        return []
    return sorted(found, key=lambda path: path.stat().st_mtime)


def find_run_named(runs_dir: Path, name: str) -> Path:
    """The directory of one run.

    Raises:
        NoSuchRunError: no run has this name; lists the newest ones.
    """
    if is_name(name) and _is_run(runs_dir / name):
        return runs_dir / name
    known = [path.name for path in find_runs(runs_dir)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    newest, more = known[-_MOST_NAMES:], len(known) - _MOST_NAMES
    listed = f"the newest are {', '.join(newest)}" if len(newest) > 1 else f"the newest is {''.join(newest)}"
    if more > 0:
        listed += f"; `launcher status` lists {more} more"
    listed = listed if known else "the folder has no runs; give another --runs-dir"
    raise NoSuchRunError(f"there is no run {name!r} in {runs_dir}; {hint}{listed}")


def _is_run(path: Path) -> bool:
    # A plain script (`launcher run`) has no config.
    return any((path / name).exists() for name in ("config.yaml", "events.jsonl", "submissions"))
