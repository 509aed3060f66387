"""`launcher.launch`: functions of scripts, tests and threads on real ranks, their results, errors and ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.core.errors import LaunchTimeoutError, TrainingError
from tests.support.processes import descendants, run
from tests.support.runs import REPOSITORY

pytestmark = pytest.mark.slow
# Callers are new interpreters without Lightning: the processes of a call import what its caller has imported.
ENV = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}

# No `__main__` guard: a rank that imported this script would call `launch` again.
_SCRIPT = """
import json, os, sys, threading
import torch
import torch.distributed as dist
import launcher

factor = 3

class Point:
    def __init__(self, x):
        self.x = x

def work(value, *, scale):
    dist.init_process_group("gloo")
    total = torch.tensor([float(os.environ["RANK"]) + 1])
    dist.all_reduce(total)
    sys.stdout.write("two\\nlines\\n")
    os.system("echo from a child")
    print("error output", file=sys.stderr)
    print("unfinished", end="")
    try:
        launcher.launch(work)
    except launcher.core.errors.UsageError as error:
        nested = str(error)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "MINE")
    return {"total": total, "point": Point(value * factor * scale), "large": torch.ones(10_000_000), "nested": nested,
            "weight": torch.nn.Linear(2, 2), "env": {name: os.environ[name] for name in names}, "pid": os.getpid()}

before, results = dict(os.environ), []
path = [*sys.path, "/added"]
sys.path[:] = path
os.chdir("tmp")
thread = threading.Thread(target=lambda: results.extend(
    launcher.launch(work, (2,), {"scale": 5}, env={"MINE": "yes"})))
thread.start()
thread.join()
print("FOUND", json.dumps({
    "total": [float(each["total"]) for each in results], "x": [each["point"].x for each in results],
    "point": all(type(each["point"]) is Point for each in results),
    "large": [float(each["large"].sum()) for each in results], "env": [each["env"] for each in results],
    "nested": results[0]["nested"], "weight": results[0]["weight"].weight.requires_grad,
    "pids": len({os.getpid(), *(each["pid"] for each in results)}), "same": before == dict(os.environ),
    "second": launcher.launch(lambda: [os.environ["RANK"], *sys.argv[1:], os.getcwd(), sys.path == path],
                              nproc_per_node=1)}))
"""


def test_a_script_without_a_guard_gets_the_results_of_all_ranks_in_a_thread(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT)
    (tmp_path / "tmp").mkdir()
    env = {**ENV, "TMPDIR": str(tmp_path / "tmp"), "RANK": "7", "MASTER_PORT": "1"}
    output = run([sys.executable, "script.py", "--x", "3"], tmp_path, env=env, timeout=120).check().output
    (found,) = [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("FOUND")]
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "MINE": "yes",
    }
    assert found.pop("env") == [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in (0, 1)]
    assert "this is rank 0 of a function that `launcher.launch` runs" in found.pop("nested")
    assert found == {"total": [3.0, 3.0], "x": [30, 30], "point": True, "large": [1e7, 1e7], "weight": True, "pids": 3,
                     "same": True, "second": [["0", "--x", "3", str(tmp_path / "tmp"), True]]}  # fmt: skip
    for rank in (0, 1):
        shown = [line for line in output.splitlines() if line.startswith(f"[rank {rank}] ")]
        shown = [line for line in shown if "[Gloo]" not in line]  # torch 2.10 prints its connections
        assert [line.partition("] ")[2] for line in shown] == [
            "two",
            "lines",
            "from a child",
            "error output",
            "unfinished",
        ]
    assert list((tmp_path / "tmp").glob("launcher-*")) == [], "the private files are removed"


@pytest.fixture
def _no_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process have imported Lightning; the ranks need not import it."""
    monkeypatch.delitem(sys.modules, "lightning.pytorch", raising=False)


class RejectedError(Exception):
    """Takes other arguments than its message."""

    def __init__(self, sample: int, reason: str) -> None:
        super().__init__(f"sample {sample}: {reason}")
        self.sample = sample


@pytest.mark.usefixtures("_no_lightning")
def test_ranks_restart_and_the_last_error_has_the_class_the_rank_and_the_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if os.environ["RANK"] == "1":
            with (tmp_path / "modes").open("a") as file:
                folder = next(Path(tmp_path).glob("launcher-*/request.json")).parent
                modes = [oct(path.stat().st_mode & 0o777) for path in (folder, *folder.iterdir())]
                file.write(json.dumps(modes) + "\n")
            raise ValueError("first attempt") if first else RejectedError(3, "too long")
        time.sleep(60)

    with pytest.raises(RejectedError) as caught:
        launch_in(tmp_path, fails, max_restarts=1)
    error: Any = caught.value
    assert isinstance(error, TrainingError)
    assert (str(error), error.sample, error.rank) == ("sample 3: too long", 3, 1)
    assert type(error.__cause__) is RejectedError
    lines = error.report.splitlines()
    assert lines[0].startswith("rank 1 (")
    assert lines[0].endswith(") failed first: RejectedError: sample 3: too long")
    assert lines[1].startswith("other ranks: rank 0 running, in ")
    assert 'raise ValueError("first attempt") if first else RejectedError(3, "too long")' in error.report
    assert lines[-1].endswith("RejectedError: sample 3: too long")
    output = capfd.readouterr().out
    assert "failed first: ValueError: first attempt\n" in output
    assert "\nrestart 1 of 1\n" in output
    assert "sample 3" not in output, "the caller raises it"
    for modes in map(json.loads, (tmp_path / "modes").read_text().splitlines()):
        assert modes[0] == "0o700"
        assert set(modes[1:]) == {"0o600"}


def launch_in(folder: Path, *arguments: Any, **options: Any) -> list[Any]:
    """Call `launch` with its private files in this folder."""
    import tempfile

    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        return launcher.launch(*arguments, **options)
    finally:
        tempfile.tempdir = before


@pytest.mark.usefixtures("_no_lightning")
def test_the_ranks_end_at_the_timeout_and_the_error_names_those_without_a_result(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def waits() -> None:
        if os.environ["RANK"] == "1":
            threading.Event().wait()

    # On a slow machine the other rank has not returned either.
    with pytest.raises(LaunchTimeoutError, match=r"did not end within 5 s: no result from ranks? (0, )?1;"):
        launcher.launch(waits, timeout=5)
    assert issubclass(LaunchTimeoutError, TimeoutError)
    assert capfd.readouterr().out == "", "a function has no steps, and nothing was sent from outside"


_WAITS = """
import os, threading
import launcher

def waits():
    print("ready", os.getpid(), flush=True)
    threading.Event().wait()

try:
    launcher.launch(waits)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise SystemExit(130)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_rank_outlives_a_caller_that_is_interrupted_or_killed(tmp_path: Path, number: int, code: int) -> None:
    ready: list[int] = []
    processes: list[int] = []

    def on_line(line: str, caller: int) -> None:
        if " ready " in line:
            ready.append(int(line.split()[-1]))
        if len(ready) == 2 and not processes:
            processes.extend(descendants(caller))
            os.kill(caller, number)

    (tmp_path / "script.py").write_text(_WAITS)
    ended = run([sys.executable, "script.py"], tmp_path, env=ENV, timeout=60, on_line=on_line)
    assert ended.code in (code, 128 - code), ended.output
    assert set(ready) <= set(processes)
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in processes if is_running(pid)] == []
    assert "Traceback" not in ended.output
    assert ("interrupted" in ended.output) == (number == signal.SIGINT)
    assert "stopped by" not in ended.output, "a function has no steps to report"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
