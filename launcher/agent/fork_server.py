"""The agent's handle of the fork server, a process that imports installed packages and then forks the ranks.

It starts first, so that it imports while the agent does the same, and reports the result over a socket. A fork server
must not initialise CUDA, start threads or read a rank's variables. If importing a package does that, the server is
started again without the package, and each rank imports it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.agent.fork_server_process import MODULES_VARIABLE, REPORT_VARIABLE, USER_MODULES
from launcher.core.own_modules import without_working_directory
from launcher.process.socket_folder import socket_folder_in_use

# Seconds that the server has to start, and to import the modules.
_START_TIMEOUT = 120.0
_IMPORT_TIMEOUT = 600.0

StartMethod = Literal["forkserver", "spawn"]


@dataclass(frozen=True, slots=True)
class PreloadReport:
    """The result of the imports in the fork server: whether the libraries initialised CUDA, and the unsafe packages.

    Attributes:
        unsafe: package that the user's files import, and what importing it does that does not survive a fork.
    """

    cuda: bool = False
    unsafe: tuple[tuple[str, str], ...] = ()


def choose_start_method(report: PreloadReport | None) -> tuple[StartMethod, str | None]:
    """How to start the ranks, and the notice if they cannot be forked. `report` is None if the server died."""
    slow = "each rank starts as a new process and imports all packages, which is slower"
    if report is None:
        return "spawn", f"the fork server died while it imported installed packages; {slow}"
    if report.cuda:
        return "spawn", f"importing torch or Lightning initialises CUDA, which does not survive a fork; {slow}"
    if report.unsafe:
        effects = "; ".join(f"importing {package} {effect}" for package, effect in report.unsafe)
        return "spawn", f"{effects}, which does not survive a fork; {slow}"
    return "forkserver", None


def remove_unsafe_modules(modules: Sequence[str], report: PreloadReport | None) -> tuple[list[str], str] | None:
    """The modules for another server, and the notice; None if this server can be used.

    `modules` and `report` are those of this server; `report` is None if it died.
    """
    first_user = modules.index(USER_MODULES) + 1
    slow = "each rank imports {} itself, which is slower to start"
    if report is None:
        if first_user == len(modules):
            return None
        packages = ", ".join(dict.fromkeys(map(_package_of, modules[first_user:])))
        return list(modules[:first_user]), f"the fork server died while it imported packages; {slow.format(packages)}"
    if not report.unsafe:
        return None
    unsafe = dict(report.unsafe)
    kept = [name for name in modules[first_user:] if _package_of(name) not in unsafe]
    effects = "; ".join(f"importing {package} {effect}" for package, effect in report.unsafe)
    return [*modules[:first_user], *kept], f"{effects}: {slow.format('it' if len(unsafe) == 1 else 'them')}"


def _package_of(name: str) -> str:
    return name.partition(":")[0].partition(".")[0]


class ForkServer:
    """The fork server of this process, which `multiprocessing` and torchelastic use. Start it in the main thread."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._modules: list[str] = []
        self._other_server: dict[str, Any] | None = None

    def start(self, modules: Sequence[str]) -> None:
        """Start the fork server and return at once.

        Args:
            modules: what to import: the libraries, `USER_MODULES`, the packages that the user's files import.
        """
        self._modules = list(modules)
        if self._other_server is None:
            # The caller's own processes may use a fork server too: keep it.
            state = _server_of_multiprocessing()
            self._other_server = vars(state).copy()
            state.__init__()
        self._folder = tempfile.TemporaryDirectory(
            prefix="launcher-", dir=socket_folder_in_use(), ignore_cleanup_errors=True
        )
        address = str(Path(self._folder.name) / "preload")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(1)
        variables = {MODULES_VARIABLE: json.dumps(list(modules)), REPORT_VARIABLE: address,
                     # Counting the GPUs must not initialise CUDA.
                     "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # fmt: skip
        # They stay set for a server that `multiprocessing` starts again.
        os.environ.update(variables)
        multiprocessing.forkserver.set_forkserver_preload(["launcher.agent.fork_server_main"])
        # Ctrl-C at the terminal reaches the server too, which would print a traceback; the ranks unblock it. Ctrl-\
        # would end the process of `multiprocessing` that tracks semaphores, which starts here.
        blocked = {signal.SIGINT, signal.SIGQUIT}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            with without_working_directory():
                multiprocessing.resource_tracker.ensure_running()
                # Python unblocks SIGINT after it has started that process.
                signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
                multiprocessing.forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def choose_start_method(self, notify: Callable[[str], object]) -> StartMethod:
        """Wait for the imports, in a second server if necessary, and return how ranks start."""
        report = self.wait()
        remaining = remove_unsafe_modules(self._modules, report)
        if remaining is not None:
            modules, notice = remaining
            notify(notice)
            self.end()
            self.start(modules)
            report = self.wait()
        method, notice = choose_start_method(report)
        if notice is not None:
            notify(notice)
        return method

    def wait(self) -> PreloadReport | None:
        """Wait for the report; None if the server died."""
        if self._listener is None:
            raise RuntimeError("the fork server was not started")
        with self._listener as listener, contextlib.suppress(OSError, ValueError):
            listener.settimeout(_START_TIMEOUT)
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(_IMPORT_TIMEOUT)
                text = b"".join(iter(lambda: connection.recv(65536), b""))
            values = json.loads(text)
            return PreloadReport(values["cuda"], tuple((package, effect) for package, effect in values["unsafe"]))
        return None

    def end(self) -> None:
        """End the server and remove its files; `multiprocessing` uses the server that it had before."""
        for name in (MODULES_VARIABLE, REPORT_VARIABLE):
            os.environ.pop(name, None)
        if self._listener is not None:
            self._listener.close()
        if self._folder is not None:
            self._folder.cleanup()
        if self._other_server is None:
            return
        server = _server_of_multiprocessing()
        if server._forkserver_pid is not None:
            # Threads of a package would keep the server running.
            os.kill(server._forkserver_pid, signal.SIGKILL)
            server._stop()
        vars(server).update(self._other_server)
        self._other_server = None


def _server_of_multiprocessing() -> Any:
    return vars(multiprocessing.forkserver)["_forkserver"]
