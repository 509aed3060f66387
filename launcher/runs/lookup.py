"""Lists the runs of a folder, and finds one by its name, or by a path in it."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from launcher.core.errors import NoSuchRunError
from launcher.runs.sweep_record import is_name, read_members

_MOST_NAMES = 3


def find_runs(runs_dir: Path) -> list[Path]:
    """The directories of all runs, oldest first."""
    try:
        found = [path for path in runs_dir.iterdir() if _is_run(path)]
    except OSError:
        return []
    return sorted(found, key=lambda path: path.stat().st_mtime)


def locate_run(runs_dir: Path, given: str) -> tuple[Path, str]:
    """The folder and the name of a run or a sweep that is given by its name, or by its path or one in it.

    What is no such path is returned unchanged, for the error of `find_run_named`.
    """
    if is_name(given) and _is_run_or_sweep(runs_dir / given):
        return runs_dir, given
    for path in (Path(given), runs_dir / given) if given.strip() and "\0" not in given else ():
        # Not resolved: a link to a run has a name of its own.
        absolute = Path(os.path.abspath(path))  # noqa: PTH100 -- without resolving links
        found = next((each for each in (absolute, *absolute.parents) if _is_run_or_sweep(each, by_name=False)), None)
        if found is not None and _has_file(absolute, "."):
            return found.parent, found.name
    return runs_dir, given


def find_run_named(runs_dir: Path, name: str) -> Path:
    """The directory of one run.

    Raises:
        NoSuchRunError: no run has this name; lists the newest ones.
    """
    if is_name(name) and _is_run(runs_dir / name):
        return runs_dir / name
    known = [path.name for path in find_runs(runs_dir)]
    near = difflib.get_close_matches(Path(name).name or name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    newest, more = known[-_MOST_NAMES:], len(known) - _MOST_NAMES
    listed = f"the newest are {', '.join(newest)}" if len(newest) > 1 else f"the newest is {''.join(newest)}"
    if more > 0:
        listed += f"; `launcher status` lists {more} more"
    listed = listed if known else "the folder has no runs; give another --runs-dir"
    raise NoSuchRunError(f"there is no run {name!r} in {runs_dir}; {hint}{listed}")


def _is_run_or_sweep(path: Path, *, by_name: bool = True) -> bool:
    """Whether a folder is one; any folder of a path may have a config.yaml, which is not enough without a name."""
    is_run = _is_run(path) if by_name else _has_file(path, "events.jsonl", "submissions")
    return is_run or bool(read_members(path))


def _is_run(path: Path) -> bool:
    # A plain script (`launcher run`) has no config.
    return _has_file(path, "config.yaml", "events.jsonl", "submissions")


def _has_file(path: Path, *names: str) -> bool:
    try:
        return any((path / name).exists() for name in names)
    except OSError:
        return False  # not readable, or too long for a name
