"""Decides whether the ranks restart after a failure. Pure; `restarts` keeps the history and reads the run directory."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.agent.failure_report import CRASH_SIGNALS, RankOutcome, describe_outcome
from launcher.process.heartbeat import NO_STEPS

_USAGE_ERROR = 2
# By `StorageError.reason`.
_STORAGE = {
    "disk_full": "the disk is full",
    "quota": "the disk quota is used up",
    "read_only": "the disk is read-only",
    "no_permission": "the folder is not writable",
}


@dataclass(frozen=True, slots=True)
class RestartDecision:
    """Whether to restart, and why; a restart with another `strategy` does not count against the limit."""

    restart: bool
    reason: str
    strategy: str | None = None


@dataclass(frozen=True, slots=True)
class RestartHistory:
    """The limit on restarts, and the restarts so far.

    Attributes:
        max_restarts: number of restarts allowed within the window.
        window: seconds.
        earlier: time in seconds and first failure of each attempt that was followed by a counted restart.
        now: current time on the same clock.
    """

    max_restarts: int
    window: float
    earlier: tuple[tuple[float, RankOutcome], ...] = ()
    now: float = 0.0


def decide_restart(
    failure: RankOutcome,
    history: RestartHistory,
    next_strategy: str | None = None,
    *,
    source: str = "",
) -> RestartDecision:
    """Whether a restart can help after `failure`, the first of the attempt that has ended.

    After running out of memory, `next_strategy` is the strategy to continue with if the config requests it. Each one
    needs less memory than the one before, so these restarts end. The next attempt's plan selects the same strategy: see
    `launcher.runs.oom_record`. `source` states what the next attempt continues from.
    """
    if failure.is_interrupted:
        return RestartDecision(False, "no restart: a signal requested the stop")
    if next_strategy is not None:
        return RestartDecision(True, f"restart with strategy {next_strategy}{source}", next_strategy)
    if failure.error is not None and failure.error.storage is not None:
        return RestartDecision(False, f"no restart: {_STORAGE[failure.error.storage]}; it would fail again")
    if failure.exit_code == _USAGE_ERROR or (failure.error is not None and failure.error.repeats):
        return RestartDecision(False, "no restart: this error would repeat; change the config or the code")
    if history.max_restarts == 0:
        return RestartDecision(False, "no restart: --max-restarts is 0")
    if history.earlier and _is_repetition(history.earlier[-1][1], failure):
        cause = f"the previous attempt failed in the same way ({describe_outcome(failure)})"
        return RestartDecision(False, f"no restart: {cause}")
    used = sum(history.now - time < history.window for time, _ in history.earlier)
    if used >= history.max_restarts:
        limit = f"{used} of {history.max_restarts} restarts were used in the last {history.window:g} s"
        return RestartDecision(False, f"no restart: {limit}")
    return RestartDecision(True, f"restart {used + 1} of {history.max_restarts}{source}")


def _is_repetition(before: RankOutcome, now: RankOutcome) -> bool:
    """Whether the code itself failed twice at the same place, so that a third attempt would fail too."""
    if before.step != now.step or now.step == NO_STEPS:
        return False
    if before.error is not None and now.error is not None:
        # A lost connection or a port in use may work at the next attempt.
        return before.error.signature == now.error.signature and not now.error.lost_peer
    if before.rank != now.rank:
        return False
    if before.hung or now.hung:
        return before.hung == now.hung
    code = now.exit_code or 0
    return before.exit_code == code and (code > 0 or -code in CRASH_SIGNALS)
