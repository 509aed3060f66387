"""For any sequence of events, the parts of the goodput ledger are not negative and sum up to the total exactly."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.core.event_kinds import EVENT_KINDS
from launcher.runs.event_clock import EventClock
from launcher.runs.goodput import KINDS
from launcher.runs.ledger_reader import LedgerReader

START = 1_700_000_000.0
_SECONDS = st.floats(0, 500) | st.sampled_from([0.0, -5.0, float("nan"), "3", None, True])
_TIMES = st.floats(START - 1000, START + 3000) | st.sampled_from([None, "now", -1.0, 0.0, float("inf")])
_STEPS = st.integers(-2, 60) | st.sampled_from([None, "5", 2.5, True])
_FIELDS: dict[str, Any] = {
    "step": _STEPS,
    "spent": st.dictionaries(st.sampled_from(["step", "data", "validation", "checkpoint", "x"]), _SECONDS) | st.none(),
    "times": st.dictionaries(st.sampled_from(["submitted", "job", "launched", "process", "agreement"]), _TIMES),
    "restart_count": st.integers(0, 3) | st.none(),
    "restart": st.booleans() | st.none(),
    "hung": st.booleans(),
    "last_sign": _TIMES,
    "seconds": _SECONDS,
    "reason": st.sampled_from(["killed", None, 7]),
    "others": st.lists(st.fixed_dictionaries({"step": _STEPS})) | st.just([1]),
}
_KINDS = st.sampled_from(sorted(EVENT_KINDS)) | st.sampled_from(
    ["run_started", "training_started", "first_step", "step", "step", "rank_failed", "failed", "finished"]
)


@st.composite
def _events(draw: st.DrawFn) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    now = START
    for kind in [*draw(st.sampled_from([["run_started"], ["notice"], []])), *draw(st.lists(_KINDS, max_size=16))]:
        # Mostly forward; a clock may be set back, and ranks write in any order.
        now += draw(st.floats(0, 60) | st.sampled_from([0.0, -0.3, -5.0, -3600.0]))
        names = draw(st.sets(st.sampled_from(sorted(_FIELDS)))) | {"spent", "step", "times"}
        fields = {name: draw(_FIELDS[name]) for name in sorted(names)}
        found.append({"time": now, "rank": draw(st.integers(0, 2)), "kind": kind, **fields})
    return found


@settings(max_examples=150, deadline=None)
@given(_events())
def test_the_parts_are_not_negative_and_sum_up_to_the_total(events: list[dict[str, Any]]) -> None:
    reader, clock = LedgerReader(), EventClock()
    before = 0
    for each in events:
        reader.add(each)
        if each["kind"] not in ("evaluated", "nodes_missing"):
            clock.add(each)
        ledger = reader.ledger()
        if ledger is None:
            continue
        assert list(ledger.microseconds) == list(KINDS)
        assert min(ledger.microseconds.values()) >= 0
        total = sum(ledger.microseconds.values())
        assert total == clock.now - reader.began
        assert total >= before
        before = total
        assert ledger.ratio is None or 0 <= ledger.ratio <= 1
        for failure in ledger.failures:
            assert min(failure.detection, failure.restart, failure.redone, failure.redone_steps) >= 0
        for kind in ("detection", "restart", "redone"):
            assert sum(getattr(failure, kind) for failure in ledger.failures) <= ledger.microseconds[kind]


@settings(max_examples=30, deadline=None)
@given(_events())
def test_the_ledger_depends_on_the_events_alone(events: list[dict[str, Any]]) -> None:
    assert LedgerReader(events).ledger() == LedgerReader(events).ledger()
