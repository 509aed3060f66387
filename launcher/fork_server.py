"""The fork server: a process that has imported everything and makes ranks by forking.

It is started first thing, so that it imports while the agent still does; it tells what came of it over a socket. What
it must not do is initialise CUDA or start threads, which a fork does not survive: then the ranks are spawned instead.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing.forkserver
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.own_modules import without_working_directory
from launcher.preload import MODULES_VARIABLE, REPORT_VARIABLE

# Seconds until the server must have begun, and until its imports must have ended.
_BEGIN_TIMEOUT = 120.0
_IMPORT_TIMEOUT = 600.0

StartMethod = Literal["forkserver", "spawn"]


@dataclass(frozen=True, slots=True)
class PreloadReport:
    """What the fork server says of itself.

    Attributes:
        seconds: what the imports took.
        failed: module name to the last line of what it raised; the ranks will meet and report it themselves.
        cuda: whether an import initialised CUDA.
        threads: names of the threads that importing the user's modules left running.
    """

    seconds: float = 0.0
    failed: tuple[tuple[str, str], ...] = ()
    cuda: bool = False
    threads: tuple[str, ...] = ()


def choose_start_method(report: PreloadReport | None) -> tuple[StartMethod, str | None]:
    """How to start the ranks, and the notice to give if it is not by forking.

    Args:
        report: the fork server's; None if it died.
    """
    slow = "ranks are spawned, which is slower to start"
    if report is None:
        return "spawn", f"the fork server died while it imported the model's modules; {slow}"
    if report.cuda:
        return "spawn", f"importing the model's modules initialises CUDA, which a fork does not survive; {slow}"
    if report.threads:
        names = ", ".join(report.threads)
        return "spawn", f"importing the model's modules starts threads ({names}), which a fork does not survive; {slow}"
    return "forkserver", None


class ForkServer:
    """This process's fork server, which `multiprocessing` and so torchelastic use. `start` it in the main thread."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self, modules: Sequence[str]) -> None:
        """Begin to import `modules` in the fork server; returns at once.

        Args:
            modules: the libraries', then the user's after a ':'.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="launcher-", ignore_cleanup_errors=True)
        address = str(Path(self._folder.name) / "preload")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(1)
        variables = {MODULES_VARIABLE: json.dumps(list(modules)), REPORT_VARIABLE: address,
                     # Asking whether there is a GPU must not initialise it.
                     "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # fmt: skip
        # They stay: a server that has to be started again does the same.
        os.environ.update(variables)
        multiprocessing.forkserver.set_forkserver_preload(["launcher.fork_server_main"])
        with without_working_directory():
            multiprocessing.forkserver.ensure_running()

    def wait(self) -> PreloadReport | None:
        """Wait until everything is imported; None if the server died on the way."""
        if self._listener is None:
            raise RuntimeError("the fork server was not started")
        with self._listener as listener, contextlib.suppress(OSError, ValueError):
            listener.settimeout(_BEGIN_TIMEOUT)
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(_IMPORT_TIMEOUT)
                text = b"".join(iter(lambda: connection.recv(65536), b""))
            values = json.loads(text)
            return PreloadReport(
                seconds=values["seconds"],
                failed=tuple((name, error) for name, error in values["failed"]),
                cuda=values["cuda"],
                threads=tuple(values["threads"]),
            )
        return None

    def close(self) -> None:
        """Remove the files; the server ends with this process."""
        for name in (MODULES_VARIABLE, REPORT_VARIABLE):
            os.environ.pop(name, None)
        if self._listener is not None:
            self._listener.close()
        if self._folder is not None:
            self._folder.cleanup()
