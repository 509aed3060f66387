"""Commands that run the launcher's own modules, whatever lies in the user's folder."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

_SAFE_PATH = "PYTHONSAFEPATH"


def module_command(module: str, *words: str) -> tuple[str, ...]:
    """`python -m MODULE WORDS`, which finds no package of the same name in the working directory."""
    return (sys.executable, "-P", "-m", module, *words)


@contextlib.contextmanager
def without_working_directory() -> Iterator[None]:
    """For a process that Python starts by itself: it finds no package of the launcher's name in the working directory.

    The process calls `forget_safe_path`, so that those that it starts are as they always are.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = before or "launcher"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]


def forget_safe_path() -> None:
    """In that process: the working directory is importable again, after what is imported already."""
    if os.environ.get(_SAFE_PATH) == "launcher":
        del os.environ[_SAFE_PATH]
        sys.path.insert(0, "")
