"""Starts `python ...` without its imports: the tests' side of `tests.support.warm_server`."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parents[2]
# In addition to the server's modules; DeepSpeed chooses its accelerator on import.
DEEPSPEED = ("deepspeed", "lightning.pytorch.strategies.deepspeed")
# Variables that the server's imports read; all others come with each process.
_ON_IMPORT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
_START_TIMEOUT = 300.0
# Makes a process of the server, and what it forks, print the stacks of its threads.
SHOW_STACKS = signal.SIGRTMAX
# Several threads start ranks, with one server.
_one_at_a_time = threading.Lock()
# Variables of torchrun, SLURM, W&B and a terminal's size, which must not reach a test or a server from outside.
_FOREIGN = (
    "COLUMNS",
    "LINES",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_FOREIGN_PREFIXES = ("TORCHELASTIC_", "SLURM_", "WANDB_", "PL_")


def is_foreign(name: str) -> bool:
    """Whether a variable of this name belongs to one run or terminal, and not to the machine."""
    return name in _FOREIGN or name.startswith(_FOREIGN_PREFIXES)


@dataclass
class WarmProcess:
    """A process that leads its session, like one of `subprocess.Popen(..., start_new_session=True)`."""

    pid: int
    _exit_code_socket: socket.socket
    returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs; the negative number of the signal that ended it."""
        if self.returncode is None and select.select([self._exit_code_socket], [], [], 0)[0]:
            return self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code.

        Args:
            timeout: seconds; TimeoutError after them.
        """
        if self.returncode is None:
            self._exit_code_socket.settimeout(timeout)
            self.returncode = int(_line(self._exit_code_socket))
            self._exit_code_socket.close()
        return self.returncode

    def kill(self) -> None:
        """Kill the process if it is running, and wait for its end."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def start(
    arguments: Sequence[str], cwd: Path, env: Mapping[str, str], output: int, *more: str, terminal: bool = False
) -> WarmProcess:
    """Start `python ARGUMENTS`.

    Args:
        arguments: `-m MODULE ...`, `-c TEXT ...` or `FILE ...`.
        cwd: working directory.
        env: the complete environment.
        output: descriptor for stdout and stderr; stdin is empty.
        more: imported modules in addition to those of every server.
        terminal: `output` is a terminal, which becomes the controlling terminal and stdin.
    """
    with _one_at_a_time:
        address, path = _server(more)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    asked = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env), "path": path, "terminal": terminal}
    with Path(os.devnull).open("rb") as nothing:
        socket.send_fds(connection, [b"\0"], [output if terminal else nothing.fileno(), output])
        connection.sendall(json.dumps(asked).encode())
        connection.shutdown(socket.SHUT_WR)
        return WarmProcess(int(_line(connection)), connection)


@functools.cache
def _server(more: Sequence[str]) -> tuple[str, list[str]]:
    """Start one server for the session: its address, and the end of the search path."""
    # The address of a Unix socket has at most 107 bytes, and TMPDIR may be longer.
    place = tempfile.gettempdir()
    folder = tempfile.TemporaryDirectory(prefix="launcher-tests-", dir=place if len(place) < 60 else "/tmp")
    address = str(Path(folder.name) / "warm")
    log = Path(folder.name) / "log"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    env = {name: value for name, value in os.environ.items() if not is_foreign(name) and name != "PYTHONPATH"}
    env |= {name: value for name, value in _ON_IMPORT.items() if more or name != "DS_ACCELERATOR"}
    command = [sys.executable, "-u", "-m", "tests.support.warm_server", str(listener.fileno()), *more]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=_REPOSITORY, env=env, pass_fds=[listener.fileno()],
                                   stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True)  # fmt: skip
    listener.close()

    @atexit.register
    def end() -> None:
        # Closing its stdin ends the server.
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        folder.cleanup()

    with socket.socket(socket.AF_UNIX) as first:
        first.settimeout(_START_TIMEOUT)
        first.connect(address)
        first.shutdown(socket.SHUT_WR)
        try:
            path: list[str] = json.loads(_line(first))
        except (OSError, ValueError):
            process.send_signal(signal.SIGKILL)
            raise AssertionError(f"the warm server did not start:\n{log.read_text()}") from None
    return address, path


def _line(connection: socket.socket) -> str:
    text = b""
    while not text.endswith(b"\n"):
        part = connection.recv(1)
        if not part:
            raise ValueError("the warm server is gone")
        text += part
    return text.decode()
