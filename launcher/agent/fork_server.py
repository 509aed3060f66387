"""The fork server: a process that has imported what is installed and makes ranks by forking.

It is started first thing, so that it imports while the agent still does; it tells what came of it over a socket. What
it must not do is initialise CUDA, start threads or read a rank's variables: a package of which importing does so is
left to the ranks, by a server that is started again without it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing.forkserver
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.agent.preload import MODULES_VARIABLE, REPORT_VARIABLE, USER_MODULES
from launcher.core.own_modules import without_working_directory
from launcher.process.socket_folder import socket_folder_in_use

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
        cuda: whether importing the libraries initialised CUDA.
        unsafe: package that the user's files name to what importing it does that a fork does not survive.
    """

    seconds: float = 0.0
    failed: tuple[tuple[str, str], ...] = ()
    cuda: bool = False
    unsafe: tuple[tuple[str, str], ...] = ()


def choose_start_method(report: PreloadReport | None) -> tuple[StartMethod, str | None]:
    """How to start the ranks, and the notice to give if it is not by forking.

    Args:
        report: the fork server's; None if it died.
    """
    slow = "ranks are spawned, which is slower to start"
    if report is None:
        return "spawn", f"the fork server died while it imported installed packages; {slow}"
    if report.cuda:
        return "spawn", f"importing torch or Lightning initialises CUDA, which a fork does not survive; {slow}"
    if report.unsafe:
        doing = "; ".join(f"importing {package} {doing}" for package, doing in report.unsafe)
        return "spawn", f"{doing}, which a fork does not survive; {slow}"
    return "forkserver", None


def without_unsafe(modules: Sequence[str], report: PreloadReport | None) -> tuple[list[str], str] | None:
    """What another server should import, and the notice to give; None if this one will do.

    Args:
        modules: what the server was to import.
        report: the fork server's; None if it died.
    """
    users = modules.index(USER_MODULES) + 1
    left = "each rank imports {} by itself, which is slower to start"
    if report is None:
        if users == len(modules):
            return None
        packages = ", ".join(dict.fromkeys(map(_package, modules[users:])))
        return list(modules[:users]), f"the fork server died while it imported packages; {left.format(packages)}"
    if not report.unsafe:
        return None
    unsafe = dict(report.unsafe)
    kept = [name for name in modules[users:] if _package(name) not in unsafe]
    doing = "; ".join(f"importing {package} {doing}" for package, doing in report.unsafe)
    return [*modules[:users], *kept], f"{doing}: {left.format('it' if len(unsafe) == 1 else 'them')}"


def _package(name: str) -> str:
    return name.partition(":")[0].partition(".")[0]


class ForkServer:
    """This process's fork server, which `multiprocessing` and so torchelastic use. `start` it in the main thread."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._modules: list[str] = []

    def start(self, modules: Sequence[str]) -> None:
        """Begin to import `modules` in the fork server; returns at once.

        Args:
            modules: the libraries, then the packages that the user's files name after a ':'.
        """
        self._modules = list(modules)
        self._folder = tempfile.TemporaryDirectory(
            prefix="launcher-", dir=socket_folder_in_use(), ignore_cleanup_errors=True
        )
        address = str(Path(self._folder.name) / "preload")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(1)
        variables = {MODULES_VARIABLE: json.dumps(list(modules)), REPORT_VARIABLE: address,
                     # Asking whether there is a GPU must not initialise it.
                     "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # fmt: skip
        # They stay: a server that has to be started again does the same.
        os.environ.update(variables)
        multiprocessing.forkserver.set_forkserver_preload(["launcher.agent.fork_server_main"])
        with without_working_directory():
            multiprocessing.forkserver.ensure_running()

    def start_method(self, tell: Callable[[str], object]) -> StartMethod:
        """Wait until everything is imported, by a second server if need be, and say how ranks are made.

        Args:
            tell: gets a notice.
        """
        report = self.wait()
        again = without_unsafe(self._modules, report)
        if again is not None:
            modules, notice = again
            tell(notice)
            self.end()
            self.start(modules)
            report = self.wait()
        method, notice = choose_start_method(report)
        if notice is not None:
            tell(notice)
        return method

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
                unsafe=tuple((package, doing) for package, doing in values["unsafe"]),
            )
        return None

    def end(self) -> None:
        """End the server; `multiprocessing` begins another when it is asked to."""
        self.close()
        server: Any = vars(multiprocessing.forkserver)["_forkserver"]
        pid = server._forkserver_pid
        if pid is not None:
            # Threads that a package left would keep it from ending by itself.
            os.kill(pid, signal.SIGKILL)
            server._stop()

    def close(self) -> None:
        """Remove the files; the server ends with this process."""
        for name in (MODULES_VARIABLE, REPORT_VARIABLE):
            os.environ.pop(name, None)
        if self._listener is not None:
            self._listener.close()
        if self._folder is not None:
            self._folder.cleanup()
