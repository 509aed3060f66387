"""The goodput ledger: what every second of a run was spent on, and what each failure cost. Pure records.

The effective training time ratio is that of "Revisiting Reliability in Large-Scale Machine Learning Research Clusters"
(arXiv 2410.21680): productive time divided by the time in which the run was running or waiting for its start. Here it
is stricter: waiting for data, validation, checkpoints and the first step of each attempt are not productive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from strategies.units import format_duration

_MICRO = 1_000_000
# In the order of the report: kind, and what it is.
KINDS: Mapping[str, str] = MappingProxyType({
    "productive": "optimizer steps: forward, backward and update, without those that were done again",
    "data": "waiting for a batch and copying it to the device",
    "validation": "validations during the training",
    "checkpoint": "steps waiting for a checkpoint",
    "other": "hooks of callbacks, loggers, ends of epochs, and the end of the run",
    "first_step": "from the start of the training loop to the end of the first optimizer step, with compilation",
    "start": "from the launch to the training loop: processes, imports, set-up",
    "agreement": "ranks exchanging facts, and rank zero planning",
    "queue": "waiting for SLURM to start the job",
    "detection": "from the last sign of life before a failure to its report",
    "restart": "from the report of a failure to the next training loop",
    "redone": "optimizer steps that an earlier attempt had already done, with their data",
    "stopped": "between an end without a restart and a later resume; not part of the ratio",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class FailureCost:
    """What one failure cost; times in microseconds.

    Attributes:
        attempt: number of the attempt that failed, from 1.
        time: of its report, in seconds since the epoch.
        rank: the rank that failed first.
        reason: as in the event `rank_failed` or `failed`; `unreported` if no event reports the end.
        detection, restart, redone: see `KINDS`; `restart` is 0 if no attempt followed by itself.
        redone_steps: optimizer steps that were done again.
    """

    attempt: int
    time: float
    rank: int
    reason: str
    detection: int = 0
    restart: int = 0
    redone: int = 0
    redone_steps: int = 0

    @property
    def seconds(self) -> float:
        """Seconds that it cost together."""
        return (self.detection + self.restart + self.redone) / _MICRO

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, times in seconds."""
        return {
            "attempt": self.attempt, "time": self.time, "rank": self.rank, "reason": self.reason,
            "detection": self.detection / _MICRO, "restart": self.restart / _MICRO, "redone": self.redone / _MICRO,
            "redone_steps": self.redone_steps, "seconds": self.seconds,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ledger:
    """The time of a run from its first launch to its last event.

    Attributes:
        microseconds: time of each of `KINDS`; never negative, and their sum is the total exactly.
        failures: oldest first.
    """

    microseconds: Mapping[str, int]
    failures: tuple[FailureCost, ...] = ()

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.microseconds.values()) / _MICRO

    @property
    def active(self) -> float:
        """Seconds without those in which the run was stopped."""
        return (sum(self.microseconds.values()) - self.microseconds["stopped"]) / _MICRO

    @property
    def ratio(self) -> float | None:
        """Effective training time ratio (ETTR), from 0 to 1; None for a run without time."""
        return self.seconds("productive") / self.active if self.active > 0 else None

    @property
    def lost(self) -> float:
        """Seconds that failures cost."""
        return sum(failure.seconds for failure in self.failures)

    def seconds(self, kind: str) -> float:
        """Seconds of one kind."""
        return self.microseconds[kind] / _MICRO

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, times in seconds."""
        return {
            "ettr": self.ratio,
            "total": self.total,
            "active": self.active,
            "seconds": {kind: self.seconds(kind) for kind in KINDS},
            "failures": [failure.to_dict() for failure in self.failures],
        }

    def to_summary(self) -> dict[str, float]:
        """For the summary of a tracker: the ratio, the seconds of each kind that occurred, and the failures' cost."""
        kinds = {f"goodput/{kind}_seconds": self.seconds(kind) for kind in KINDS if self.microseconds[kind]}
        failures = {"goodput/failures": len(self.failures), "goodput/failure_seconds": self.lost}
        return {"goodput/ettr": self.ratio or 0.0, **kinds, **failures}


def describe_goodput(ledger: Ledger) -> str:
    """The ratio and the cost of the failures in one line."""
    times = f"{format_duration(ledger.seconds('productive'))} of {format_duration(ledger.active)}"
    text = f"effective training: {ledger.ratio or 0:.1%} ({times})"
    count = len(ledger.failures)
    if not count:
        return text
    return f"{text}; {count} failure{'' if count == 1 else 's'} cost {format_duration(ledger.lost)}"
