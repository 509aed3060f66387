"""How often to save: the interval that wastes least time, from the cost of a save and the rate of failures. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Unexpected interruptions of a training: 419 in 54 days on 16,384 GPUs (The Llama 3 Herd of Models, arXiv 2407.21783,
# section 3.3.4). It counts as one failure of this run, until the run has its own.
PRIOR_DEVICE_HOURS = 54 * 24 * 16_384 / 419
# Seconds. So much work is lost at most.
LONGEST = 1800.0
# A save costs this share of the time at most.
_MOST_COST = 0.1
# Interval in steps from one save to the next; the first steps are a poor measure of the others.
_GROWTH = 4
_ENDED = ("finished", "interrupted")


@dataclass(frozen=True, slots=True)
class FailureHistory:
    """What a run has seen: failed attempts, and hours trained on `devices` devices."""

    failures: int
    hours: float
    devices: int

    @property
    def mean_time(self) -> float:
        """Seconds between failures: the mean of a Gamma distribution's rate, whose prior is one failure.

        Rate = (1 + failures) / (PRIOR_DEVICE_HOURS / devices + hours).
        """
        return 3600 * (PRIOR_DEVICE_HOURS / max(self.devices, 1) + self.hours) / (1 + self.failures)


@dataclass(frozen=True, slots=True)
class SaveInterval:
    """A decision: seconds between two saves, the optimizer steps that take so long, and why."""

    seconds: float
    steps: int
    reason: str


def read_failures(events: Iterable[Mapping[str, Any]], devices: int) -> FailureHistory:
    """The history of a run from its events, oldest first; the last attempt is the one that runs now.

    An earlier attempt that neither finished nor was stopped by a signal has failed: a lost node writes nothing.
    """
    failures, seconds = 0, 0.0
    first: float | None = None
    last, has_begun, has_ended = 0.0, False, True
    for event in events:
        kind, time = event.get("kind"), event.get("time")
        time = time if isinstance(time, int | float) else last
        if kind == "run_started":
            failures += has_begun and not has_ended
            seconds += 0.0 if first is None else max(last - first, 0.0)
            first, has_begun, has_ended = None, True, False
        elif kind == "training_started":
            first = time
        elif kind in _ENDED:
            has_ended = True
        last = time
    return FailureHistory(failures, (seconds + (0.0 if first is None else max(last - first, 0.0))) / 3600, devices)


def best_interval(cost: float, mean_time: float) -> float:
    """Seconds of work between two saves that cost `cost` seconds, with `mean_time` seconds between failures.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
    Computer Systems 22 (2006), equation 37: with d = cost and M = mean_time,
    sqrt(2 d M) (1 + sqrt(d / (2 M)) / 3 + d / (18 M)) - d if d < 2 M, else M. Its first term is that of J. W. Young,
    "A first order approximation to the optimum checkpoint interval", Communications of the ACM 17 (1974).
    """
    if cost >= 2 * mean_time:
        return mean_time
    share = cost / (2 * mean_time)
    return math.sqrt(2 * cost * mean_time) * (1 + math.sqrt(share) / 3 + share / 9) - cost


def choose_interval(cost: float, write: float, step: float, history: FailureHistory, before: int) -> SaveInterval:
    """Decide when to save next.

    Between 10 times the cost, or the time of a write in the background, and 30 minutes; the first bound counts more.

    Args:
        cost: seconds that a save stops the training.
        write: seconds until a checkpoint is complete, `cost` included.
        step: seconds of an optimizer step.
        history: the run's failures.
        before: the interval in steps until now; the new one is at most four times as long.
    """
    best = best_interval(cost, history.mean_time)
    shortest = max(cost / _MOST_COST, write)
    seconds = max(min(best, LONGEST), shortest)
    limit = "" if seconds == best else ", the least between two saves" if seconds == shortest else ", the longest"
    steps = max(round(seconds / max(step, 1e-9)), 1)
    if steps > _GROWTH * before:
        steps = _GROWTH * before
        limit = f", at most {_GROWTH} times the interval before"
    failures = f"{history.failures} failure{'' if history.failures == 1 else 's'} in {history.hours:.1f} h"
    reason = (
        f"a save stops the training for {cost:.2g} s; a failure is expected each {history.mean_time / 3600:.3g} h on "
        f"{history.devices} device{'' if history.devices == 1 else 's'} ({failures} so far); best {best:.3g} s{limit}"
    )
    return SaveInterval(steps * step, steps, reason)


def describe_auto(devices: int) -> tuple[str, ...]:
    """How `checkpoint.every: auto` decides, before anything is measured; for the plan."""
    hours = FailureHistory(0, 0.0, devices).mean_time / 3600
    return (
        f"Young/Daly interval of the measured cost; at first one failure each {hours:.3g} h is assumed",
        f"between 10 times the cost of a save and {LONGEST / 60:.0f} minutes",
    )
