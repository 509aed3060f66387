"""SIGTERM to a loader worker: from its parent it ends it, from anybody else it does not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection

from launcher.worker_signals import start_worker


def _work(answers: Connection, seen: list[int]) -> None:
    start_worker(3, inner=seen.append, rank=0)
    answers.send(seen)
    while True:
        answers.recv()
        answers.send("still here")


def test_a_worker_outlives_a_strangers_signal_and_obeys_its_parents() -> None:
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_work, args=(theirs, []), daemon=True)
    worker.start()
    assert worker.pid is not None
    assert ours.recv() == [3], "the user's own function was called"
    stranger = f"import os, signal; os.kill({worker.pid}, signal.SIGTERM)"
    subprocess.run([sys.executable, "-c", stranger], check=True)
    ours.send("?")
    assert ours.recv() == "still here"
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(60)
    assert worker.exitcode == 0
