"""When a run counts as hung, and which ranks it waits for. Pure: beats, stacks and process states come in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launcher.agent.flight_recorder import FlightRecord, ranks_that_did_not_enter
from launcher.process.heartbeat import UNKNOWN, Heartbeat
from strategies.registry import list_strategies

# The default limit: this many steps' time, and never less than this many seconds.
_STEPS = 20.0
_SECONDS = 600.0
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+|\?\?\?) in (?P<name>.+)$')
# Where the main thread stands while it waits for the other ranks; DDP's collectives run within the backward pass.
_COLLECTIVE_FILES = ("torch/distributed/", "torch/autograd/graph.py", "torch/autograd/__init__.py",
                     "torch/nn/parallel/distributed.py")  # fmt: skip


class HangWatch:
    """Looks at the ranks' signs of life again and again.

    Args:
        timeout: seconds without one; None takes 20 times the observed step time, at least 600 s, and nothing before
            the first steps.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._first: Heartbeat | None = None
        self._latest: Heartbeat | None = None

    @property
    def limit(self) -> float | None:
        """Seconds that count as a hang now; None while they cannot be known."""
        if self._timeout is not None:
            return self._timeout
        if self._first is None or self._latest is None or self._latest.step <= self._first.step:
            return None
        per_step = (self._latest.clock - self._first.clock) / (self._latest.step - self._first.step)
        return max(_STEPS * per_step, _SECONDS)

    def silence(self, now: float, beats: Mapping[int, Heartbeat | None]) -> float | None:
        """Seconds since the last sign of life of any rank, if they are too many; None if all is well.

        Args:
            now: CLOCK_MONOTONIC, in seconds.
            beats: what each rank last said.
        """
        heard = [beat for beat in beats.values() if beat is not None]
        if not heard:
            return None
        last = max(heard, key=lambda beat: beat.clock)
        if last.step >= 1:
            self._first = self._first or last
            self._latest = last
        limit = self.limit
        silent = now - last.clock
        return silent if limit is not None and silent > limit else None


@dataclass(frozen=True, slots=True)
class RankState:
    """One rank of a hung run.

    Attributes:
        beat: what it last said.
        process_state: the kernel's letter: 'T' is stopped, 'D' waits for a disk or a device.
        stacks: what faulthandler wrote; None if it did not answer.
        record: which collectives it has entered; None if it did not tell.
    """

    beat: Heartbeat | None
    process_state: str = "S"
    stacks: str | None = None
    record: FlightRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "beat": None if self.beat is None else asdict(self.beat),
            "process_state": self.process_state,
            "stacks": self.stacks,
            "record": None if self.record is None else self.record.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankState:
        """The inverse of `to_dict`."""
        beat, record = values["beat"], values["record"]
        return cls(
            None if beat is None else Heartbeat(**beat),
            values["process_state"],
            values["stacks"],
            None if record is None else FlightRecord.from_dict(record),
        )

    @property
    def doing(self) -> str:
        """Where its main thread is, in a few words."""
        if self.process_state == "T":
            return "stopped by a signal (SIGSTOP)"
        if self.process_state == "D":
            return "waiting in the kernel for a disk or a device"
        frame = main_thread_frame(self.stacks or "")
        if frame is None:
            return "silent: it did not even write its stacks"
        where = f"{frame[0]}, line {frame[1]}, in {frame[2]}"
        return f"waiting in a collective ({where})" if in_collective(self.stacks or "") else f"in {where}"


def ranks_behind(states: Mapping[int, RankState]) -> dict[int, str]:
    """The ranks that the others wait for: rank to what it does instead of entering the collective.

    A stopped process is named first; else the ranks that the flight records show not to have entered a collective; else
    those that entered fewer; else those whose stack shows them outside of one. All ranks alike means that nobody can be
    named.
    """
    stopped = {rank: state.doing for rank, state in states.items() if state.process_state in "TD"}
    if stopped:
        return stopped
    absent = ranks_that_did_not_enter({r: s.record for r, s in states.items() if s.record is not None})
    if absent:
        return {rank: f"{states[rank].doing}; {text}" for rank, text in absent.items()}
    counts = {rank: state.beat.collectives for rank, state in states.items() if state.beat is not None}
    if counts and len(counts) == len(states) and UNKNOWN not in counts.values():
        most = max(counts.values())
        fewer = {rank: states[rank].doing for rank, count in counts.items() if count < most}
        if fewer:
            return fewer
    outside = {r: s.doing for r, s in states.items() if not in_collective(s.stacks or "")}
    return outside if len(outside) < len(states) or len(states) == 1 else {}


def main_thread_frame(stacks: str) -> tuple[str, str, str] | None:
    """File, line and function of the main thread's innermost frame, from faulthandler's text."""
    frames = _main_thread(stacks)
    return frames[0] if frames else None


def in_collective(stacks: str) -> bool:
    """Whether the main thread waits for other ranks."""
    # A training step that sleeps is within backward's callers too: the innermost frames alone tell.
    files = (*_COLLECTIVE_FILES, *(part for strategy in list_strategies() for part in strategy.collective_files))
    return any(part in frame[0] for frame in _main_thread(stacks)[:2] for part in files)


def _main_thread(stacks: str) -> list[tuple[str, str, str]]:
    """The main thread's frames, innermost first: faulthandler writes the oldest thread last."""
    frames: list[tuple[str, str, str]] = []
    for line in stacks.splitlines():
        if "most recent call first" in line:
            frames = []
        elif match := _FRAME.match(line):
            frames.append((match["file"], match["line"], match["name"]))
    return frames
