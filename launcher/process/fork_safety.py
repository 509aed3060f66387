"""Forks of a rank, such as its loader workers, beside the threads of a process group."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time

# Seconds that a fork waits at most, and between two looks at the threads.
_LONGEST = 0.05
_PAUSE = 0.0005


@functools.cache
def wait_before_forks() -> None:
    """Let each fork of this process wait until its other threads sleep, for 50 ms at most.

    Before Python 3.12 (CPython's issue 112275) a forked process hangs if another thread entered Python for the first
    time at that moment. A thread of gloo does so when it releases the last reference to a tensor.
    """
    if sys.platform == "linux" and sys.version_info < (3, 12):
        os.register_at_fork(before=_wait_until_quiet)


def _wait_until_quiet() -> None:
    give_up = time.monotonic() + _LONGEST
    while _has_busy_thread(str(threading.get_native_id())) and time.monotonic() < give_up:
        time.sleep(_PAUSE)


def _has_busy_thread(own: str) -> bool:
    return any(number != own and _state_of(number) in "RD" for number in os.listdir("/proc/self/task"))  # noqa: PTH208 -- bare numbers


def _state_of(thread: str) -> str:
    """The kernel's letter: R runs or could run, D waits for a disk or memory, S sleeps."""
    try:
        with open(f"/proc/self/task/{thread}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 -- quick
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "X"  # it has just ended
