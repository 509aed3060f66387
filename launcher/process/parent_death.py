"""No orphans: a process that the kernel kills when its parent dies, however that happens (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
# A scheduler sends these to every process of a job. The fork server must outlive them, or its ranks would die with it;
# it blocks them, and each rank takes them again, with one that came meanwhile.
FOR_RANKS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# The fork server's own process id, which its children inherit: their parent, though they were made for the agent.
fork_server_pid: int | None = None


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel for a SIGKILL when the thread that made this process ends; survives an exec, not a fork.

    A chain of such processes dies from the top down: agent, fork server, ranks.

    Args:
        parent: process id of the parent when it made this one, to notice that it died before the kernel was asked.

    Raises:
        OSError: the kernel does not know it.
    """
    expected = os.getppid() if parent is None else parent
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != expected:
        os._exit(128 + signal.SIGKILL)
