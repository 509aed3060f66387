"""Whether to start again after a failure. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.agent.failure_report import RankEnd, describe

_USAGE = 2
# Signals that come from a rank's own code; others come from outside, and need not come again.
_OWN_SIGNALS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Restart or stop, and why.

    Attributes:
        restart: whether.
        reason: why.
        strategy: the one to restart with, if it is another one; such a restart does not count.
    """

    restart: bool
    reason: str
    strategy: str | None = None


def host_lost(host: str, port: int) -> str:
    """What a person is told once the rendezvous is gone."""
    return (
        f"the node that serves the rendezvous at {host}:{port} is gone, and no other can take its place: the run ends "
        "here. Start it again on all nodes; with --resume auto it goes on from its last checkpoint"
    )


def decide(
    failure: RankEnd,
    earlier: Sequence[tuple[float, RankEnd]],
    now: float,
    max_restarts: int,
    window: float,
    next_strategy: str | None = None,
    *,
    has_checkpoint: bool = True,
) -> Verdict:
    """Whether a restart can help.

    Args:
        failure: the first failure of the attempt that has just ended.
        earlier: time in seconds and first failure of the attempts before that were followed by a restart.
        now: on the same clock.
        max_restarts: restarts that the window holds.
        window: seconds.
        next_strategy: what the config asks to go on with, out of memory. Each needs less than the one before, so there
            is an end to it. The next attempt's plan comes to it by itself: see `launcher.runs.oom_record`.
        has_checkpoint: whether the run has saved one; it may have begun from another run's.
    """
    begin = ", from the last checkpoint" if has_checkpoint else "; no checkpoint was saved yet"
    if failure.error is not None and failure.error.interrupted:
        return Verdict(False, "a signal asked it to stop")
    if next_strategy is not None:
        return Verdict(True, f"restart with strategy {next_strategy}{begin}", next_strategy)
    if failure.exit_code == _USAGE or (failure.error is not None and failure.error.repeats):
        return Verdict(False, "no restart: this error would repeat; nothing but a change of the config or code helps")
    if max_restarts == 0:
        return Verdict(False, "no restart: --max-restarts is 0")
    again = earlier[-1][1] if earlier else None
    if again is not None and _same(again, failure):
        return Verdict(False, f"no restart: the attempt before ended in the same way ({describe(failure)})")
    used = sum(now - time < window for time, _ in earlier)
    if used >= max_restarts:
        return Verdict(False, f"no restart: {used} of {max_restarts} restarts were used in the last {window:g} s")
    return Verdict(True, f"restart {used + 1} of {max_restarts}{begin}")


def _same(before: RankEnd, now: RankEnd) -> bool:
    """Whether the code itself failed twice at the same place, so that it would a third time."""
    if before.step != now.step:
        return False
    if before.error is not None and now.error is not None:
        # A peer that was lost, or a port that was taken, may well be there the next time.
        return before.error.signature == now.error.signature and not now.error.lost_peer
    if before.rank != now.rank:
        return False
    if before.hung or now.hung:
        return before.hung == now.hung
    code = now.exit_code or 0
    return before.exit_code == code and (code > 0 or -code in _OWN_SIGNALS)
