"""Decides early whether a phase takes far longer than usual, and which ranks are behind. Pure.

A false notice is worse than a late one: the ranks that the others wait for must themselves be over the limit of their
own phase, unless it is certain that they cannot go on. The notice ends nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.agent.flight_recorder import Collective, find_late_ranks, find_mismatches
from launcher.agent.hang_detection import LOADER_WAIT, RankState, find_outside_ranks, find_own_frame, read_main_thread
from launcher.monitoring.health import format_ranks
from launcher.process.phases import Phase
from launcher.user_code.sources import is_users_file

_FRAMES = 3
# Files of work that is no hang although it takes long: compilation, a debugger, and what has no phase of its own yet.
_LONG_WORK = ("torch/_dynamo/", "torch/_inductor/", "torch/_functorch/", "/triton/", "/pdb.py", "/bdb.py",
              "/debugpy/", "lightning/pytorch/loops/evaluation_loop.py",
              "trainer/connectors/checkpoint_connector.py", "callbacks/lr_finder.py",
              "callbacks/batch_size_finder.py")  # fmt: skip
# The phases within which the files of `_LONG_WORK` are expected by themselves.
_EVALUATION = {Phase.EVALUATION_START, Phase.EVALUATION_STEP, Phase.BETWEEN_EVALUATION_STEPS, Phase.EVALUATION_END}


@dataclass(frozen=True, slots=True)
class HangRules:
    """When a phase takes far too long; all values but the factors are seconds.

    Attributes:
        shortest: the shortest limit; a second below 15, so that the notice comes within 15 seconds.
        factor: the limit is this multiple of the median,
        longest_factor: and this multiple of the longest time so far.
        unknown: limit of a phase that has not ended `known_after` times, as a first step that compiles.
        busy: limit while the processes of the rank use a processor or a file.
        busy_unknown: the same for a phase that is not known, as a set-up that prepares the data.
    """

    shortest: float = 14.0
    factor: float = 10.0
    longest_factor: float = 2.0
    unknown: float = 600.0
    busy: float = 600.0
    busy_unknown: float = 3600.0
    known_after: int = 3


@dataclass(frozen=True, slots=True)
class PhaseLimit:
    """The limit of a phase, and its median in seconds; None while the phase is not known."""

    seconds: float
    usual: float | None


def find_limit(durations: Sequence[float], longest: float, rules: HangRules) -> PhaseLimit:
    """The limit of a phase by its last durations and the longest one that the agent has seen, in seconds."""
    slowest = rules.longest_factor * longest
    if len(durations) < rules.known_after:
        return PhaseLimit(max(rules.unknown, slowest), None)
    usual = statistics.median(durations)
    return PhaseLimit(max(rules.shortest, rules.factor * usual, slowest), usual)


@dataclass(frozen=True, slots=True)
class HangVerdict:
    """The content of an early notice.

    Attributes:
        behind: the ranks that the others wait for, with their position; empty if no rank stands out.
        states: all known ranks.
        silent_nodes: nodes that did not report their ranks.
    """

    behind: Mapping[int, str]
    states: Mapping[int, RankState]
    silent_nodes: tuple[int, ...] = field(default=())

    @property
    def named(self) -> list[int]:
        """The ranks behind; without one, all."""
        return sorted(self.behind or self.states)

    @property
    def seconds(self) -> float:
        """How long the slowest of the named ranks is in its phase."""
        return max((self.states[rank].age or 0.0 for rank in self.named), default=0.0)

    def to_event(self) -> dict[str, Any]:
        """The fields of the event."""
        first = self.states[self.named[0]]
        return {
            "phase": name_phase(first),
            "seconds": round(self.seconds, 1),
            "usual": first.usual,
            "step": None if first.heartbeat is None else first.heartbeat.step,
            "ranks": sorted(self.behind),
            "waiting": sorted(set(self.states) - set(self.behind)),
            "waits_for": {rank: self.states[rank].waits_for for rank in self.named},
            "frames": {rank: list_top_frames(self.states[rank].stacks or "") for rank in self.named},
            "collective": next(iter(_collectives(self.states)), None),
            "message": describe_verdict(self),
        }


def judge(states: Mapping[int, RankState], rules: HangRules, silent_nodes: Sequence[int] = ()) -> HangVerdict | None:
    """The verdict on the states of all ranks; None as long as it may be no hang.

    The first of these that finds ranks decides: stopped processes; ranks that entered another collective than the
    others; ranks that did not enter a collective; fewer collectives; a stack outside of a collective.
    """
    silent = tuple(silent_nodes)
    over = {rank for rank, state in states.items() if is_over_limit(state)}
    stopped = {r: s.doing for r, s in states.items() if s.is_stopped and (s.age or 0.0) > rules.shortest}
    if stopped:
        return HangVerdict(stopped, states, silent)
    if not over:
        return None
    records = {rank: state.flight_record for rank, state in states.items() if state.flight_record is not None}
    mismatched = find_mismatches(records)
    if mismatched:
        return HangVerdict({rank: f"{states[rank].doing}; {text}" for rank, text in mismatched.items()}, states, silent)
    behind = {
        rank: f"{states[rank].doing}; {text}" for rank, text in find_late_ranks(records).items()
    } or find_outside_ranks(states)
    overdue = {rank for rank, state in states.items() if is_overdue(state, rules)}
    if not behind:
        return HangVerdict({}, states, silent) if overdue == set(states) else None
    behind = {rank: text for rank, text in behind.items() if rank in overdue}
    return HangVerdict(behind, states, silent) if behind else None


def is_over_limit(state: RankState) -> bool:
    """Whether the rank's phase takes longer than its limit."""
    return state.age is not None and state.limit is not None and state.age > state.limit


def is_overdue(state: RankState, rules: HangRules) -> bool:
    """The same with more patience for a rank that is busy, compiles, or is stopped in a debugger."""
    if state.age is None or state.limit is None:
        return False
    limit = state.limit
    if state.is_busy:
        limit = max(limit, rules.busy_unknown if state.usual is None else rules.busy)
    if _does_long_work(state):
        limit = max(limit, rules.unknown)
    return state.age > limit


def _does_long_work(state: RankState) -> bool:
    phase = None if state.heartbeat is None else state.heartbeat.phase
    files = [file for file, _, _ in read_main_thread(state.stacks or "")]
    expected = "evaluation_loop.py" if phase in _EVALUATION else "checkpoint_connector.py" if (
        phase == Phase.CHECKPOINT) else None  # fmt: skip
    return any(part in file for file in files for part in _LONG_WORK if expected is None or not part.endswith(expected))


def name_phase(state: RankState) -> str:
    """The phase for the user; a rank that waits for its loader is in the phase 'data'."""
    if state.waits_for == LOADER_WAIT:
        return "data"
    return "unknown" if state.heartbeat is None else Phase(state.heartbeat.phase).text


def list_top_frames(stacks: str) -> list[str]:
    """The innermost frames of the user's code, then those of libraries if there is none."""
    frames = read_main_thread(stacks)
    own = [frame for frame in frames if is_users_file(frame[0])] or frames
    return ["{}, line {}, in {}".format(*find_own_frame([frame])) for frame in own[:_FRAMES]]


def describe_verdict(verdict: HangVerdict) -> str:
    """The notice: one line with the phase, the ranks behind, their position, and what they wait for."""
    states = verdict.states
    first = states[verdict.named[0]]
    usual = "" if first.usual is None else f", usually {_seconds(first.usual)}"
    step = "" if first.heartbeat is None or first.heartbeat.step < 0 else f" after step {first.heartbeat.step}"
    begin = f"possible hang: {verdict.seconds:.0f} s in phase '{name_phase(first)}'{step}{usual}; "
    if not verdict.behind:
        cause = f"no rank stands out, rank {verdict.named[0]} is {_position(first, first.doing)}"
    else:
        groups: dict[str, list[int]] = {}
        for rank, text in sorted(verdict.behind.items()):
            groups.setdefault(_position(states[rank], text), []).append(rank)
        cause = "; ".join(
            f"{format_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} {text}" for text, ranks in groups.items()
        )
        others = sorted(set(states) - set(verdict.behind))
        if others and "in which" not in cause:
            cause += f"; {format_ranks(others)} {'waits' if len(others) == 1 else 'wait'}"
    if verdict.silent_nodes:
        cause += f"; no report from {'node' if len(verdict.silent_nodes) == 1 else 'nodes'} " + ", ".join(
            map(str, verdict.silent_nodes)
        )
    return f"{begin}{cause}; nothing is ended"


def _position(state: RankState, text: str) -> str:
    """What the rank waits for, and where, unless that is the inside of a loader."""
    wait = state.waits_for
    where, mark, cause = text.partition("; ")
    if not wait or state.is_stopped or "waiting" in where:
        return text
    return f"{wait}{mark}{cause}" if wait == LOADER_WAIT else f"{wait} {text}"


def _collectives(states: Mapping[int, RankState]) -> list[str]:
    """The collectives in which ranks wait, oldest first."""
    found: set[Collective] = {one for s in states.values() if s.flight_record for one in s.flight_record.waiting}
    return [str(one) for one in sorted(found, key=lambda one: (one.number, one.group))]


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.0f} ms"
