"""The launcher's agent on a node, as a process."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from slurm.job import SIGNALS

FAILED = 1


class Agent:
    """The launcher's agent on this node, as a process.

    SLURM sends its `warning` signal to every process of the job. Only this process handles it; the agent ignores it.
    """

    def __init__(self, command: list[str], cwd: str, env: Mapping[str, str], warning: str) -> None:
        # The other signal stops the agent.
        (other,) = (name for name in SIGNALS if name != warning)
        self._stop_signal = signal.Signals[f"SIG{other}"]
        with _ignored_by_children(signal.Signals[f"SIG{warning}"]):
            self._process = subprocess.Popen(command, cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL)
        # `Popen.wait` holds a lock: a signal handler on the same thread would wait forever.
        self._descriptor = os.pidfd_open(self._process.pid)

    @property
    def code(self) -> int:
        """Its exit code as a shell reports it; 1 while it runs."""
        code = self._process.returncode
        return FAILED if code is None else code if code >= 0 else 128 - code

    @property
    def has_stopped_on_request(self) -> bool:
        """Whether it ended because its ranks were asked to save and stop."""
        requests = (self._stop_signal, signal.SIGTERM, signal.SIGINT)
        return self.code in {128 + number for number in requests}

    def wait(self) -> int:
        """Wait until it has ended; returns its exit code. A signal handler may call it during another call."""
        watch = select.poll()
        watch.register(self._descriptor, select.POLLIN)
        watch.poll()
        self._process.poll()
        return self.code

    def stop(self) -> int:
        """Ask the ranks to save and stop, and wait; returns its exit code."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(self._stop_signal)
        return self.wait()


@contextmanager
def _ignored_by_children(number: int) -> Generator[None]:
    """Processes started in this context ignore a signal; this process receives a pending one at its end."""
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    old_handler = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, old_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
