"""What other installed packages add by entry points: strategies, and the launcher's job back ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def load_entry_points(group: str, kind: type[T]) -> tuple[list[T], dict[str, str]]:
    """Load all entry points of a group, which name objects of `kind`, or subclasses of it.

    Returns:
        The objects, made from classes where an entry point names a class; and for each name that cannot be loaded, why.
    """
    loaded: list[T] = []
    broken: dict[str, str] = {}
    if not _is_declared(group):
        return loaded, broken
    from importlib.metadata import entry_points

    for point in entry_points(group=group):
        try:
            found = point.load()
            made = found() if isinstance(found, type) else found
            if not isinstance(made, kind):
                raise TypeError(f"{point.value} is of type {type(made).__name__}; expected {kind.__name__}")
            loaded.append(made)
        except Exception as error:  # noqa: BLE001 -- another package's code; the others can be used without it
            package = point.dist.name if point.dist else point.value
            broken[point.name] = f"{package} cannot be loaded: {type(error).__name__}: {error}"
    return loaded, broken


def _is_declared(group: str) -> bool:
    """Whether a package declares the group. Quick: importing `importlib.metadata` takes half the time of a `--help`."""
    files = (file for folder in sys.path for file in Path(folder or ".").glob("*-info/entry_points.txt"))
    return any(group in _read(file) for file in files)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # another user's, or just uninstalled: no package of this process
