"""Runs in the fork server before it forks ranks: imports installed packages and reports the result to the agent.

The user's own files are imported by the ranks. The server continues after any error on import: a rank that needs the
package imports it again and reports the error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from launcher.core.gc_paused import quick_imports
from launcher.core.own_modules import forget_safe_path
from launcher.process import parent_death
from launcher.process.titles import claim_process, set_title

MODULES_VARIABLE = "LAUNCHER_PRELOAD"
REPORT_VARIABLE = "LAUNCHER_PRELOAD_REPORT"
# Separates the libraries from the packages that the user's files import.
USER_MODULES = ":"
# Variables that torchelastic sets in a rank and that do not exist in the fork server.
RANK_VARIABLES = frozenset({
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID",
})  # fmt: skip


def become_fork_server() -> None:
    """End with the agent, ignore the terminal's signals, import the modules, and report the result."""
    signal.pthread_sigmask(signal.SIG_BLOCK, parent_death.FOR_RANKS)
    claim_process()
    set_title("fork server")
    parent_death.die_with_parent()
    forget_safe_path()
    parent_death.fork_server_pid = os.getpid()
    # Leave the terminal's foreground group: Ctrl-C is for the agent, which signals the ranks.
    os.setpgid(0, 0)
    # A rank that reads from the terminal: the kernel sends this to the whole group, and by default stops it.
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    address = os.environ.pop(REPORT_VARIABLE, "")
    modules = json.loads(os.environ.pop(MODULES_VARIABLE, "[]"))
    # All ranks share these objects' memory; `quick_imports` keeps their garbage collectors from copying it.
    with _report_to(address) as report, quick_imports():
        report.update(import_modules(modules))


def import_modules(modules: list[str]) -> dict[str, Any]:
    """Import `modules` (see `ForkServer.start`) one by one and check what each import does to this process.

    Returns:
        `cuda` (whether a library initialised CUDA), `unsafe` (pairs of a user's package and the effect of its import
        that does not survive a fork).
    """
    unsafe: dict[str, str] = {}
    end_of_libraries = modules.index(USER_MODULES) if USER_MODULES in modules else len(modules)
    for name in modules[:end_of_libraries]:
        _import(name)
    cuda = _is_cuda_initialised()
    for name in modules[end_of_libraries + 1 :]:
        threads, had_cuda = _list_threads(), _is_cuda_initialised()
        with _record_reads(RANK_VARIABLES) as read:
            _import(name)
        started = sorted(_list_threads()[number] for number in _list_threads() if number not in threads)
        package = name.partition(":")[0].partition(".")[0]
        if _is_cuda_initialised() and not had_cuda:
            unsafe[package] = "initialises CUDA"
        elif started:
            unsafe[package] = f"starts threads ({', '.join(started)})"
        elif read:
            unsafe[package] = f"reads {', '.join(sorted(read))}"
    return {"cuda": cuda, "unsafe": sorted(unsafe.items())}


def _import(name: str) -> None:
    """Do what `import module` or `from module import name` does."""
    module, _, attribute = name.partition(":")
    # A rank that needs the module repeats the error and reports it.
    with contextlib.suppress(Exception, SystemExit):
        imported = importlib.import_module(module)
        if attribute and not hasattr(imported, attribute):
            importlib.import_module(f"{module}.{attribute}")


def _is_cuda_initialised() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch is not None and torch.cuda.is_initialized())


@contextlib.contextmanager
def _record_reads(variables: frozenset[str]) -> Iterator[set[str]]:
    """Collect which of these environment variables are read within the context."""
    read: set[str] = set()
    # `os.environ` encodes each key that it looks up.
    encode: Callable[[str], bytes] = vars(os.environ)["encodekey"]

    def encode_and_record(key: str) -> bytes:
        if key in variables:
            read.add(key)
        return encode(key)

    vars(os.environ)["encodekey"] = encode_and_record
    try:
        yield read
    finally:
        vars(os.environ)["encodekey"] = encode


def _list_threads() -> dict[int, str]:
    """Kernel threads of this process except the main one: number to name."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    own = os.getpid()
    numbers = (int(entry) for entry in os.listdir("/proc/self/task"))  # noqa: PTH208 -- only the numbers are needed
    return {number: names.get(number) or "a library's thread" for number in numbers if number != own}


@contextlib.contextmanager
def _report_to(address: str) -> Iterator[dict[str, Any]]:
    """Connect to the agent first, so that it notices when this process ends; send the report at the end."""
    report: dict[str, Any] = {}
    with socket.socket(socket.AF_UNIX) as connection:
        # A server that `multiprocessing` starts again after a crash has no listener.
        with contextlib.suppress(OSError):
            connection.connect(address)
        yield report
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(report).encode())
