from __future__ import annotations

import dataclasses

import pytest

from launcher.agent.failure_report import RankOutcome
from launcher.agent.restart_policy import RestartHistory, decide_restart
from launcher.core.errors import StorageError
from launcher.process.rank_status import RankError
from tests.unit.agent.test_failure_report import OUTCOME, make_error, make_outcome


def _decide(failure: RankOutcome, *earlier: tuple[float, RankOutcome], limit: int = 3) -> tuple[bool, str]:
    decision = decide_restart(failure, RestartHistory(limit, 60.0, earlier, now=100.0), source=", from a checkpoint")
    return decision.restart, decision.reason


KILLED = make_outcome(1, -9)


def test_a_killed_rank_restarts_up_to_the_limit() -> None:
    assert _decide(KILLED) == (True, "restart 1 of 3, from a checkpoint")
    assert _decide(KILLED, (99.0, KILLED), (99.5, KILLED))[0]
    assert _decide(KILLED, *[(99.0, KILLED)] * 3) == (False, "no restart: 3 of 3 restarts were used in the last 60 s")
    assert _decide(KILLED, limit=0) == (False, "no restart: --max-restarts is 0")


def test_a_restart_with_the_next_strategy_does_not_count() -> None:
    history = RestartHistory(0, 60.0, ((99.0, KILLED),), 100.0)
    decision = decide_restart(KILLED, history, "deepspeed_stage_3", source=", from the last checkpoint")
    assert (decision.restart, decision.strategy) == (True, "deepspeed_stage_3")
    assert decision.reason == "restart with strategy deepspeed_stage_3, from the last checkpoint"
    assert decide_restart(KILLED, RestartHistory(1, 60.0)).strategy is None


def test_restarts_outside_the_window_do_not_count() -> None:
    assert _decide(KILLED, *[(30.0, KILLED)] * 3)[0]
    assert not _decide(KILLED, *[(41.0, KILLED)] * 3)[0]


@pytest.mark.parametrize(
    "failure",
    [make_outcome(0, 2), make_outcome(0, 1, error=make_error(repeats=True))],
    ids=["usage", "import make_error"],
)
def test_an_error_that_would_repeat_causes_no_restart(failure: RankOutcome) -> None:
    restart, reason = _decide(failure)
    assert not restart
    assert "would repeat" in reason


@pytest.mark.parametrize(
    ("reason", "text"),
    [("disk_full", "the disk is full"), ("quota", "quota"), ("read_only", "read-only"), ("no_permission", "writable")],
)
def test_a_disk_that_cannot_be_written_causes_no_restart(reason: str, text: str) -> None:
    raised = StorageError("no space left", reason=reason)
    failure = make_outcome(0, 1, error=RankError.from_exception(raised, 1.0, 7))
    restart, verdict = _decide(failure)
    assert not restart
    assert verdict.startswith("no restart: ")
    assert text in verdict


def test_an_interrupted_rank_does_not_restart() -> None:
    assert not _decide(make_outcome(0, 143, error=make_error(interrupted=True)))[0]


@pytest.mark.parametrize(
    "failure",
    [
        make_outcome(1, 1, error=make_error()),
        make_outcome(1, -11),
        make_outcome(1, 3),
        make_outcome(1, None, hung=True),
    ],
    ids=["exception", "segfault", "exit code", "hang"],
)
def test_the_same_failure_twice_at_the_same_step_causes_no_restart(failure: RankOutcome) -> None:
    restart, reason = _decide(failure, (99.0, failure))
    assert not restart
    assert "failed in the same way" in reason
    # A failure at a later step, or after a different failure, restarts.
    assert _decide(dataclasses.replace(failure, step=8), (99.0, failure))[0]
    assert _decide(failure, (98.0, failure), (99.0, KILLED))[0]


@pytest.mark.parametrize(
    "failure",
    [KILLED, make_outcome(1, -15), make_outcome(1, 1, error=make_error(lost_peer=True)), OUTCOME],
    ids=["killed", "terminated", "lost peer", "unknown"],
)
def test_a_repeated_failure_from_outside_restarts(failure: RankOutcome) -> None:
    assert _decide(failure, (99.0, failure))[0]


def test_the_same_exit_code_of_another_rank_is_not_a_repetition() -> None:
    assert _decide(make_outcome(1, 3), (99.0, make_outcome(2, 3)))[0]
