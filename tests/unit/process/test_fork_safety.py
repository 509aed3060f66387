"""A forked process starts although native threads enter Python for the first time at that moment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.processes import run
from tests.support.runs import REPOSITORY

# Each native thread enters Python once, as a thread of gloo that releases a tensor. Without the wait 1 of 1,000 hangs.
_PROGRAM = """
import ctypes, os, time
from launcher.process.fork_safety import wait_before_forks

wait_before_forks()
libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
kind = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
enter = kind(lambda _: None)
for number in range(4000):
    for _ in range(4):
        libc.pthread_create(ctypes.byref(thread), None, enter, None)
        libc.pthread_detach(thread)
    pid = os.fork()
    if not pid:
        os._exit(0)
    give_up = time.monotonic() + 20
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() > give_up:
            os.kill(pid, 9)
            raise SystemExit(f"fork {number} hangs")
        time.sleep(0.0002)
os._exit(0)
"""


@pytest.mark.slow
def test_a_fork_starts_while_native_threads_enter_python(tmp_path: Path) -> None:
    # A small process, as forking one with torch takes 20 ms.
    run([sys.executable, "-c", _PROGRAM], tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, timeout=200).check()
