from __future__ import annotations

import dataclasses

import pytest

from launcher.agent.failure import RankEnd
from launcher.agent.restart_policy import decide
from tests.unit.agent.test_failure import END, ended, error


def _decide(failure: RankEnd, *earlier: tuple[float, RankEnd], limit: int = 3, now: float = 100.0) -> tuple[bool, str]:
    verdict = decide(failure, earlier, now, limit, 60.0)
    return verdict.restart, verdict.reason


KILLED = ended(1, -9)


def test_a_killed_rank_is_replaced_up_to_the_limit() -> None:
    assert _decide(KILLED) == (True, "restart 1 of 3, from the last checkpoint")
    check_missing_checkpoint = decide(KILLED, (), 100.0, 3, 60.0, has_checkpoint=False)
    assert check_missing_checkpoint.reason == "restart 1 of 3; no checkpoint was saved yet"
    assert _decide(KILLED, (99.0, KILLED), (99.5, KILLED))[0]
    assert _decide(KILLED, *[(99.0, KILLED)] * 3) == (False, "no restart: 3 of 3 restarts were used in the last 60 s")
    assert _decide(KILLED, limit=0) == (False, "no restart: --max-restarts is 0")


def test_out_of_memory_goes_on_with_the_next_strategy_without_using_a_restart_up() -> None:
    verdict = decide(KILLED, [(99.0, KILLED)], 100.0, 0, 60.0, "deepspeed_stage_3")
    assert (verdict.restart, verdict.strategy) == (True, "deepspeed_stage_3")
    assert verdict.reason == "restart with strategy deepspeed_stage_3, from the last checkpoint"
    assert decide(KILLED, (), 100.0, 1, 60.0).strategy is None


def test_restarts_out_of_the_window_are_forgiven() -> None:
    assert _decide(KILLED, *[(30.0, KILLED)] * 3)[0]
    assert not _decide(KILLED, *[(41.0, KILLED)] * 3)[0]


@pytest.mark.parametrize(
    "failure",
    [ended(0, 2), ended(0, 1, error=error(repeats=True))],
    ids=["usage", "import error"],
)
def test_what_repeats_is_not_tried_again(failure: RankEnd) -> None:
    restart, reason = _decide(failure)
    assert not restart
    assert "would repeat" in reason


def test_a_rank_that_was_asked_to_stop_is_not_started_again() -> None:
    assert not _decide(ended(0, 143, error=error(interrupted=True)))[0]


@pytest.mark.parametrize(
    "failure",
    [ended(1, 1, error=error()), ended(1, -11), ended(1, 3), ended(1, None, hung=True)],
    ids=["exception", "segfault", "exit code", "hang"],
)
def test_the_same_end_twice_at_the_same_step_is_enough(failure: RankEnd) -> None:
    restart, reason = _decide(failure, (99.0, failure))
    assert not restart
    assert "ended in the same way" in reason
    # Further on it is another event, and so is the same end with something else in between.
    assert _decide(dataclasses.replace(failure, step=8), (99.0, failure))[0]
    assert _decide(failure, (98.0, failure), (99.0, KILLED))[0]


@pytest.mark.parametrize(
    "failure",
    [KILLED, ended(1, -15), ended(1, 1, error=error(lost_peer=True)), END],
    ids=["killed", "terminated", "lost peer", "unknown"],
)
def test_what_came_from_outside_may_be_over(failure: RankEnd) -> None:
    assert _decide(failure, (99.0, failure))[0]


def test_the_same_exit_code_of_another_rank_is_no_repetition() -> None:
    assert _decide(ended(1, 3), (99.0, ended(2, 3)))[0]
