"""The launcher's agent on a node, as a process of its own that hears of a stop by one signal alone."""

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
    """The launcher's agent on this node, as a process of its own.

    Args:
        command: its words.
        cwd: its working directory.
        env: its environment.
        warning: name of the signal that SLURM warns with; it reaches every process of the job, and is only ours.
    """

    def __init__(self, command: list[str], cwd: str, env: Mapping[str, str], warning: str) -> None:
        number = signal.Signals[f"SIG{warning}"]
        # The agent hears of the stop by the other one.
        (other,) = (name for name in SIGNALS if name != warning)
        self._stop_signal = signal.Signals[f"SIG{other}"]
        with _shielded(number):
            self._process = subprocess.Popen(command, cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL)
        # `Popen.wait` holds a lock, which a signal handler on the same thread would wait for for ever.
        self._descriptor = os.pidfd_open(self._process.pid)

    @property
    def code(self) -> int:
        """Its exit code as a shell has it; 1 while it runs."""
        code = self._process.returncode
        return FAILED if code is None else code if code >= 0 else 128 - code

    @property
    def stopped_in_order(self) -> bool:
        """Whether it ended because its ranks were asked to save and stop."""
        asked = (self._stop_signal, signal.SIGTERM, signal.SIGINT)
        return self.code in {128 + number for number in asked}

    def wait(self) -> int:
        """Until it has ended; returns its exit code. A signal handler may call it too, inside another call."""
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
def _shielded(number: int) -> Generator[None]:
    """Processes started here, and theirs, are deaf to a signal; one that comes meanwhile is kept for this process."""
    before_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, before_mask)
