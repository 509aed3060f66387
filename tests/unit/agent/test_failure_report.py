from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest

from launcher.agent.failure_report import (
    RankOutcome,
    describe_outcome,
    find_first_failure,
    find_stop,
    format_failure_report,
    has_failed_at_stop,
    name_failure_reason,
    to_shell_exit_code,
)
from launcher.agent.restart_policy import RestartDecision
from launcher.agent.start_request import print_failure
from launcher.core.errors import ConfigError, Interrupted, OutOfMemoryError, Problem, StorageError, TrainingError
from launcher.process.rank_status import RankError

OUTCOME = RankOutcome(rank=0, host="a", exit_code=None, time=0.0, step=7)


def make_error(*, message: str = "bad", time: float = 1.0, **fields: bool) -> RankError:
    return RankError("ValueError", message, ("Traceback", "ValueError: bad"), "s", time, 7, **fields)


def make_outcome(rank: int, code: int | None, time: float = 1.0, **fields: object) -> RankOutcome:
    return dataclasses.replace(OUTCOME, rank=rank, exit_code=code, time=time, **fields)  # type: ignore[arg-type]


def _describe(exception: BaseException) -> RankError:
    try:
        raise exception
    except BaseException as caught:  # noqa: BLE001 -- any exception is described
        return RankError.from_exception(caught, 5.0, 3)


def test_the_earliest_failure_is_first() -> None:
    earlier = make_outcome(1, -11, 2.0)
    assert find_first_failure([make_outcome(0, -9, 3.0), earlier, make_outcome(2, None)]) is earlier
    assert find_first_failure([make_outcome(0, 0), make_outcome(1, None)]) is None


def test_failures_are_ordered_by_the_time_of_the_exception() -> None:
    # Rank 1 raised first, but finished its W&B run before it ended.
    slow = make_outcome(1, 1, 9.0, error=make_error(time=1.0))
    assert find_first_failure([make_outcome(0, -6, 5.0), slow]) is slow


def test_a_lost_connection_is_first_only_without_another_failure() -> None:
    lost = make_outcome(0, 1, 1.0, error=make_error(time=1.0, lost_peer=True))
    killed = make_outcome(1, -9, 2.0)
    assert find_first_failure([lost, killed]) is killed
    assert find_first_failure([lost, make_outcome(1, None)]) is lost


@pytest.mark.parametrize(
    ("codes", "lost", "has_failed"),
    [((130, 1), {1}, False), ((1, -15), {0}, False), ((129, 0, 1), {2}, False), ((0, 0), (), False),
     ((-9, 131), (), False), ((130, 1), (), True), ((130, 7), (), True), ((1, 1), {0, 1}, True), ((1, -11), {0}, True)],
)  # fmt: skip
def test_a_signal_that_only_some_ranks_obey_has_stopped_them(
    codes: tuple[int, ...], lost: set[int], has_failed: bool
) -> None:
    outcomes = [make_outcome(rank, code, error=make_error(lost_peer=True) if rank in lost else None)
                for rank, code in enumerate(codes)]  # fmt: skip
    assert has_failed_at_stop(outcomes) is has_failed


def test_a_hung_rank_comes_before_the_timeouts_of_the_others() -> None:
    hung = make_outcome(2, None, 0.0, hung=True)
    assert find_first_failure([make_outcome(0, 1, 1.0, error=make_error()), hung]) is hung


TRACEBACK = "Traceback (most recent call last):"


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (make_outcome(0, -11), "killed by SIGSEGV (signal 11) at step 7"),
        (
            make_outcome(0, -9, out_of_memory=True),
            "killed by the kernel because the host ran out of memory (SIGKILL) at step 7",
        ),
        (make_outcome(0, 3, step=-1), "exited with code 3 before training started"),
        (make_outcome(0, 1, error=make_error(message="bad\nworse")), "ValueError: bad at step 7"),
        (make_outcome(0, 1, error=make_error(message="\n\nbad.\n")), "ValueError: bad at step 7"),
        (make_outcome(0, 1, error=make_error(message="  ")), "ValueError at step 7"),
        (
            make_outcome(0, 1, error=make_error(message=f"\n-- Process 0:\n{TRACEBACK}\n  x\nKeyError: 3\n")),
            "ValueError: KeyError: 3 at step 7",
        ),
        (
            make_outcome(0, 1, error=make_error(message=f"Caught ValueError.\nOriginal {TRACEBACK}\nValueError: x")),
            "ValueError: x at step 7",
        ),
        (
            make_outcome(0, 1, error=make_error(lost_peer=True)),
            "lost the connection to another rank (ValueError) at step 7",
        ),
        (make_outcome(0, None, doing="in f.py, line 3, in f"), "running at step 7, in f.py, line 3, in f"),
        (make_outcome(0, None, hung=True, doing="asleep"), "hung at step 7: it was asleep"),
        (
            make_outcome(0, None, error=make_error(lost_peer=True), doing="in linecache.py"),
            "lost the connection to another rank (ValueError) at step 7",
        ),
        (make_outcome(0, 0), "finished at step 7"),
        (make_outcome(0, 255), "ended at step 7 with an unknown exit code: the rank or its fork server was killed"),
        (make_outcome(0, 255, exits=True), "exited with code 255 at step 7"),
        (make_outcome(0, -99), "killed by signal 99 (signal 99) at step 7"),
    ],
)
def test_outcomes_are_described(outcome: RankOutcome, text: str) -> None:
    assert describe_outcome(outcome) == text


def test_the_report_has_the_first_failure_its_log_the_other_ranks_and_the_decision() -> None:
    first = make_outcome(1, -9, log="/runs/x/logs/rank-1.log", last_lines=("one", "two"))
    assert format_failure_report(first, [make_outcome(0, None, doing="waiting"), first], "no restart").splitlines() == [
        "error: rank 1 (a) failed first: killed by SIGKILL (signal 9) at step 7",
        "  its last lines (/runs/x/logs/rank-1.log):",
        "    | one",
        "    | two",
        "  rank 0 (a): running at step 7, waiting",
        "  no restart",
    ]


def test_the_traceback_is_shown_if_the_log_does_not_have_it() -> None:
    first = make_outcome(1, 1, error=make_error(), last_lines=("only this",))
    assert "    | ValueError: bad" in format_failure_report(first, [first], "").splitlines()
    logged = make_outcome(1, 1, error=make_error(), last_lines=("x", "ValueError: bad, in the log"))
    assert "    | Traceback" not in format_failure_report(logged, [logged], "").splitlines()


def test_an_explained_error_is_reported_unchanged() -> None:
    error = make_error(message="the config has 1 problem:\n  a: b", explained=True, repeats=True)
    first = make_outcome(1, 2, error=error)
    assert format_failure_report(first, [first], "no restart") == "error: the config has 1 problem:\n  a: b"


def test_an_explained_error_that_may_not_repeat_is_reported_with_the_decision() -> None:
    first = make_outcome(1, 1, error=make_error(message="rank 1 is out of memory", explained=True))
    assert format_failure_report(first, [first], "restart with strategy x") == (
        "error: rank 1 is out of memory\n  restart with strategy x"
    )


@pytest.mark.parametrize(("restarts", "next_strategy"), [(True, "deepspeed_stage_3"), (False, None)])
def test_an_out_of_memory_error_keeps_its_message_and_next_strategy(restarts: bool, next_strategy: str | None) -> None:
    raised = OutOfMemoryError("rank 0 is out of memory with ddp", expected_bytes=1, allocated_bytes=None,
                            next_strategy="deepspeed_stage_3", restarts=restarts)  # fmt: skip
    raised.__cause__ = MemoryError("no room")
    described = _describe(raised)
    assert described.message == "rank 0 is out of memory with ddp"
    assert (described.explained, described.repeats, described.next_strategy) == (True, False, next_strategy)


def test_hundreds_of_ranks_are_summarized_in_one_line() -> None:
    first = make_outcome(0, -9)
    lines = format_failure_report(first, [first, *(make_outcome(n, None) for n in range(1, 300))], "").splitlines()
    assert "  and 291 more ranks" in lines
    assert len(lines) < 15


def test_exit_codes_are_converted_to_a_shells() -> None:
    assert (to_shell_exit_code(3), to_shell_exit_code(-9)) == (3, 137)


def test_a_full_disk_keeps_its_message_and_reason() -> None:
    raised = StorageError("no space left on /d", reason="disk_full")
    raised.__cause__ = OSError(28, "No space left on device")
    described = _describe(raised)
    assert (described.message, described.storage) == ("no space left on /d", "disk_full")
    assert (described.explained, described.repeats) == (True, True)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (make_outcome(1, -9), "killed"),
        (make_outcome(1, -11), "crashed"),
        (make_outcome(1, 255), "killed"),
        (make_outcome(1, 255, exits=True), "exit"),
        (make_outcome(1, 3), "exit"),
        (make_outcome(1, -9, out_of_memory=True), "out_of_memory"),
        (make_outcome(1, None, hung=True), "hung"),
        (make_outcome(1, 1, error=make_error()), "exception"),
        (make_outcome(1, 2, error=make_error(explained=True)), "usage"),
        (make_outcome(1, 1, error=make_error(lost_peer=True)), "lost_connection"),
        (make_outcome(1, 1, error=_describe(StorageError("x", reason="quota"))), "quota"),
        (make_outcome(1, 143, error=make_error(interrupted=True)), "sigterm"),
    ],
)
def test_a_failure_has_a_reason_in_one_word(outcome: RankOutcome, reason: str) -> None:
    assert name_failure_reason(outcome) == reason


def test_a_stop_of_all_ranks_has_the_checkpoint_that_one_has_saved() -> None:
    saved = _describe(Interrupted(2, checkpoint="/r/last.ckpt", step=9))
    stop = find_stop(2, [make_outcome(0, 130, error=saved), make_outcome(1, 130)], Path("/r"))
    assert (stop.signal_number, stop.step, stop.saved, stop.run) == (2, 9, Path("/r/last.ckpt"), Path("/r"))
    killed = find_stop(2, [make_outcome(0, -9), make_outcome(1, -9)], None, is_second=True)
    assert (killed.step, killed.saved, killed.at_once) == (7, None, True)


def test_outcomes_can_be_stored_as_json() -> None:
    outcome = make_outcome(1, 1, error=make_error(), last_lines=("a", "b"))
    assert RankOutcome.from_dict(json.loads(json.dumps(dataclasses.asdict(outcome)))) == outcome


def test_an_error_is_described_by_its_cause() -> None:
    try:
        try:
            raise ValueError("inner")
        except ValueError as inner:
            raise TrainingError("rank 0: outer") from inner
    except TrainingError as outer:
        described = RankError.from_exception(outer, 5.0, 3)
    assert (described.kind, described.message, described.step) == ("ValueError", "inner", 3)
    assert described.traceback[-1] == "ValueError: inner"


def test_the_signature_depends_on_the_place_and_not_on_the_message() -> None:
    one, two = (_describe(ValueError(text)) for text in ("1 sample", "2 samples"))
    assert one.signature == two.signature
    assert one.signature != RankError.from_exception(ValueError("elsewhere"), 5.0, 3).signature


@pytest.mark.parametrize(
    ("exception", "repeats", "explained", "interrupted", "lost"),
    [
        (ValueError("x"), False, False, False, False),
        (ModuleNotFoundError("x"), True, False, False, False),
        (SyntaxError("x"), True, False, False, False),
        (ConfigError([Problem("a", "b")]), True, True, False, False),
        (Interrupted(15, checkpoint=None, step=3), False, False, True, False),
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1"), False, False, False, True),
        (RuntimeError("Connection reset by peer"), False, False, False, True),
    ],
)
def test_exceptions_are_classified(
    exception: BaseException, repeats: bool, explained: bool, interrupted: bool, lost: bool
) -> None:
    found = _describe(exception)
    assert (found.repeats, found.explained) == (repeats, explained)
    assert (found.interrupted, found.lost_peer) == (interrupted, lost)


def test_a_report_on_a_terminal_is_wrapped_at_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "run 'first' exists already at /data/runs/first; " + "resume_from_checkpoint='auto' continues it; " * 4
    first = make_outcome(0, 2, error=make_error(message=message, repeats=True, explained=True))
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb") as screen:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        monkeypatch.setattr(sys, "stderr", terminal)
        print_failure(first, [first], RestartDecision(False, ""))
        lines = screen.read1().decode().splitlines()
    assert max(map(len, lines)) < 80
    assert " ".join(line.strip() for line in lines) == f"error: {message}".strip()
