"""Who failed first, and how a person is told. Pure: the facts come in as records."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.core.errors import OutOfMemoryError
from launcher.process.heartbeat import BEFORE_TRAINING
from launcher.process.rank_status import RankError

_SERVER_LOST = 255


@dataclass(frozen=True, slots=True)
class RankEnd:
    """How a rank ended, or what it was doing when another one failed.

    Attributes:
        rank, host: which rank, where.
        exit_code: minus the signal's number if a signal ended it; None if it still ran.
        time: when its agent saw it end, in seconds since the epoch.
        step: optimizer steps it had done; `BEFORE_TRAINING` before the training.
        error: what it raised.
        log: the file with its output.
        last_lines: the end of that file.
        out_of_memory: whether the kernel killed it for memory.
        doing: where in the code it was, if it still ran.
        hung: whether it kept the others waiting in a collective that it never entered.
    """

    rank: int
    host: str
    exit_code: int | None
    time: float
    step: int = BEFORE_TRAINING
    error: RankError | None = None
    log: str | None = None
    last_lines: tuple[str, ...] = ()
    out_of_memory: bool = False
    doing: str | None = None
    hung: bool = False

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than well."""
        return self.hung or self.exit_code not in (0, None)

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether the kernel killed it for memory, or it was refused memory itself."""
        refused = self.error is not None and self.error.kind == OutOfMemoryError.__name__
        return self.out_of_memory or refused

    @property
    def consequence(self) -> bool:
        """Whether it only failed because another rank was gone."""
        return self.error is not None and self.error.lost_peer

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankEnd:
        """The inverse of `to_dict`."""
        error = RankError.from_dict(values["error"]) if values["error"] else None
        return cls(**{**values, "error": error, "last_lines": tuple(values["last_lines"])})


def first_failure(ends: Sequence[RankEnd]) -> RankEnd | None:
    """The rank that began it: the earliest whose failure isn't just that another rank was gone."""
    failed = [end for end in ends if end.failed]
    if not failed:
        return None

    def when(end: RankEnd) -> float:
        return end.error.time if end.error is not None else end.time

    # A rank that kept the others waiting is behind whatever their timeouts made of it.
    return min(failed, key=lambda end: (end.consequence, not end.hung, when(end), end.rank))


def shell_code(exit_code: int) -> int:
    """The exit code as a shell shows it: 128 + N for a death by signal N."""
    return exit_code if exit_code >= 0 else 128 - exit_code


def describe(end: RankEnd) -> str:
    """What became of a rank, in a few words."""
    at = f" at step {end.step}" if end.step >= 0 else " before the training began"
    if end.hung:
        return f"hung{at}" + (f": it was {end.doing}" if end.doing else "")
    if end.exit_code is None:
        return f"running{at}" + (f", {end.doing}" if end.doing else "")
    if end.error is not None and end.exit_code > 0:
        if end.consequence:
            return f"lost a peer ({end.error.kind}){at}"
        first_line = end.error.message.splitlines()[0] if end.error.message else ""
        return f"{end.error.kind}: {first_line}{at}"
    if end.out_of_memory:
        return f"killed by the kernel because the memory was full (SIGKILL){at}"
    if end.exit_code < 0:
        return f"killed by {_signal_name(-end.exit_code)} (signal {-end.exit_code}){at}"
    if end.exit_code == 0:
        return f"done{at}"
    if end.exit_code == _SERVER_LOST:
        return f"lost{at}: it, or the fork server above it, was killed"
    return f"exited with code {end.exit_code}{at}"


def account(first: RankEnd, ends: Sequence[RankEnd], verdict: str) -> str:
    """The whole story for a person.

    Args:
        first: the rank that began it.
        ends: all ranks of the attempt that are known.
        verdict: what happens now, and why.
    """
    if first.error is not None and first.error.explained:
        return f"error: {first.error.message}" + ("" if first.error.repeats else f"\n  {verdict}")
    lines = [f"error: rank {first.rank} ({first.host}) failed first: {describe(first)}"]
    told = _evidence(first)
    if told:
        lines.append(f"  its last lines ({first.log}):" if first.log else "  its last words:")
        lines += [f"    | {line}" for line in told]
    others = [end for end in ends if end.rank != first.rank]
    lines += [f"  rank {end.rank} ({end.host}): {describe(end)}" for end in others[:8]]
    if len(others) > 8:
        lines.append(f"  and {len(others) - 8} more ranks")
    lines.append(f"  {verdict}")
    return "\n".join(lines)


def _evidence(end: RankEnd) -> Sequence[str]:
    """The log's end; if the exception is not in it, the exception's own traceback."""
    if end.error is not None and not any(end.error.kind in line for line in end.last_lines):
        return end.error.traceback
    return end.last_lines


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "an unknown signal"
