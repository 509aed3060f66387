"""Scripts that continue after a failed training, or that a signal ends: on two ranks, as with plain Lightning."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from launcher.core.errors import describe_stop_signal
from tests.distributed.test_coordinator_run import HEAD, found_in, script
from tests.support.processes import run_warm
from tests.support.runs import events_of, toy_env

pytestmark = pytest.mark.slow

_SWEEP = """
class Diverges(Exception):
    pass

class Model(Toy):
    def __init__(self, name):
        super().__init__()
        self.name = name
    def training_step(self, batch, batch_idx):
        if self.name in ("everywhere", f"on-rank-{self.global_rank}") and batch_idx == 3:
            raise Diverges(self.name)
        return super().training_step(batch, batch_idx)

import launcher.training.script_end
# The seconds that the other ranks have to fail too; the first training takes them where a machine is slow.
launcher.training.script_end._GRACE = 60.0
trains = coordinator(precision="32", devices=2, wandb=WandbOptions("offline"))
for name in ("everywhere", "fine", "on-rank-1", "never"):
    if name == "on-rank-1":
        launcher.training.script_end._GRACE = 0.5
    try:
        end = trains.train(Model(name), ToyData(), name=name, **QUIET)
    except Diverges as error:
        found(rank=error.rank, caught=str(error), args=error.args, group=torch.distributed.is_initialized(),
              pid=os.getpid())
    else:
        found(name=name, steps=end["trainer"].global_step, pid=os.getpid())
"""


def test_ranks_that_all_fail_continue_together_and_one_failed_rank_is_reported_to_the_others(tmp_path: Path) -> None:
    output = script(tmp_path, _SWEEP, code=1).output
    results = found_in(output)
    assert sorted(end["rank"] for end in results if end.get("caught") == "everywhere") == [0, 1]
    assert sorted(end["steps"] for end in results if end.get("name") == "fine") == [8, 8]
    assert len({end["pid"] for end in results}) == 2, "the ranks are started once"
    assert not any(end["group"] for end in results if "caught" in end)
    # Rank zero is in a collective until the other rank has ended, and its script does not catch the lost connection.
    # Its report is all that the ranks print: the first line and the last one are the error of the rank that failed.
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if "failed first" in line)
    assert re.fullmatch(r"rank 1 \(.+\) failed first: Diverges: on-rank-1", lines[start])
    assert lines[start + 1] == "other ranks: rank 0 lost the connection to another rank"
    assert lines[-2:] == ["    raise Diverges(self.name)", "Diverges: on-rank-1"]
    assert (output.count("Traceback"), output.count("Diverges: ")) == (1, 2)
    assert not any(end.get("name") == "never" or end.get("caught") == "on-rank-1" for end in results)
    assert {event["rank"] for event in events_of(tmp_path / "runs" / "everywhere", "failed")} == {0, 1}


_STUCK = """
import signal
import launcher.agreement.script_ranks, launcher.training.script_end
# The seconds that a rank has to end by itself.
launcher.agreement.script_ranks._GRACE = launcher.training.script_end._GRACE = 1.0

class Model(Toy):
    def training_step(self, batch, batch_idx):
        if self.global_rank == 0:
            raise ValueError("on rank 0")
        sys.stdout.flush()
        while True:
            signal.pause()

trains = coordinator(precision="32", devices=2)
for name in ("first", "second"):
    try:
        trains.train(Model(), ToyData(), name=name, **QUIET)
    except Exception as error:
        found(name=name, error=f"{type(error).__name__}: {error}", rank=os.environ["RANK"])
"""


def test_a_rank_that_stays_in_a_failed_training_is_ended_and_the_next_training_reports_it(tmp_path: Path) -> None:
    results = found_in(script(tmp_path, _STUCK).output)
    assert [(end["name"], end["rank"]) for end in results] == [("first", "0"), ("second", "0")]
    assert results[0]["error"] == "TrainingError: on rank 0"
    assert results[1]["error"].startswith("AgreementError: rank 1 of this script ended with exit code -")


_TOLERANT = """
import signal, threading
own = sys.argv[2:] == ["own"]
if own:
    signal.signal(signal.SIGTERM, lambda *_: (print("cleaned", flush=True), sys.exit(77)))

class Model(Toy):
    def training_step(self, batch, batch_idx):
        if self.global_step == 2 and self.global_rank == 0:
            found(ready=os.getpid())
            sys.stdout.flush()
        if self.global_step == 2:
            reached.wait()
        return super().training_step(batch, batch_idx)

# The signal comes in this step; a script's own thread waits for it beside the launcher's.
reached = threading.Event()
import launcher.training.stop.signals
handle = launcher.training.stop.signals.SignalListener._handle
def handled(self, number):
    handle(self, number)
    reached.set()
launcher.training.stop.signals.SignalListener._handle = handled

trains = coordinator(precision="32", devices=int(sys.argv[1]))
for name in ("first", "second"):
    try:
        trains.train(Model(), ToyData(), name=name, **QUIET)
        found(name=name)
    except Exception as error:
        found(name=name, error=str(error))
"""


@pytest.mark.parametrize(
    ("number", "ranks", "own", "code"),
    [
        pytest.param(signal.SIGINT, 2, False, 130, id="Ctrl-C on two ranks"),
        pytest.param(signal.SIGTERM, 1, False, 143, id="SIGTERM"),
        pytest.param(signal.SIGTERM, 1, True, 77, id="SIGTERM with a handler of the script's"),
    ],
)
def test_a_signal_ends_a_script_that_continues_after_errors(
    tmp_path: Path, number: int, ranks: int, own: bool, code: int
) -> None:
    def on_line(line: str, group: int) -> None:
        if '"ready"' in line:
            os.killpg(group, number)

    (tmp_path / "train.py").write_text(HEAD + _TOLERANT)
    arguments = [sys.executable, "train.py", str(ranks), *(["own"] if own else [])]
    output = (
        run_warm(arguments, tmp_path, env=toy_env(tmp_path / "trace"), timeout=120, on_line=on_line).check(code).output
    )
    assert [end for end in found_in(output) if "name" in end] == []
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == ["first"]
    assert (tmp_path / "runs" / "first" / "checkpoints" / "last.ckpt").is_file()
    assert "Traceback" not in output
    assert output.count(f"stopped by {describe_stop_signal(number)} after step 3; saved ") == 1
    assert output.count("cleaned") == own


_LATE = """
import os, sys
if os.environ.get("RANK") == "1":
    import signal
    from datetime import timedelta
    from torch.distributed import TCPStore
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store.wait(["launcher/challenge"], timedelta(seconds=60))
    print("waits", flush=True)
    signal.pause()
"""


def test_ctrl_c_to_rank_zero_only_ends_its_wait_for_a_late_rank(tmp_path: Path) -> None:
    def on_line(line: str, process: int) -> None:
        if line.startswith("waits"):
            os.kill(process, signal.SIGINT)

    text = 'coordinator(precision="32", devices=2).train(Toy(), ToyData(), **QUIET)\n'
    (tmp_path / "train.py").write_text(_LATE + HEAD + text)
    arguments = [sys.executable, "train.py"]
    ended = run_warm(arguments, tmp_path, env=toy_env(tmp_path / "trace"), timeout=100, on_line=on_line).check(130)
    assert "Traceback" not in ended.output
