"""The goodput ledger of made-up runs: every second has one kind, and each failure its cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from launcher.runs.goodput import Ledger
from launcher.runs.ledger_reader import LedgerReader

T = 1_700_000_000.0


def event(kind: str, at: float, **fields: Any) -> dict[str, Any]:
    return {"time": T + at, "rank": 0, "kind": kind, **fields}


def start(at: float, *, count: int = 0, **times: float) -> dict[str, Any]:
    return event("run_started", at, restart_count=count, times={name: T + when for name, when in times.items()})


def spent(step: float = 0, data: float = 0, validation: float = 0, checkpoint: float = 0) -> dict[str, float]:
    return {"step": step, "data": data, "validation": validation, "checkpoint": checkpoint}


def read(events: list[dict[str, Any]]) -> Ledger:
    ledger = LedgerReader(events).ledger()
    assert ledger is not None
    return ledger


def parts(events: list[dict[str, Any]]) -> Mapping[str, float]:
    ledger = read(events)
    assert sum(ledger.microseconds.values()) == round(ledger.total * 1e6)
    return {kind: ledger.seconds(kind) for kind, amount in ledger.microseconds.items() if amount}


# Launched at 0, agreement from 4 to 5, training from 7; the first step ends at 9, with 0.5 s of data.
BEGIN = [
    start(5, launched=0, process=1, agreement=4),
    event("training_started", 7, step=0),
    event("first_step", 9, step=1, spent=spent(1, 0.5)),
]
# Ten more steps of 0.9 s, each with 0.1 s of data, until 19.
STEPS = [*BEGIN, event("step", 19, step=11, spent=spent(9, 1.5))]
BEGUN = {"start": 6.0, "agreement": 1.0, "first_step": 1.5}


def test_a_run_without_faults() -> None:
    events = [
        *STEPS,
        event("checkpoint", 19.5, step=11, spent=spent(9, 1.5, 0, 0.5)),
        event("validation", 22.5, step=11, spent=spent(9, 1.5, 3, 0.5)),
        event("training_ended", 23, step=11),
        event("time_spent", 24, step=11, spent=spent(9, 1.5, 3, 1.5)),
        event("finished", 25, step=11),
    ]
    ledger = read(events)
    assert parts(events) == {**BEGUN, "productive": 8, "data": 1.5, "validation": 3, "checkpoint": 1.5, "other": 2.5}
    assert (ledger.total, ledger.active, ledger.ratio, ledger.failures) == (25, 25, 8 / 25, ())


def test_a_killed_rank_costs_detection_restart_and_the_steps_done_again() -> None:
    events = [
        *STEPS,
        # Three more steps of 1 s, and half of the next one; reported 0.2 s later.
        event("rank_failed", 22.7, rank=1, step=14, restart=True, reason="killed", last_sign=T + 22.5,
              others=[{"rank": 0, "step": 14}]),
        start(25, count=1, launched=0, process=23, agreement=24),
        event("training_started", 26.7, step=10),
        event("first_step", 28.7, step=11, spent=spent(1.5, 0.5)),
        event("step", 38.7, step=21, spent=spent(10.5, 1.5)),
    ]  # fmt: skip
    found = parts(events)
    # Without the events of the second attempt's first step, its time is known from the first attempt.
    assert found["detection"] == pytest.approx(0.2)
    assert found["restart"] == pytest.approx(4)
    assert found["redone"] == pytest.approx(3)  # 3 of 10 steps with their data; the 4th was the first step
    assert found["first_step"] == pytest.approx(1.5 + 1.5)
    (failure,) = read(events).failures
    assert (failure.attempt, failure.rank, failure.reason, failure.redone_steps) == (1, 1, "killed", 4)
    assert failure.seconds == pytest.approx(0.2 + 4 + 3)
    assert sum(found.values()) == pytest.approx(38.7)


def test_without_lost_steps_nothing_is_done_again() -> None:
    events = [
        *STEPS,
        event("rank_failed", 19.2, rank=1, step=11, restart=True, reason="killed", last_sign=T + 19),
        start(20, count=1, launched=0, process=1, agreement=19.5),
        event("resumed", 20, checkpoint=None, step=11),
        event("training_started", 20.2, step=11),
        event("first_step", 21.2, step=12, spent=spent(1)),
        event("step", 31.2, step=22, spent=spent(11)),
    ]
    found = parts(events)
    assert "redone" not in found
    assert found["restart"] == pytest.approx(1)
    assert read(events).failures[0].redone_steps == 0


def test_a_hang_is_lost_from_the_last_step_on() -> None:
    events = [
        *STEPS,
        event("hang", 119, seconds=100.0, waiting_for=[1]),
        event("rank_failed", 120, rank=1, step=11, restart=False, hung=True, reason="hung"),
    ]
    assert parts(events)["detection"] == pytest.approx(101)
    assert parts(events)["productive"] == pytest.approx(8)


@pytest.mark.parametrize("end", [
    event("interrupted", 20, step=11, signal=15),
    event("finished", 20, step=11),
    event("rank_failed", 20, rank=1, step=11, restart=False, reason="exception", last_sign=T + 20),
])  # fmt: skip
def test_the_time_until_a_user_resumes_is_not_part_of_the_ratio(end: dict[str, Any]) -> None:
    events = [
        *STEPS,
        event("time_spent", 19, step=11, spent=spent(9, 1.5)),
        end,
        start(1005, launched=1000, process=1000, agreement=1004),
        event("training_started", 1006, step=11),
    ]
    ledger = read(events)
    assert ledger.seconds("stopped") == pytest.approx(980)
    assert ledger.active == pytest.approx(26)
    assert ledger.seconds("start") == pytest.approx(6 + 5)
    assert ledger.seconds("restart") == 0


def test_a_job_waits_in_the_queue_before_its_start_and_after_a_requeue() -> None:
    events = [
        start(105, submitted=0, job=100, launched=101, process=102, agreement=104),
        event("training_started", 106, step=0),
        event("first_step", 107, step=1, spent=spent(1)),
        event("interrupted", 107, step=1, signal=12),
        start(147, count=1, submitted=0, job=140, launched=141, process=142, agreement=145),
        event("training_started", 148, step=1),
    ]
    assert parts(events) == {"queue": 133, "start": 11, "agreement": 3, "first_step": 1}
    # A new submission: from the end of the run to it, the run was stopped.
    events[4] = start(147, submitted=120, job=140, launched=141, process=142, agreement=145)
    assert parts(events) == {"queue": 120, "stopped": 13, "start": 11, "agreement": 3, "first_step": 1}


def test_a_restart_by_torchrun_has_no_report_of_the_failure() -> None:
    events = [
        *STEPS,
        start(25, count=1, launched=0, process=21, agreement=24),
        event("training_started", 26, step=11),
    ]
    ledger = read(events)
    assert (ledger.seconds("detection"), ledger.seconds("restart")) == (2, 5)
    assert [failure.reason for failure in ledger.failures] == ["unreported"]


def test_a_killed_attempt_that_validated_loses_its_last_interval_by_the_means() -> None:
    events = [
        *STEPS,
        event("validation", 24, step=11, spent=spent(9, 1.5, 5)),
        event("step", 34, step=21, spent=spent(17, 3.5, 5)),
        # Two steps of 1 s, and 4 s of another validation.
        event("rank_failed", 40, rank=0, step=23, restart=False, reason="killed", last_sign=T + 40),
    ]
    found = parts(events)
    assert found["validation"] == pytest.approx(9)
    assert found["productive"] + found["data"] + found.get("other", 0) == pytest.approx(20 + 2 + 0.5)


def test_failed_and_then_reported_by_the_agent_is_one_failure() -> None:
    events = [
        *STEPS,
        {**event("failed", 19.5, step=11, reason="exception"), "rank": 1},
        event("rank_failed", 20, rank=1, step=11, restart=False, reason="exception", last_sign=T + 19),
    ]
    assert [failure.reason for failure in read(events).failures] == ["exception"]
    assert read(events[:-1]).failures[0].rank == 1


def test_a_clock_that_is_set_back_loses_no_time() -> None:
    events = [*BEGIN, event("step", 19 - 3600, step=11, spent=spent(9, 1.5)),
              event("step", 29 - 3600, step=21, spent=spent(17, 2.5))]  # fmt: skip
    assert read(events).total == pytest.approx(9 + 10)
    assert parts(events)["productive"] > 7


def test_older_versions_and_empty_runs_have_no_ledger() -> None:
    assert LedgerReader().ledger() is None
    assert LedgerReader([event("run_started", 0, restart_count=0)]).ledger() is None
    old = [start(0, launched=0), event("training_started", 1, step=0), event("first_step", 2, step=1)]
    assert LedgerReader(old).ledger() is None
    # A resume by this version does not make the first part known.
    assert LedgerReader([event("run_started", 0), *STEPS]).ledger() is None


def test_an_evaluation_and_lost_nodes_do_not_make_the_run_longer() -> None:
    events = [*STEPS, event("finished", 20, step=11), event("evaluated", 900), event("nodes_missing", 950, nodes=[1])]
    assert read(events).total == 20


def test_reading_the_ledger_does_not_change_it() -> None:
    reader = LedgerReader(STEPS)
    assert reader.ledger() == reader.ledger()
    reader.add(event("step", 29, step=21, spent=spent(17, 3.5)))
    assert reader.ledger() == LedgerReader([*STEPS, event("step", 29, step=21, spent=spent(17, 3.5))]).ledger()
