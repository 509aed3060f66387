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
    """A Python process started in the block does not import from the working directory.

    It calls `forget_safe_path`, so this does not apply to its own child processes.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = before or "launcher"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]


def forget_safe_path() -> None:
    """Allow imports from the working directory again, in a process started in `without_working_directory`."""
    if os.environ.get(_SAFE_PATH) == "launcher":
        del os.environ[_SAFE_PATH]
        sys.path.insert(0, "")
