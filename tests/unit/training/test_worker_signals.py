"""A loader worker ends with its rank, and on SIGTERM only if its parent sent it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from launcher.training.data.workers import keep_workers_at_ctrl_c, start_unplaced_worker
from tests.support.processes import run, run_warm
from tests.support.runs import REPOSITORY

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
os.kill(worker.pid, signal.SIGINT)
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
from launcher.training.data import workers

def work(told):
    getattr(workers, sys.argv[1])(0, inner=None, **({'rank': 0} if sys.argv[1] == 'start_worker' else {}))
    told.send("begun")
    time.sleep(1000)  # a slow sample: no Python code checks the parent

ours, theirs = multiprocessing.Pipe()
multiprocessing.get_context("fork").Process(target=work, args=(theirs,), daemon=True).start()
assert ours.recv() == "begun"
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("start", ["start_worker", "start_unplaced_worker"])
@pytest.mark.slow
def test_worker_ends_with_its_rank_within_a_sample(tmp_path: Path, start: str) -> None:
    # The worker has the rank's output open too, and `run_warm` returns when all have closed it.
    run_warm([sys.executable, "-c", _RANK, start], tmp_path, timeout=60).check(-signal.SIGKILL)


_RANK_THAT_ENDS_AT_ONCE = """
import multiprocessing, os, signal, sys, time
from launcher.training.data import workers

def work(rank):
    while os.getppid() == rank:
        pass
    getattr(workers, sys.argv[1])(0, inner=None, **({'rank': 0} if sys.argv[1] == 'start_worker' else {}))
    time.sleep(1000)

multiprocessing.get_context("fork").Process(target=work, args=(os.getpid(),), daemon=True).start()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("start", ["start_worker", "start_unplaced_worker"])
@pytest.mark.slow
def test_worker_ends_if_its_rank_has_ended_before_it_is_ready(tmp_path: Path, start: str) -> None:
    run_warm([sys.executable, "-c", _RANK_THAT_ENDS_AT_ONCE, start], tmp_path, timeout=60).check(-signal.SIGKILL)


_RANK_THAT_LOADS_LIBRARIES = """
import ctypes, os, threading
from launcher.process.parent_death import die_with_parent

libc = ctypes.CDLL(None)
libc.dlopen.restype, libc.dlopen.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
libc.dlclose.argtypes = [ctypes.c_void_p]

def load():
    while True:
        libc.dlclose(libc.dlopen(b"libresolv.so.2", 2))

threading.Thread(target=load, daemon=True).start()
for _ in range(300):
    pid = os.fork()
    if not pid:
        die_with_parent()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
os._exit(0)
"""


@pytest.mark.slow
def test_worker_starts_while_a_thread_of_its_rank_loads_a_library(tmp_path: Path) -> None:
    run_warm([sys.executable, "-c", _RANK_THAT_LOADS_LIBRARIES], tmp_path, timeout=60).check()


_FORK_SERVER = """
import multiprocessing
from launcher.training.data.workers import start_worker

def work(told):
    start_worker(0, inner=None, rank=0)
    told.send("begun")

if __name__ == "__main__":
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("forkserver").Process(target=work, args=(theirs,), daemon=True)
    worker.start()
    theirs.close()
    assert ours.recv() == "begun"
"""


@pytest.mark.slow
def test_worker_of_a_fork_server_starts(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(_FORK_SERVER)
    run([sys.executable, "program.py"], tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, timeout=120).check(0)


def _ignore(worker_id: int) -> None:
    pass


@pytest.mark.parametrize("inner", [None, _ignore])
def test_other_loaders_get_workers_that_ignore_ctrl_c_once(inner: Any) -> None:
    loader: DataLoader[Any] = DataLoader([1, 2], num_workers=1, worker_init_fn=inner)
    for _ in range(2):
        keep_workers_at_ctrl_c(loader)
        made: Any = loader.worker_init_fn
        assert (made.func, made.keywords) == (start_unplaced_worker, {"inner": inner})
    without: DataLoader[Any] = DataLoader([1, 2])
    keep_workers_at_ctrl_c(without)
    assert without.worker_init_fn is None
