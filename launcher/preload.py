"""What the fork server does before it forks: import everything, and tell the agent how that went.

Whatever the user's module does on import, the server goes on: the rank imports it again and reports it as always.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

MODULES_VARIABLE = "LAUNCHER_PRELOAD"
REPORT_VARIABLE = "LAUNCHER_PRELOAD_REPORT"
# Between the libraries and the user's own modules in the list.
USER_MODULES = ":"


def preload(modules: list[str]) -> dict[str, Any]:
    """Import `modules` one by one and look what that did to this process.

    Returns:
        `seconds`, `failed` (pairs of name and last line), `cuda`, `threads` (names of what user modules started).
    """
    began = time.perf_counter()
    failed: list[tuple[str, str]] = []
    before = _threads()
    for name in modules:
        if name == USER_MODULES:
            before = _threads()
            continue
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- the rank that needs it meets it again, and reports it
            failed.append((name, traceback.format_exception_only(error)[-1].strip()))
    torch = sys.modules.get("torch")
    return {
        "seconds": time.perf_counter() - began,
        "failed": failed,
        "cuda": bool(torch is not None and torch.cuda.is_initialized()),
        "threads": sorted(name for number, name in _threads().items() if number not in before),
    }


def _threads() -> dict[int, str]:
    """Kernel threads of this process beside the main one: number to name."""
    named = {thread.native_id: thread.name for thread in threading.enumerate()}
    own = os.getpid()
    numbers = (int(entry) for entry in os.listdir("/proc/self/task"))  # noqa: PTH208 -- bare numbers are wanted
    return {number: named.get(number) or "a library's thread" for number in numbers if number != own}


@contextlib.contextmanager
def telling(address: str) -> Iterator[dict[str, Any]]:
    """Connects at once, so that the agent sees this process begin and, if it dies, end."""
    report: dict[str, Any] = {}
    with socket.socket(socket.AF_UNIX) as connection:
        # A server that is started again after a crash has nobody left to tell.
        with contextlib.suppress(OSError):
            connection.connect(address)
        yield report
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(report).encode())
