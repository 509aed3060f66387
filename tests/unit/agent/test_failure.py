from __future__ import annotations

import dataclasses
import json

import pytest

from launcher.agent.failure import RankEnd, account, describe, first_failure, shell_code
from launcher.core.errors import ConfigError, Interrupted, OutOfMemoryError, Problem, TrainingError
from launcher.process.rank_status import RankError

END = RankEnd(rank=0, host="a", exit_code=None, time=0.0, step=7)


def error(*, message: str = "bad", time: float = 1.0, **fields: bool) -> RankError:
    return RankError("ValueError", message, ("Traceback", "ValueError: bad"), "s", time, 7, **fields)


def ended(rank: int, code: int | None, time: float = 1.0, **fields: object) -> RankEnd:
    return dataclasses.replace(END, rank=rank, exit_code=code, time=time, **fields)  # type: ignore[arg-type]


def test_the_earliest_failure_is_the_first() -> None:
    assert first_failure([ended(0, -9, 3.0), ended(1, -11, 2.0), ended(2, None)]) == ended(1, -11, 2.0)
    assert first_failure([ended(0, 0), ended(1, None)]) is None


def test_when_a_rank_raised_counts_more_than_when_it_had_ended() -> None:
    # Rank one raised first, but wrote its words and its W&B run before it ended.
    slow = ended(1, 1, 9.0, error=error(time=1.0))
    assert first_failure([ended(0, -6, 5.0), slow]) is slow


def test_a_lost_peer_is_never_first_where_there_is_another_failure() -> None:
    lost = ended(0, 1, 1.0, error=error(time=1.0, lost_peer=True))
    killed = ended(1, -9, 2.0)
    assert first_failure([lost, killed]) is killed
    assert first_failure([lost, ended(1, None)]) is lost


def test_a_rank_that_kept_the_others_waiting_is_before_their_timeouts() -> None:
    hung = ended(2, None, 0.0, hung=True)
    assert first_failure([ended(0, 1, 1.0, error=error()), hung]) is hung


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (ended(0, -11), "killed by SIGSEGV (signal 11) at step 7"),
        (ended(0, -9, out_of_memory=True), "killed by the kernel because the memory was full (SIGKILL) at step 7"),
        (ended(0, 3, step=-1), "exited with code 3 before the training began"),
        (ended(0, 1, error=error(message="bad\nworse")), "ValueError: bad at step 7"),
        (ended(0, 1, error=error(lost_peer=True)), "lost a peer (ValueError) at step 7"),
        (ended(0, None, doing="in f.py, line 3, in f"), "running at step 7, in f.py, line 3, in f"),
        (ended(0, None, hung=True, doing="asleep"), "hung at step 7: it was asleep"),
        (ended(0, 0), "done at step 7"),
        (ended(0, 255), "lost at step 7: it, or the fork server above it, was killed"),
        (ended(0, -99), "killed by an unknown signal (signal 99) at step 7"),
    ],
)
def test_descriptions(end: RankEnd, words: str) -> None:
    assert describe(end) == words


def test_the_account_has_the_culprit_its_log_the_others_and_the_verdict() -> None:
    first = ended(1, -9, log="/runs/x/logs/rank-1.log", last_lines=("one", "two"))
    assert account(first, [ended(0, None, doing="waiting"), first], "no restart").splitlines() == [
        "error: rank 1 (a) failed first: killed by SIGKILL (signal 9) at step 7",
        "  its last lines (/runs/x/logs/rank-1.log):",
        "    | one",
        "    | two",
        "  rank 0 (a): running at step 7, waiting",
        "  no restart",
    ]


def test_the_traceback_is_shown_where_the_log_does_not_have_it() -> None:
    first = ended(1, 1, error=error(), last_lines=("only this",))
    assert "    | ValueError: bad" in account(first, [first], "").splitlines()
    logged = ended(1, 1, error=error(), last_lines=("x", "ValueError: bad, in the log"))
    assert "    | Traceback" not in account(logged, [logged], "").splitlines()


def test_an_error_that_explains_itself_is_told_as_it_is() -> None:
    first = ended(1, 2, error=error(message="the config has 1 problem:\n  a: b", explained=True, repeats=True))
    assert account(first, [first], "no restart") == "error: the config has 1 problem:\n  a: b"


def test_an_error_that_explains_itself_and_need_not_repeat_has_the_verdict() -> None:
    first = ended(1, 1, error=error(message="rank 1 is out of memory", explained=True))
    assert account(first, [first], "restart with strategy x") == (
        "error: rank 1 is out of memory\n  restart with strategy x"
    )


@pytest.mark.parametrize(("restarts", "following"), [(True, "deepspeed_stage_3"), (False, None)])
def test_out_of_memory_is_told_in_the_plans_words_and_names_what_to_go_on_with(
    restarts: bool, following: str | None
) -> None:
    told = OutOfMemoryError("rank 0 is out of memory with ddp", expected_bytes=1, allocated_bytes=None,
                            next_strategy="deepspeed_stage_3", restarts=restarts)  # fmt: skip
    told.__cause__ = MemoryError("no room")
    described = _raised(told)
    assert described.message == "rank 0 is out of memory with ddp"
    assert (described.explained, described.repeats, described.next_strategy) == (True, False, following)


def test_hundreds_of_ranks_are_one_line() -> None:
    first = ended(0, -9)
    lines = account(first, [first, *(ended(n, None) for n in range(1, 300))], "").splitlines()
    assert "  and 291 more ranks" in lines
    assert len(lines) < 15


def test_exit_codes_as_a_shell_shows_them() -> None:
    assert (shell_code(3), shell_code(-9)) == (3, 137)


def test_records_survive_the_store() -> None:
    end = ended(1, 1, error=error(), last_lines=("a", "b"))
    assert RankEnd.from_dict(json.loads(json.dumps(end.to_dict()))) == end


def _raised(exception: BaseException) -> RankError:
    try:
        raise exception
    except BaseException as caught:  # noqa: BLE001 -- any kind is described
        return RankError.from_exception(caught, 5.0, 3)


def test_errors_are_described_by_their_cause() -> None:
    try:
        try:
            raise ValueError("inner")
        except ValueError as inner:
            raise TrainingError("rank 0: outer") from inner
    except TrainingError as outer:
        told = RankError.from_exception(outer, 5.0, 3)
    assert (told.kind, told.message, told.step) == ("ValueError", "inner", 3)
    assert told.traceback[-1] == "ValueError: inner"


def test_the_signature_is_the_place_and_not_the_words() -> None:
    one, two = (_raised(ValueError(text)) for text in ("1 sample", "2 samples"))
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
def test_what_an_exception_means(
    exception: BaseException, repeats: bool, explained: bool, interrupted: bool, lost: bool
) -> None:
    told = _raised(exception)
    assert (told.repeats, told.explained, told.interrupted, told.lost_peer) == (repeats, explained, interrupted, lost)
