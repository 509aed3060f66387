"""No orphans: the kernel kills a process when its parent dies for any reason (Linux)."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

_PR_SET_PDEATHSIG = 1
# Looked up before a fork: in a fork the dynamic linker may be as a thread of the parent left it, and ends the process.
_PRCTL = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
# A scheduler sends these to every process of a job. The fork server must survive them, because its ranks die with it:
# it blocks them, and each rank unblocks them and receives one that arrived before.
FOR_RANKS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
# Those and the terminal's or the user's Ctrl-C; all mean save and stop.
STOP_SIGNALS = (signal.SIGINT, *FOR_RANKS)
# Process id of the fork server. Its children inherit the variable: their parent is the fork server, not the agent.
fork_server_pid: int | None = None


def die_with_creator(fork_server: int | None = None) -> None:
    """`die_with_parent` in a process that `multiprocessing` started; `fork_server` forked it, unless it is None.

    The parent may have ended already: `os.getppid()` would be another process then.
    """
    creator = multiprocessing.parent_process()
    die_with_parent(fork_server or (creator.pid if creator else None))


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel for a SIGKILL when the thread that created this process ends; kept by an exec, not by a fork.

    A chain of such processes dies from the top down: agent, fork server, ranks. `parent` is the parent's process id at
    creation, to detect that it died before this call.

    Raises:
        OSError: the kernel does not support it.
    """
    expected = os.getppid() if parent is None else parent
    if _PRCTL is None or _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != expected:
        os._exit(128 + signal.SIGKILL)
