"""Commands that run the launcher's own modules, even if the user's folder has packages of the same names."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

_SAFE_PATH = "PYTHONSAFEPATH"


def module_command(module: str, *arguments: str) -> tuple[str, ...]:
    """`python -m MODULE ARGUMENTS`, which does not import from the working directory."""
    return (sys.executable, "-P", "-m", module, *arguments)


@contextlib.contextmanager
def without_working_directory() -> Iterator[None]:
    """For a process that Python itself starts in the block: it does not import from the working directory.

    The process calls `forget_safe_path`, so that this does not apply to the processes that it starts.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = before or "launcher"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]


def forget_safe_path() -> None:
    """In that process: allow imports from the working directory again."""
    if os.environ.get(_SAFE_PATH) == "launcher":
        del os.environ[_SAFE_PATH]
        sys.path.insert(0, "")
