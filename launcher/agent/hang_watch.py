"""Watches the ranks' phases and gives an early verdict on a possible hang; every look returns at once.

One node decides alone. Of several nodes, each one that suspects a hang announces it in the store, every node then
publishes the states of its ranks, and node 0 decides about all of them.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from launcher.agent.hang_detection import RankState
from launcher.agent.hang_verdict import HangRules, HangVerdict, find_limit, judge
from launcher.agent.node_exchange import NodeExchange
from launcher.agent.phase_tracker import PhaseTracker
from launcher.agent.rank_activity import Usage, is_stopped, read_usage
from launcher.agent.rank_inspector import RankInspector
from launcher.agent.state_request import RankProcess, StateRequest

# For tests: the shortest limit in seconds.
SHORTEST_VARIABLE = "LAUNCHER_HANG_NOTICE_SECONDS"
_INTERVAL = 0.4
# Evidence is collected so many seconds before the limit, for a verdict at the limit.
_EARLY = 2.5
# Seconds of the measurement whether a rank is busy, and the longest wait for stacks and flight records.
_MEASURED = 1.5
_ANSWER_TIMEOUT = 2.5
# Seconds that other nodes have to publish their ranks.
_NODES_TIMEOUT = 8.0
# Seconds until the next look at ranks that may only be slow; doubled each time.
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 120.0


@dataclass(slots=True)
class _Case:
    """One suspicion: what was requested of this node's ranks, and when."""

    began: float
    request: StateRequest
    usages: Mapping[int, Usage]
    moves: Mapping[int, int]
    is_own: bool  # rather than of another node
    published: float | None = None
    states: dict[int, RankState] = field(default_factory=dict[int, RankState])


@dataclass(frozen=True, slots=True)
class HangOver:
    """A rank that an early verdict has named goes on after `seconds` in its phase."""

    verdict: HangVerdict
    seconds: float

    @property
    def message(self) -> str:
        """One line for the user."""
        named = ", ".join(map(str, self.verdict.named[:8]))
        return f"no hang: rank {named} went on after {self.seconds:.0f} s; the same phase is reported later from now on"


def rules_from_env(env: Mapping[str, str]) -> HangRules:
    """The rules; a test may shorten the limits."""
    shortest = env.get(SHORTEST_VARIABLE)
    return HangRules() if shortest is None else HangRules(shortest=float(shortest))


class HangWatch:
    """The watch of one attempt; `exchange` reaches the other nodes, None if there is one node."""

    def __init__(
        self,
        inspector: RankInspector,
        exchange: NodeExchange | None,
        rules: HangRules | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inspector = inspector
        self._exchange = exchange
        self._rules = rules_from_env(os.environ) if rules is None else rules
        self._clock = clock
        self._tracker = PhaseTracker(clock())
        self._next = 0.0
        self._pause = _FIRST_PAUSE
        self._paused_until = 0.0
        self._case: _Case | None = None
        self._number = 0
        self._reported: tuple[HangVerdict, Mapping[int, int]] | None = None

    def look(self, ranks: Mapping[int, RankProcess]) -> HangVerdict | HangOver | None:
        """Look at the running ranks once; returns what to report."""
        now = self._clock()
        if now < self._next:
            return None
        self._next = now + _INTERVAL
        running = {rank: process for rank, process in ranks.items() if process.exit_code is None}
        self._tracker.update(now, {rank: self._inspector.read_heartbeat(rank) for rank in running})
        if self._reported is not None:
            return self._look_for_end(*self._reported)
        if self._case is not None:
            return self._continue(self._case, running, now)
        if now >= self._paused_until and self._suspects(running):
            self._begin(running, now, is_own=True)
            if self._exchange is not None:
                self._exchange.announce_suspicion(self._number)
        elif self._exchange is not None and self._exchange.has_suspicion(self._number, now):
            self._begin(running, now, is_own=False)
        return None

    def _suspects(self, running: Mapping[int, RankProcess]) -> bool:
        """Whether a rank will soon be over its limit, or is stopped."""
        shortest = self._rules.shortest
        old = {rank: age for rank, age in self._tracker.ages().items() if age > shortest - _early(shortest)}
        if not old:
            self._pause = _FIRST_PAUSE
        return any(
            age > (limit := self._limit(rank, self._tracker.phase(rank))[0]) - _early(limit)
            or is_stopped(running[rank].pid)
            for rank, age in old.items()
        )

    def _limit(self, rank: int, phase: int) -> tuple[float, float | None]:
        durations = self._inspector.read_durations(rank, phase)
        found = find_limit(durations, self._tracker.longest(phase), self._rules)
        return found.seconds, found.usual

    def _begin(self, running: Mapping[int, RankProcess], now: float, *, is_own: bool) -> None:
        request = self._inspector.request_states(running)
        request.request_flight_records()
        usages = {rank: read_usage(process.pid) for rank, process in running.items()}
        self._case = _Case(now, request, usages, self._tracker.moves(), is_own)

    def _continue(self, case: _Case, running: Mapping[int, RankProcess], now: float) -> HangVerdict | None:
        if case.published is not None:
            return self._await_nodes(case, now)
        seconds = now - case.began
        if seconds < _MEASURED or (
            seconds < _ANSWER_TIMEOUT and not (case.request.has_stacks() and case.request.has_flight_records())
        ):
            return None
        if case.is_own and not self._is_due():
            # A rank that goes on meanwhile ends the case.
            return None if self._is_unchanged(case) else self._close(now)
        case.states = self._complete(case, running, seconds)
        if self._exchange is None:
            return self._decide(case, {}, (), now)
        self._exchange.publish_states(self._number, case.states)
        if not self._exchange.decides:
            return self._close(now)
        case.published = now
        return None

    def _await_nodes(self, case: _Case, now: float) -> HangVerdict | None:
        assert self._exchange is not None  # noqa: S101 -- only with it anything is published
        others, silent = self._exchange.read_states(self._number)
        if silent and now - (case.published or 0.0) < _NODES_TIMEOUT:
            return None
        return self._decide(case, others, tuple(silent), now)

    def _decide(
        self, case: _Case, others: Mapping[int, RankState], silent: tuple[int, ...], now: float
    ) -> HangVerdict | None:
        verdict = judge({**case.states, **others}, self._rules, silent) if self._is_unchanged(case) else None
        self._close(now)
        if verdict is not None:
            moves = {rank: count for rank, count in case.moves.items() if rank in verdict.named}
            self._reported = (verdict, moves or case.moves)
        return verdict

    def _close(self, now: float) -> None:
        self._case = None
        self._number += 1
        self._paused_until = now + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _is_due(self) -> bool:
        """Whether a rank is over its limit now."""
        ages = self._tracker.ages()
        return any(age > self._limit(rank, self._tracker.phase(rank))[0] for rank, age in ages.items()) or (
            max(ages.values(), default=0.0) > self._rules.shortest
        )

    def _is_unchanged(self, case: _Case) -> bool:
        """Whether some rank is still in the phase in which the case began."""
        moves = self._tracker.moves()
        return any(moves.get(rank) == count for rank, count in case.moves.items())

    def _complete(self, case: _Case, running: Mapping[int, RankProcess], seconds: float) -> dict[int, RankState]:
        """The ranks' answers with the ages and limits of their phases, and whether they are busy."""
        ages = self._tracker.ages()
        found: dict[int, RankState] = {}
        for rank, state in case.request.read().items():
            if rank not in running:
                continue
            busy = read_usage(running[rank].pid).is_busy_since(case.usages[rank], seconds)
            limit, usual = self._limit(rank, self._tracker.phase(rank)) if rank in ages else (None, None)
            found[rank] = dataclasses.replace(state, age=ages.get(rank), limit=limit, usual=usual, is_busy=busy)
        return found

    def _look_for_end(self, verdict: HangVerdict, moves: Mapping[int, int]) -> HangOver | None:
        """The end of a reported hang: a rank behind goes on; if they belong to other nodes, one of this node."""
        now = self._tracker.moves()
        if not any(now.get(rank, count) != count for rank, count in moves.items()):
            return None
        self._reported = None
        self._pause = _FIRST_PAUSE
        return HangOver(verdict, self._tracker.last_phase_seconds([r for r in moves if now.get(r) != moves[r]]))


def _early(limit: float) -> float:
    return min(_EARLY, limit / 3)
