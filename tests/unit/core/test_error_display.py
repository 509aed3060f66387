"""The report of a failure: in a script through `sys.excepthook`, in a notebook through IPython."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from launcher import TrainingCoordinator
from launcher.core.error_display import format_failure, show_once
from launcher.core.errors import CallError, OutOfMemoryError, TrainingError, UsageError, with_cause_type


@pytest.fixture
def noted() -> Iterator[list[BaseException]]:
    """The errors that the hook of another library gets; it also prints, as W&B's does."""
    before, found = sys.excepthook, []

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        found.append(error)
        sys.stderr.write("printed again\n")

    sys.excepthook = hook
    yield found
    sys.excepthook = before


def caught(error: Exception, cause: Exception | None = None) -> Any:
    try:
        if cause is None:
            raise error
        try:
            raise cause
        except type(cause) as inner:
            raise error from inner
    except type(error) as outer:
        return outer


def end_script(error: BaseException) -> None:
    sys.excepthook(type(error), error, error.__traceback__)


def test_other_ranks_are_one_line_and_the_traceback_is_last() -> None:
    others = [f"rank {rank} lost" for rank in range(1, 8)] + ["rank 8 " + "x" * 200]
    assert format_failure("rank 0 failed", others, ["Traceback", "ValueError: x"]).splitlines() == [
        "rank 0 failed",
        "other ranks: rank 1 lost; rank 2 lost; rank 3 lost; rank 4 lost; and 4 more",
        "Traceback",
        "ValueError: x",
    ]
    assert format_failure("a", [], ["b"]) == "a\nb"
    assert len(format_failure("a", ["x" * 300], [])) < 130


def test_a_report_is_printed_once_and_other_hooks_still_note_the_failure(
    noted: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    error = TrainingError("short", rank=1, report="rank 1 failed\nValueError: x")
    for _ in range(2):
        show_once(error)
    end_script(error)
    assert (capsys.readouterr().err, noted) == ("rank 1 failed\nValueError: x\n", [error])
    assert error._render_traceback_() == ["rank 1 failed", "ValueError: x"]  # type: ignore[attr-defined]
    assert str(pickle.loads(pickle.dumps(error))) == "short"  # noqa: S301 -- ours


def test_another_rank_prints_it(noted: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    for error in (TrainingError("x", report="the report"), UsageError("x")):
        end_script(show_once(error, lambda: False))
    assert (capsys.readouterr().err, len(noted)) == ("", 2)


def test_other_errors_are_left_to_the_other_hooks(
    noted: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    show_once(TrainingError("x", report="the report"))
    for error in (ValueError("the script's own"), UsageError("x"), TrainingError("without a cause")):
        end_script(error)
        assert capsys.readouterr().err == "printed again\n"


def test_an_error_with_a_cause_shows_the_script_and_the_causes_traceback(
    noted: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    error = caught(TrainingError("rank 0 (a): ValueError: bad"), ValueError("bad"))
    joined = with_cause_type(error)
    joined.__cause__ = error.__cause__
    end_script(show_once(joined))
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[-1]) == ("Traceback (most recent call last):", "ValueError: bad")
    assert sum("Traceback" in line for line in lines) == 1


def test_a_usage_error_shows_the_scripts_lines_only(
    noted: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CallError) as caught_error:
        TrainingCoordinator(use_gpu=False, max_epochs=3)
    end_script(show_once(caught_error.value))
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("  File")] == [lines[1]]
    assert __file__ in lines[1]
    assert lines[-2:] == ["launcher.core.errors.CallError: the call has 1 problem:",
                          "  max_epochs: give it to train, as max_epochs"]  # fmt: skip


def test_running_out_of_memory_shows_what_to_change_last(
    noted: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "rank 0 is out of memory\n  next: `strategy: ddp`"
    error = OutOfMemoryError(text, expected_bytes=1, allocated_bytes=1, next_strategy="ddp", restarts=False)
    end_script(show_once(caught(error, MemoryError("x"))))
    assert capsys.readouterr().err.splitlines()[-2:] == text.splitlines()
