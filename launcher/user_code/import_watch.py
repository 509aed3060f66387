"""Report a process that ends while it imports the user's modules: by `os._exit`, a crash, or C code that calls `exit`.

A rank of the launcher's agent needs none of it, because the agent reports the rank's end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from launcher.process.rank_status import FOLDER_VARIABLE
from launcher.user_code import import_watcher
from launcher.user_code.import_watcher import DONE, IMPORTING

# They are imported by every command that imports the user's modules, or are the launcher's own.
_KNOWN = ("launcher", "lightning", "torch", "builtins")
_WATCHER = Path(import_watcher.__file__)
_watching: list[int] = []  # the descriptor of the running watcher's input


class ExitCallError(SystemExit):
    """`os._exit`, called by a module that is being imported; raised in place of the end of the process."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    def __str__(self) -> str:
        return f"it calls os._exit({self.code})"


@contextlib.contextmanager
def watch_imports(paths: Iterable[str]) -> Iterator[None]:
    """Report an end of this process within the context, which imports the modules of these class paths."""
    names = [path for path in paths if _is_to_import(path)]
    is_reporter = not os.environ.get(FOLDER_VARIABLE) and os.environ.get("RANK", "0") == "0"
    if _watching or not names or not is_reporter:
        yield
        return
    libraries = (f"{Path(os.__file__).parent}{os.sep}", f"{_WATCHER.parents[1]}{os.sep}")
    command = [sys.executable, "-I", "-S", str(_WATCHER), str(os.getpid()), *libraries]
    # Its own session: Ctrl-C is for this process.
    end, descriptor = os.pipe()
    watcher = subprocess.Popen(command, stdin=end, stdout=subprocess.DEVNULL, start_new_session=True)
    os.close(end)
    _watching.append(descriptor)
    note_import(", ".join(names))
    try:
        with _record_crash(descriptor), _report_exit_calls():
            yield
    finally:
        _send(DONE)
        _watching.clear()
        os.close(descriptor)
        watcher.wait()


def note_import(subject: str) -> None:
    """Name what is imported next, for the report."""
    if _watching:
        _send(f"{IMPORTING}{subject}")


def find_class_paths(values: Any) -> Iterator[str]:
    """All import paths of classes in the settings, also those of nested ones."""
    if isinstance(values, Mapping):
        if isinstance(path := values.get("class_path"), str):
            yield path
        values = values.values()
    elif not isinstance(values, list | tuple):
        return
    for each in values:
        yield from find_class_paths(each)


def _is_to_import(path: str) -> bool:
    module = path.rpartition(".")[0]
    return bool(module) and module not in sys.modules and module.partition(".")[0] not in _KNOWN


def _send(line: str) -> None:
    with contextlib.suppress(OSError):  # the watcher was killed
        os.write(_watching[0], f"{line}\n".encode())


@contextlib.contextmanager
def _record_crash(descriptor: int) -> Iterator[None]:
    """Send the watcher the cause and the stack of a crash, unless faulthandler reports it elsewhere already."""
    if faulthandler.is_enabled():
        yield
        return
    faulthandler.enable(descriptor, all_threads=False)
    try:
        yield
    finally:
        faulthandler.disable()


@contextlib.contextmanager
def _report_exit_calls() -> Iterator[None]:
    """Raise an error where a module calls `os._exit` in this process."""
    end, process = os._exit, os.getpid()
    is_active = True

    def report_exit(status: int) -> NoReturn:
        # A module may keep this function, and a process that it forks ends by it.
        if is_active and os.getpid() == process:
            raise ExitCallError(status)
        end(status)

    os._exit = report_exit
    try:
        yield
    finally:
        is_active = False
        os._exit = end
