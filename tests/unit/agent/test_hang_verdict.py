from __future__ import annotations

import dataclasses
import itertools
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.agent.flight_recorder import Collective, FlightRecord
from launcher.agent.hang_detection import RankState
from launcher.agent.hang_verdict import HangRules, describe_verdict, find_limit, judge
from launcher.agent.phase_tracker import PhaseTracker
from launcher.process.heartbeat import Heartbeat
from launcher.process.phases import Phase

RULES = HangRules()
IN_COLLECTIVE = """Current thread 0x02 (most recent call first):
  File "/site-packages/torch/autograd/graph.py", line 979 in _engine_run_backward
  File "/home/me/model.py", line 12 in training_step
"""
OWN = """Current thread 0x02 (most recent call first):
  File "/home/me/model.py", line 5 in fetch
  File "/home/me/model.py", line 12 in training_step
"""
COMPILING = """Current thread 0x02 (most recent call first):
  File "/site-packages/torch/_inductor/async_compile.py", line 5 in wait
  File "/home/me/model.py", line 12 in training_step
"""
LOADING = """Current thread 0x02 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/site-packages/torch/utils/data/dataloader.py", line 1251 in _try_get_data
"""


def _state(age: float, phase: Phase = Phase.STEP, stacks: str = OWN, **changes: object) -> RankState:
    state = RankState(Heartbeat(7, 1.0, 41, True, phase, 9), stacks=stacks, age=age, usual=0.02, limit=14.0)
    return dataclasses.replace(state, **changes)


def _waiting(age: float, number: int = 5, operation: str = "all_reduce", earlier: int = 40) -> RankState:
    one = Collective("default_pg", number, operation, ((97,),), ("Float",))
    record = FlightRecord({"default_pg": number}, (one,), {"default_pg": (0, 1, 2)}, {one.kind: earlier})
    return _state(age, stacks=IN_COLLECTIVE, flight_record=record)


def _idle(age: float, **changes: object) -> RankState:
    return _state(age, flight_record=FlightRecord({"default_pg": 4}), **changes)


def test_the_limit_grows_with_what_a_phase_usually_takes() -> None:
    assert find_limit([0.02] * 9, 0.0, RULES).seconds == RULES.shortest
    assert find_limit([4.0] * 9, 0.0, RULES).seconds == 40.0
    assert find_limit([4.0] * 9, 0.0, RULES).usual == 4.0
    assert find_limit([0.02] * 9, 30.0, RULES).seconds == 60.0, "it has taken 30 seconds before"
    assert find_limit([0.02] * 2, 0.0, RULES).seconds == RULES.unknown
    assert find_limit([], 900.0, RULES).seconds == 1800.0
    assert find_limit([], 0.0, RULES).usual is None


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_rank_that_others_wait_for_is_named_once_it_is_over_its_own_limit(phase: Phase, ranks: int) -> None:
    for culprit in range(ranks):
        states = {rank: _waiting(20.0) for rank in range(ranks)}
        for age, found in ((13.0, None), (15.0, [culprit])):
            verdict = judge({**states, culprit: _idle(age, heartbeat=Heartbeat(7, 1.0, 4, True, phase, 9))}, RULES)
            assert (None if verdict is None else verdict.named) == found


def test_a_rank_that_works_is_given_more_time() -> None:
    for age, changes in itertools.product((20.0, 599.0), ({"is_busy": True}, {"stacks": COMPILING})):
        assert judge({0: _waiting(age), 1: _idle(age, **changes)}, RULES) is None
    for changes in ({"is_busy": True}, {"stacks": COMPILING}):
        assert judge({0: _waiting(601.0), 1: _idle(601.0, **changes)}, RULES) is not None
    unknown = {"limit": RULES.unknown, "usual": None, "is_busy": True}
    assert judge({0: _waiting(700.0), 1: _idle(700.0, **unknown)}, RULES) is None


def test_a_stopped_rank_is_named_in_any_phase() -> None:
    stopped = _state(15.0, Phase.EVALUATION_END, limit=600.0, usual=None, process_status="stopped")
    assert judge({0: _waiting(15.0), 1: stopped}, RULES).named == [1]
    assert judge({0: _waiting(5.0), 1: dataclasses.replace(stopped, age=5.0)}, RULES) is None


def test_a_rank_in_another_collective_is_named_in_any_phase() -> None:
    usual = _waiting(15.0)
    other = dataclasses.replace(_waiting(15.0, 5, "all_gather", 0), limit=600.0)
    assert judge({0: usual, 1: other, 2: usual}, RULES).named == [1]
    assert judge({0: usual, 1: other}, RULES).named == [1], "its collective was never seen before"
    further = FlightRecord({"default_pg": 6}, (*other.flight_record.waiting, *_waiting(1.0, 6).flight_record.waiting))
    assert judge({0: usual, 1: dataclasses.replace(other, flight_record=further)}, RULES).named == [1]
    same = dataclasses.replace(_waiting(15.0, 5, "all_gather", 40), limit=600.0)
    assert judge({0: usual, 1: same}, RULES).named == [0, 1]


def test_without_a_rank_that_stands_out_all_must_be_over_their_limits() -> None:
    assert judge({rank: _waiting(15.0) for rank in range(3)}, RULES).behind == {}
    patient = dataclasses.replace(_waiting(15.0), limit=600.0)
    assert judge({0: _waiting(15.0), 1: _waiting(15.0), 2: patient}, RULES) is None
    assert judge({0: _state(15.0), 1: _state(15.0)}, RULES).behind == {}
    assert judge({0: _state(15.0), 1: _state(2.0)}, RULES) is None


def test_the_notice_is_one_line_with_phase_ranks_position_and_cause() -> None:
    slow = _idle(17.0, waits_for="sleeping")
    verdict = judge({0: _waiting(16.0), 1: slow, 2: _waiting(16.0)}, RULES)
    assert describe_verdict(verdict) == (
        "possible hang: 17 s in phase 'step' after step 7, usually 20 ms; rank 1 is sleeping in /home/me/model.py, "
        "line 5, in fetch; it did not enter all_reduce of [97] Float (number 5 of default_pg), in which ranks 0, 2 "
        "wait; nothing is ended"
    )
    assert verdict.to_event() == {
        "phase": "step", "seconds": 17.0, "usual": 0.02, "step": 7, "ranks": [1], "waiting": [0, 2],
        "waits_for": {1: "sleeping"},
        "frames": {1: ["/home/me/model.py, line 5, in fetch", "/home/me/model.py, line 12, in training_step"]},
        "collective": "all_reduce of [97] Float (number 5 of default_pg)", "message": describe_verdict(verdict),
    }  # fmt: skip
    loading = _idle(17.0, stacks=LOADING, waits_for="waiting for its loader workers")
    assert "in phase 'data'" in describe_verdict(judge({0: _waiting(16.0), 1: loading}, RULES))
    assert "; no report from node 3; " in describe_verdict(judge({0: _waiting(16.0), 1: slow}, RULES, [3]))


def _follow(durations: list[tuple[int, float]]) -> list[float]:
    """Ages over the limit, as the agent finds them, of one rank whose phases take these seconds."""
    tracker, clock, over = PhaseTracker(0.0), 0.0, []
    history: dict[int, list[float]] = {}
    for move, (phase, seconds) in enumerate(durations, start=1):
        end = clock + seconds
        while clock < end:
            tracker.update(clock, {0: Heartbeat(1, clock, 0, True, phase, move)})
            age = tracker.ages()[0]
            limit = find_limit(history.get(phase, [])[-32:], tracker.longest(phase), RULES).seconds
            if age > limit:
                over.append(age)
            clock += min(0.4, max(end - clock, 0.001))
        clock = end
        history.setdefault(phase, []).append(seconds)
    return over


PHASES = st.tuples(st.sampled_from([Phase.STEP, Phase.BETWEEN_STEPS, Phase.CHECKPOINT]), st.floats(0.01, 80.0))


@given(st.lists(PHASES, max_size=40))
def test_no_sequence_within_the_rule_is_over_its_limit(wanted: list[tuple[int, float]]) -> None:
    history: dict[int, list[float]] = {}
    allowed: list[tuple[int, float]] = []
    for phase, seconds in wanted:
        known = history.setdefault(phase, [])
        limit = RULES.unknown if len(known) < RULES.known_after else max(
            RULES.shortest, RULES.factor * statistics.median(known[-32:]))  # fmt: skip
        known.append(min(seconds, limit))
        allowed.append((phase, known[-1]))
    assert _follow(allowed) == []


def test_the_same_slow_phase_gives_no_second_notice() -> None:
    steps = [(Phase.STEP, 0.1)] * 20
    assert _follow([*steps, (Phase.STEP, 30.0)])
    once = _follow([*steps, (Phase.STEP, 30.0), *steps, (Phase.STEP, 50.0), *steps, (Phase.STEP, 90.0)])
    assert max(once) <= 30.0


def test_time_in_which_the_agent_was_stopped_too_does_not_count() -> None:
    tracker = PhaseTracker(0.0)
    beat = {0: Heartbeat(1, 0.0, 0, True, Phase.STEP, 5)}
    tracker.update(1.0, beat)
    tracker.update(3600.0, beat)
    assert tracker.ages() == {0: 2.0}
    tracker.update(3600.4, {0: Heartbeat(1, 0.0, 0, True, Phase.STEP, 6)})
    assert tracker.longest(Phase.STEP) < 3.0


def test_code_without_phases_and_ended_trainings_are_not_watched() -> None:
    tracker = PhaseTracker(0.0)
    tracker.update(1.0, {0: Heartbeat(-2, 0.0, 0, True), 1: None, 2: Heartbeat(9, 0.0, 0, True, Phase.ENDED, 7)})
    assert tracker.ages() == {}
