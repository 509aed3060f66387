"""What the processes of `launcher.launch` send each other: results, exceptions, functions."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.agent.failure_report import RankOutcome, describe_failure
from launcher.agent.function_call import CallFailure, CallFolder, CallOptions, make_pickler
from launcher.core.errors import TrainingError, UsageError, with_cause_type
from launcher.process.heartbeat import NO_STEPS
from launcher.process.rank_status import RankError


class TwoArgumentsError(Exception):
    def __init__(self, first: int, second: str) -> None:
        super().__init__(f"{first} {second}")
        self.first = first


def copied(value: Any) -> Any:
    stream = io.BytesIO()
    make_pickler(stream).dump(value)
    return pickle.loads(stream.getvalue())  # noqa: S301 -- ours


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("k"), FileNotFoundError(2, "gone", "x.csv"), TwoArgumentsError(3, "b"),
              UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")], ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_an_exception_keeps_its_class_its_text_and_its_fields(error: Exception) -> None:
    error.add_note("a note")
    found = copied(error)
    assert (type(found), str(found), found.args, vars(found)) == (type(error), str(error), error.args, vars(error))
    assert getattr(found, "filename", None) == getattr(error, "filename", None)


def test_a_function_keeps_the_name_of_its_file_and_its_variables() -> None:
    factor = 3
    found = copied(lambda x: x * factor)
    assert found(2) == 6
    assert found.__code__.co_filename == __file__


def test_tensors_and_modules_are_results() -> None:
    layer = torch.nn.Linear(2, 2)
    found = copied({"layer": layer, "half": torch.ones(3, dtype=torch.bfloat16), "grown": layer.weight * 2})
    assert torch.equal(found["layer"].weight, layer.weight)
    assert (found["half"].dtype, found["grown"].requires_grad) == (torch.bfloat16, True)


@pytest.mark.gpu
def test_cuda_tensors_are_moved_to_the_cpu() -> None:
    layer = torch.nn.Linear(2, 2).cuda()
    found = copied([layer, torch.ones(2, device="cuda")])
    assert {found[0].weight.device.type, found[1].device.type} == {"cpu"}
    assert type(found[0].weight) is torch.nn.Parameter


def test_a_result_that_cannot_be_pickled_is_an_error_with_the_rank_and_the_type(tmp_path: Path) -> None:
    folder = CallFolder(tmp_path)
    with pytest.raises(
        UsageError, match=r"rank 3 returned a _thread\.lock that cannot be pickled .*; make the function return"
    ):
        folder.save_result(3, threading.Lock())
    with pytest.raises(UsageError, match=r"rank 0 returned a builtins\.list that cannot be pickled"):
        folder.save_result(0, [threading.Lock()])
    with pytest.raises(UsageError, match=r"rank 0 cannot write its result .*; set TMPDIR"):
        CallFolder(tmp_path / "removed").save_result(0, 1)


class LockedError(OSError):
    def __init__(self, first: int, second: str) -> None:
        super().__init__(f"{first} {second}")
        self.first, self.lock = first, threading.Lock()


class BrokenError(ValueError):
    def __reduce__(self) -> Any:
        return int, ("x",)


class NoTextError(LookupError):
    def __str__(self) -> str:
        return self.lock.name  # type: ignore[attr-defined]


def make_error_of_local_class() -> Exception:
    lock = threading.Lock()

    class LocalError(KeyError):
        lock_of_class = lock

    return LocalError("x")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [(LockedError(1, "b"), LockedError, "1 b"),
     (BrokenError("x"), BrokenError, "x"),
     (ValueError(threading.Lock()), ValueError, "<unlocked _thread.lock object"),
     (NoTextError(threading.Lock()), LookupError, "NoTextError"),
     (make_error_of_local_class(), KeyError, "'x'"),
     (ExceptionGroup("g", [ValueError(1), LockedError(1, "b")]), ExceptionGroup, "g (2 sub-exceptions)")],
    ids=lambda each: type(each).__name__,
)  # fmt: skip
def test_an_error_that_cannot_be_pickled_is_an_instance_of_its_class_in_the_caller(
    error: Exception, kind: type[Exception], text: str, tmp_path: Path
) -> None:
    error.add_note("a note")
    folder = CallFolder(tmp_path)
    folder.save_error(1, 0, error)
    found = folder.load_error(1, 0)
    assert found is not None
    assert type(found) is kind
    assert str(found).startswith(text)
    assert found.__notes__ == ["a note"]
    assert not hasattr(found, "lock")
    assert getattr(found, "first", 1) == 1
    failure = TrainingError("report", rank=1)
    failure.__cause__ = found
    with pytest.raises(kind) as caught:
        raise with_cause_type(failure)
    assert isinstance(caught.value, TrainingError)


def test_the_errors_of_a_group_are_caught_one_by_one(tmp_path: Path) -> None:
    folder = CallFolder(tmp_path)
    folder.save_error(0, 0, ExceptionGroup("g", [LockedError(1, "b"), ExceptionGroup("h", [ValueError(1)])]))
    failure = TrainingError("report", rank=0)
    failure.__cause__ = folder.load_error(0, 0)
    caught: list[str] = []
    try:
        raise with_cause_type(failure)
    except* LockedError as group:
        caught += map(str, group.exceptions)
    except* ValueError as group:
        caught += map(str, group.exceptions)
    assert caught == ["1 b", "h (1 sub-exception)"]


def test_options_failures_and_results_are_read_as_written_into_private_files(tmp_path: Path) -> None:
    folder = CallFolder(tmp_path)
    options = CallOptions(2, 1, "gloo", ["lightning.pytorch"], ["/a"], ["train.py", "--x"], {"cell": ["x = 1\n"]})
    folder.write_call(options, pickle.dumps(("f", (), {})))
    assert folder.read_options() == options
    assert folder.load_function() == ("f", (), {})
    assert folder.read_failure() is None
    failure = CallFailure(1, "text", False, 0)
    folder.write_failure(failure)
    folder.save_result(0, {"a": 1})
    assert (folder.read_failure(), folder.load_result(0), folder.has_result(1)) == (failure, {"a": 1}, False)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    folder.discard_result(0)
    assert not folder.has_result(0)


def test_the_report_ends_with_the_error_of_the_rank_that_failed_first() -> None:
    error = RankError("ValueError", "bad", ("Traceback (most recent call last):", "ValueError: bad"), "", 1.0, NO_STEPS)
    lost = RankError("RuntimeError", "x", (), "", 2.0, NO_STEPS, lost_peer=True)
    first = RankOutcome(1, "a", 1, 1.0, NO_STEPS, error)
    others = [RankOutcome(0, "a", 1, 2.0, NO_STEPS, lost), RankOutcome(2, "a", -9, 2.0, NO_STEPS)]
    assert describe_failure(first, [first, *others]).splitlines() == [
        "rank 1 (a) failed first: ValueError: bad",
        "other ranks: rank 0 lost the connection to another rank (RuntimeError); rank 2 killed by SIGKILL (signal 9)",
        "Traceback (most recent call last):",
        "ValueError: bad",
    ]
    killed = RankOutcome(0, "a", -11, 1.0, NO_STEPS, last_lines=("its output",))
    assert describe_failure(killed, [killed]).splitlines() == [
        "rank 0 (a) failed first: killed by SIGSEGV (signal 11)",
        "its output",
    ]


def test_importing_launch_imports_no_training_library() -> None:
    code = (
        "import sys; from launcher import launch; "
        "print([name for name in ('torch', 'lightning', 'deepspeed', 'wandb', 'cloudpickle') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
