"""A loader worker ends with its rank, and on SIGTERM only if its parent sent it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.support.processes import run_warm

# In a separate process: a fork of the tests' process would inherit the locks of its threads.
_PARENT = """
import multiprocessing, os, pathlib, signal, subprocess, sys
from launcher.training.data.workers import start_worker

def work(answers, seen):
    start_worker(3, inner=seen.append, rank=0)
    answers.send(seen)
    while True:
        answers.recv()
        answers.send("still here")

def pending(pid):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(l.split()[1] for l in lines if l.startswith("ShdPnd:")), 16) >> (signal.SIGTERM - 1) & 1

ours, theirs = multiprocessing.Pipe()
worker = multiprocessing.get_context("fork").Process(target=work, args=(theirs, []), daemon=True)
worker.start()
assert ours.recv() == [3], "the user's own function was called"
subprocess.run([sys.executable, "-c", f"import os, signal; os.kill({worker.pid}, signal.SIGTERM)"], check=True)
while pending(worker.pid):  # two at once would be merged into one
    pass
ours.send("?")
assert ours.recv() == "still here"
os.kill(worker.pid, signal.SIGTERM)
worker.join()
assert worker.exitcode == 0
print("as it should be")
"""


@pytest.mark.slow
def test_worker_ends_on_its_parents_sigterm_only(tmp_path: Path) -> None:
    assert "as it should be" in run_warm([sys.executable, "-c", _PARENT], tmp_path, timeout=60).check().output


_RANK = """
import multiprocessing, os, signal, sys, time
from launcher.training.data.workers import start_worker

def work(told):
    start_worker(0, inner=None, rank=0)
    told.send("begun")
    time.sleep(1000)  # a slow sample: no Python code checks the parent

ours, theirs = multiprocessing.Pipe()
multiprocessing.get_context("fork").Process(target=work, args=(theirs,), daemon=True).start()
assert ours.recv() == "begun"
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_worker_ends_with_its_rank_within_a_sample(tmp_path: Path) -> None:
    # The worker has the rank's output open too, and `run_warm` returns when all have closed it.
    run_warm([sys.executable, "-c", _RANK], tmp_path, timeout=60).check(-signal.SIGKILL)
