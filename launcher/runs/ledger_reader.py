"""Reads a `Ledger` from a run's events. Pure; the events may end anywhere, or be damaged."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from launcher.runs.event_clock import EventClock, as_micro
from launcher.runs.goodput import KINDS, FailureCost, Ledger
from launcher.runs.spent_time import SpentTime

Event = Mapping[str, Any]
# What the time after the last event belongs to.
_Phase = Literal["none", "start", "restart", "training", "ended"]
# Written between attempts: they do not make a run longer.
_BETWEEN = ("evaluated", "nodes_missing")
_FAILURES = ("failed", "out_of_memory")
_STOPS = ("interrupted", "preempted")
_LARGEST_STEP = 2**53


class LedgerReader:
    """Collects the events of a run, in the order of the file.

    Most events assign no time: it is assigned when an event shows what it was spent on, up to that event's time.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._micro = dict.fromkeys(KINDS, 0)
        self._failures: list[FailureCost] = []
        self._clock = EventClock()
        self._phase: _Phase = "none"
        self.began = self._mark = 0  # all time from the begin to the mark is assigned
        self._training = SpentTime()
        self._attempts = self._restart_count = 0
        self._is_known = True
        self._end: Event | None = None  # the first event of the attempt that reports its end
        self._waiting: tuple[Event, int] | None = None
        self._hang_began: int | None = None
        self._steps_done = 0  # the most of all attempts
        self._redo_until = 0
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        """Add one event; one without a valid time is skipped."""
        kind = event.get("kind")
        if kind in _BETWEEN or not self._clock.add(event):
            return
        # A long run has 100,000 of each of these two.
        if kind == "ranks" and self._phase == "training":
            return
        if kind == "step" and self._can_wait(event):
            self._waiting = event, self._clock.now
            return
        self._flush()
        if self._phase == "none" and kind != "run_started":
            # Notices may be written before, and a damaged file may lack its start.
            self.began = self._mark = self._clock.now
            self._phase, self._is_known = "start", False
        if kind == "run_started":
            self._start_attempt(event)
        elif kind == "training_started":
            self._start_training(event)
        elif kind == "rank_failed":
            self._fail(event)
        elif self._phase == "training":
            self._train(event, self._clock.now)
        elif self._phase == "ended":
            self._assign("other")
        if kind != "training_started":
            self._steps_done = max(self._steps_done, *_read_steps(event))
        if kind in (*_FAILURES, *_STOPS):
            self._end = self._end or event
        elif kind == "hang":
            self._hang_began = self._clock.now - (as_micro(event.get("seconds")) or 0)
        elif kind == "finished":
            self._finish_attempt(self._clock.now)

    def ledger(self) -> Ledger | None:
        """The ledger up to the last event; None if an older version wrote a part of the run, or without an event."""
        if not self._attempts or not self._is_known:
            return None
        reader = copy.deepcopy(self)  # more events may follow
        reader._flush()
        reader._finish_attempt(reader._clock.now)
        return Ledger(reader._micro, tuple(reader._failures))

    # Attempts.

    def _start_attempt(self, event: Event) -> None:
        times = event.get("times")
        self._is_known = self._is_known and isinstance(times, Mapping)
        named = {name: self._clock.find(at) for name, at in times.items()} if isinstance(times, Mapping) else {}
        found = {name: at for name, at in named.items() if at is not None}
        if self._phase == "none":
            self.began = self._mark = min(found.values(), default=self._clock.now)
        else:
            is_unreported = self._phase == "training" and self._end is None
            self._finish_attempt(self._clock.before)
            if is_unreported:
                self._add_failure(event, self._clock.before, "unreported")
        self._attempts += 1
        count = _as_count(event.get("restart_count")) or 0
        is_restart, self._restart_count = count > self._restart_count, count
        self._end = self._hang_began = None
        self._bridge({name: at for name, at in found.items() if at > self._mark}, is_restart=is_restart)

    def _bridge(self, times: Mapping[str, int], *, is_restart: bool) -> None:
        """Assign the time up to a `run_started`; `times` are those that it names, after the last assigned time."""
        is_first, phase, self._phase = self._attempts == 1, self._phase, "start"
        launched = next((times[name] for name in ("launched", "process") if name in times), self._clock.now)
        if "submitted" in times:
            self._assign("queue" if is_first else "stopped", times["submitted"])
        if "submitted" in times or "job" in times:
            # A job that starts again without a new submission was requeued.
            self._assign("queue", times.get("job", launched))
        elif is_first:
            pass
        elif "launched" in times:
            self._assign("stopped", launched)
        elif phase == "restart":
            self._assign("restart")
            self._phase = "restart"
            return
        elif is_restart:
            # By torchrun, which writes no event.
            self._assign("detection", times.get("process"))
            self._assign("restart")
            self._phase = "restart"
            return
        else:
            self._assign("stopped", times.get("process", times.get("agreement")))
        self._assign("start", times.get("agreement", self._clock.now))
        self._assign("agreement")

    def _start_training(self, event: Event) -> None:
        if self._phase == "training":
            self._finish_attempt(self._clock.now)
        self._assign({"start": "start", "restart": "restart"}.get(self._phase, "other"))
        step = _as_count(event.get("step")) or 0
        self._training = SpentTime(step)
        self._redo_until = self._steps_done if step < self._steps_done else 0
        self._phase = "training"

    def _can_wait(self, event: Event) -> bool:
        """Whether the interval up to this `step` can be assigned together with the next ones."""
        training, step = self._training, _as_count(event.get("step"))
        is_plain = self._phase == "training" and training.has_stepped and training.step >= self._redo_until
        return is_plain and step is not None and isinstance(event.get("spent"), Mapping)

    def _flush(self) -> None:
        """Assign the time up to the `step` that waits."""
        if self._waiting is not None:
            (event, now), self._waiting = self._waiting, None
            self._train(event, now)
            self._steps_done = max(self._steps_done, *_read_steps(event))

    def _train(self, event: Event, now: int) -> None:
        spent, step = event.get("spent"), _as_count(event.get("step"))
        if not isinstance(spent, Mapping):
            # Without seconds in its first step, an older version wrote the attempt.
            self._is_known = self._is_known and event.get("kind") != "first_step"
            return
        parts = self._training.measure(spent, now - self._mark)
        self._add_parts(parts, self._training.step if step is None else step)
        self._training.has_stepped |= event.get("kind") == "first_step"
        self._training.has_ended |= event.get("kind") == "time_spent"

    def _fail(self, event: Event) -> None:
        """The agent's report of a failure."""
        named = self._clock.find(event.get("last_sign"))
        sign = named if named is not None else self._hang_began if event.get("hung") else self._clock.before
        sign = min(max(self._mark, self._clock.before if sign is None else sign), self._clock.now)
        self._assign_unmeasured(sign, max(_read_steps(event)))
        self._add_failure(event, self._clock.now, event.get("reason"))
        self._assign("detection")
        self._phase = "restart" if event.get("restart") is True else "ended"
        self._end = None

    def _finish_attempt(self, until: int) -> None:
        """Assign the time of the attempt that has no agent, or none that reported more."""
        end, self._end = self._end, None
        if self._phase == "restart":
            self._assign("restart", until)
        elif self._phase != "none":
            self._assign_unmeasured(until, self._steps_done)
        if end is not None and end.get("kind") in _FAILURES:
            self._add_failure(end, until, end.get("reason") or end.get("kind"))
        if self._phase == "training" or end is not None:
            self._phase = "ended"

    # Time.

    def _assign_unmeasured(self, until: int, step: int) -> None:
        """Assign the time from the last event with seconds."""
        gap = max(until - self._mark, 0)
        if self._phase != "training" or self._training.has_ended:
            self._assign(self._phase if self._phase in ("start", "restart") else "other", until)
        elif gap:
            self._add_parts(self._training.estimate(step, gap), max(step, self._training.step))

    def _add_parts(self, parts: Mapping[str, int], step: int) -> None:
        """Assign an interval of the training that ends with this step."""
        training, rest = self._training, dict(parts)
        steps, again = max(step - training.step, 0), max(min(step, self._redo_until) - training.step, 0)
        if not training.has_stepped:
            rest["first_step"] = rest.pop("step", 0) + rest.pop("other", 0)
        else:
            # Without a complete step, the next one.
            is_next_again = not steps and training.step < self._redo_until
            done_again = (1, 1) if is_next_again else (again, max(steps, 1))
            redone = {kind: rest.get(kind, 0) * done_again[0] // done_again[1] for kind in ("step", "data")}
            for kind, amount in redone.items():
                rest[kind] = rest.get(kind, 0) - amount
            rest["redone"] = sum(redone.values())
            rest["productive"] = rest.pop("step")
        self._charge(redone=rest.get("redone", 0), redone_steps=again)
        for kind, amount in rest.items():
            self._micro[kind] += amount
        self._mark += sum(rest.values())
        training.advance(parts, step)

    def _assign(self, kind: str, until: int | None = None) -> None:
        """Assign the time up to `until`, or to the newest event."""
        end = min(self._clock.now if until is None else until, self._clock.now)
        amount = max(end - self._mark, 0)
        self._micro[kind] += amount
        self._mark += amount
        if kind in ("detection", "restart"):
            self._charge(**{kind: amount})

    def _add_failure(self, event: Event, at: int, reason: Any) -> None:
        rank = _as_count(event.get("rank")) or 0
        self._failures.append(FailureCost(self._attempts, at / 1e6, rank, str(reason or "unknown")))

    def _charge(self, **amounts: int) -> None:
        """Add to the cost of the failure that ended the attempt, or the one before it."""
        last = self._failures[-1] if self._failures else None
        if last is not None and last.attempt >= self._attempts - 1:
            now = {name: getattr(last, name) + amount for name, amount in amounts.items()}
            self._failures[-1] = dataclasses.replace(last, **now)


def _as_count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < _LARGEST_STEP else None


def _read_steps(event: Event) -> list[int]:
    """The optimizer steps that an event names; the agent names those of all ranks."""
    others = event.get("others")
    named = [event, *(each for each in others if isinstance(each, Mapping))] if isinstance(others, list) else [event]
    return [_as_count(each.get("step")) or 0 for each in named]
