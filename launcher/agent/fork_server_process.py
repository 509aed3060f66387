"""What the fork server does before it forks: import what is installed, and tell the agent how that went.

The user's own files are left to the ranks. Whatever a package does on import, the server goes on: a rank that needs it
imports it again and reports it as always.
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
from collections.abc import Callable, Iterator
from typing import Any

MODULES_VARIABLE = "LAUNCHER_PRELOAD"
REPORT_VARIABLE = "LAUNCHER_PRELOAD_REPORT"
# Between the libraries and the packages that the user's files name in the list.
USER_MODULES = ":"
# What torchelastic gives a rank, and the fork server has not.
RANK_VARIABLES = frozenset({
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID",
})  # fmt: skip


def preload(modules: list[str]) -> dict[str, Any]:
    """Import `modules` one by one and look what that did to this process.

    Args:
        modules: 'module' or 'module:name', the libraries, a mark, the packages that the user's files name.

    Returns:
        `seconds`, `failed` (pairs of name and last line), `cuda` (whether a library initialised it), `unsafe` (pairs of
        a package that the user's files name and what it did that a fork does not survive).
    """
    began = time.perf_counter()
    failed: list[tuple[str, str]] = []
    unsafe: dict[str, str] = {}
    users = modules.index(USER_MODULES) if USER_MODULES in modules else len(modules)
    for name in modules[:users]:
        _import(name, failed)
    cuda = _cuda_is_initialised()
    for name in modules[users + 1 :]:
        threads, had_cuda = _threads(), _cuda_is_initialised()
        with _watch(RANK_VARIABLES) as read:
            _import(name, failed)
        started = sorted(_threads()[number] for number in _threads() if number not in threads)
        package = name.partition(":")[0].partition(".")[0]
        if _cuda_is_initialised() and not had_cuda:
            unsafe[package] = "initialises CUDA"
        elif started:
            unsafe[package] = f"starts threads ({', '.join(started)})"
        elif read:
            unsafe[package] = f"reads {', '.join(sorted(read))}"
    return {
        "seconds": time.perf_counter() - began,
        "failed": failed,
        "cuda": cuda,
        "unsafe": sorted(unsafe.items()),
    }


def _import(name: str, failed: list[tuple[str, str]]) -> None:
    """What `import module` or `from module import name` does."""
    module, _, attribute = name.partition(":")
    try:
        imported = importlib.import_module(module)
        if attribute and not hasattr(imported, attribute):
            importlib.import_module(f"{module}.{attribute}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- the rank that needs it meets it again, and reports it
        failed.append((name, traceback.format_exception_only(error)[-1].strip()))


def _cuda_is_initialised() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch is not None and torch.cuda.is_initialized())


@contextlib.contextmanager
def _watch(variables: frozenset[str]) -> Iterator[set[str]]:
    """Which of these environment variables are read inside: this process has none of a rank's."""
    read: set[str] = set()
    # `os.environ` encodes each key that it is asked for.
    encode: Callable[[str], bytes] = vars(os.environ)["encodekey"]

    def note(key: str) -> bytes:
        if key in variables:
            read.add(key)
        return encode(key)

    vars(os.environ)["encodekey"] = note
    try:
        yield read
    finally:
        vars(os.environ)["encodekey"] = encode


def _threads() -> dict[int, str]:
    """Kernel threads of this process beside the main one: number to name."""
    named = {thread.native_id: thread.name for thread in threading.enumerate()}
    own = os.getpid()
    numbers = (int(entry) for entry in os.listdir("/proc/self/task"))  # noqa: PTH208 -- bare numbers are wanted
    return {number: named.get(number) or "a library's thread" for number in numbers if number != own}


@contextlib.contextmanager
def reporting_to(address: str) -> Iterator[dict[str, Any]]:
    """Connects at once, so that the agent sees this process begin and, if it dies, end."""
    report: dict[str, Any] = {}
    with socket.socket(socket.AF_UNIX) as connection:
        # A server that is started again after a crash has nobody left to tell.
        with contextlib.suppress(OSError):
            connection.connect(address)
        yield report
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(report).encode())
