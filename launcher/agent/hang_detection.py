"""Detects a hang and finds the ranks that block the others. Pure: all observations are arguments."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.agent.flight_recorder import FlightRecord, find_absent_ranks
from launcher.monitoring.health import format_ranks
from launcher.process.heartbeat import UNKNOWN, Heartbeat
from launcher.user_code.sources import is_users_file
from strategies.registry import list_strategies

# The default limit is the time of this many steps, and at least this many seconds.
_STEPS = 20.0
_SECONDS = 600.0
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+|\?\?\?) in (?P<name>.+)$')
# Files of the innermost frames while a rank waits for others; DDP's collectives run within the backward pass.
_COLLECTIVE_FILES = ("torch/distributed/", "torch/autograd/graph.py", "torch/autograd/__init__.py",
                     "torch/nn/parallel/distributed.py")  # fmt: skip
# The file and the functions in which a loader waits for a batch of its workers.
_LOADER_FILE = "torch/utils/data/dataloader.py"
_LOADER_WAITS = ("_get_data", "_try_get_data")
LOADER_WAIT = "waiting for its loader workers"
_LOCK_FILES = ("/threading.py", "/queue.py", "/multiprocessing/queues.py", "/multiprocessing/synchronize.py")
# psutil's names of process states in which a rank cannot run.
_STOPPED = "stopped"
_WAITING_FOR_DEVICE = "disk-sleep"


class HangDetector:
    """Watches the ranks' heartbeats.

    Args:
        timeout: seconds without a heartbeat that count as a hang. None: 20 times the measured step time and at least
            600 s; without a limit before the first steps.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._first: Heartbeat | None = None
        self._latest: Heartbeat | None = None

    @property
    def limit(self) -> float | None:
        """Seconds that count as a hang now; None while the step time is unknown."""
        if self._timeout is not None:
            return self._timeout
        if self._first is None or self._latest is None or self._latest.step <= self._first.step:
            return None
        per_step = (self._latest.clock - self._first.clock) / (self._latest.step - self._first.step)
        return max(_STEPS * per_step, _SECONDS)

    def find_silence(self, now: float, heartbeats: Mapping[int, Heartbeat | None]) -> float | None:
        """Seconds since the last heartbeat of any rank if over the limit, else None. `now` is CLOCK_MONOTONIC."""
        known = [beat for beat in heartbeats.values() if beat is not None]
        if not known:
            return None
        last = max(known, key=lambda beat: beat.clock)
        if last.step >= 1:
            self._first = self._first or last
            self._latest = last
        limit = self.limit
        silence = now - last.clock
        return silence if limit is not None and silence > limit else None


@dataclass(frozen=True, slots=True)
class RankState:
    """One rank of a run that hangs.

    Attributes:
        process_status: state of the process, by psutil's name.
        stacks: stacks written by faulthandler; None if the rank did not answer.
        flight_record: collectives that the rank has entered; None if the rank did not report them.
        waits_for: what its main thread waits for according to the kernel and its stacks; empty if not known.
        age: seconds since its phase began; None if it reports no phases.
        usual: median seconds of this phase; None while it is not known.
        limit: seconds after which this phase takes far too long.
        is_busy: whether its processes have used a processor or a file in the last seconds.
    """

    heartbeat: Heartbeat | None
    process_status: str = "sleeping"
    stacks: str | None = None
    flight_record: FlightRecord | None = None
    waits_for: str = ""
    age: float | None = None
    usual: float | None = None
    limit: float | None = None
    is_busy: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankState:
        """The inverse of `dataclasses.asdict`."""
        heartbeat, record = values["heartbeat"], values["flight_record"]
        nested: dict[str, Any] = {
            "heartbeat": None if heartbeat is None else Heartbeat(**heartbeat),
            "flight_record": None if record is None else FlightRecord.from_dict(record),
        }
        return cls(**{**values, **nested})

    @property
    def is_stopped(self) -> bool:
        """Whether the process cannot run because of a signal."""
        return self.process_status == _STOPPED

    @property
    def doing(self) -> str:
        """Position of the main thread."""
        if self.is_stopped:
            return "stopped by a signal (SIGSTOP)"
        if self.process_status == _WAITING_FOR_DEVICE:
            return "waiting in the kernel for a disk or a device"
        frames = read_main_thread(self.stacks or "")
        if not frames:
            return "not responding: it did not write its stacks"
        position = "{}, line {}, in {}".format(*find_own_frame(frames))
        return f"waiting in a collective ({position})" if is_in_collective(self.stacks or "") else f"in {position}"


def find_blocking_ranks(states: Mapping[int, RankState]) -> dict[int, str]:
    """The ranks that the others wait for.

    The first of these that finds a rank decides: a stopped process; a rank that did not enter a collective according to
    the flight records; a rank that entered fewer collectives than others; a rank whose stack is not in a collective.

    Returns:
        Rank to its position instead of the collective; empty if all ranks look the same.
    """
    stopped = {r: s.doing for r, s in states.items() if s.process_status in (_STOPPED, _WAITING_FOR_DEVICE)}
    if stopped:
        return stopped
    records = {r: s.flight_record for r, s in states.items() if s.flight_record is not None}
    absent = find_absent_ranks(records)
    if absent:
        return {rank: f"{states[rank].doing}; {text}" for rank, text in absent.items()}
    return find_outside_ranks(states)


def find_outside_ranks(states: Mapping[int, RankState]) -> dict[int, str]:
    """The ranks that are not in the collective of the others, without flight records; see `find_blocking_ranks`."""
    counts = {r: s.heartbeat.collectives for r, s in states.items() if s.heartbeat is not None}
    if counts and len(counts) == len(states) and UNKNOWN not in counts.values():
        most = max(counts.values())
        fewer = {rank: states[rank].doing for rank, count in counts.items() if count < most}
        if fewer:
            return fewer
    outside = {r: s.doing for r, s in states.items() if not is_in_collective(s.stacks or "")}
    return outside if len(outside) < len(states) or len(states) == 1 else {}


def describe_hang(silence: float, blocking: Sequence[int], stacks: Path | None, *, has_steps: bool = True) -> str:
    """The message about a hang of `silence` seconds; `blocking` is empty if unknown."""
    what = "no heartbeat from any rank" if has_steps else "no rank has entered a collective"
    cause = "cannot determine which rank blocks the others"
    if blocking:
        cause = f"the other ranks wait for {format_ranks(blocking, len(blocking))}"
    saved = "" if stacks is None else f"; stacks of all ranks: {stacks}"
    return f"hang: {what} for {silence:.0f} s; {cause}{saved}"


def is_in_collective(stacks: str) -> bool:
    """Whether the main thread waits for other ranks."""
    # A training step is called from torch's files too, so only the innermost frames count.
    files = (*_COLLECTIVE_FILES, *(part for strategy in list_strategies() for part in strategy.collective_files))
    return any(part in frame[0] for frame in read_main_thread(stacks)[:2] for part in files)


def find_own_frame(frames: Sequence[tuple[str, str, str]]) -> tuple[str, str, str]:
    """The innermost frame of the user's code, with a short path; without one, the innermost frame."""
    file, line, name = next((frame for frame in frames if is_users_file(frame[0])), frames[0])
    with contextlib.suppress(ValueError):
        file = str(Path(file).relative_to(Path.cwd()))
    return file, line, name


def read_main_thread(stacks: str) -> list[tuple[str, str, str]]:
    """File, line and function of the main thread's frames, innermost first. faulthandler writes that thread last."""
    frames: list[tuple[str, str, str]] = []
    for line in stacks.splitlines():
        if "most recent call first" in line:
            frames = []
        elif match := _FRAME.match(line):
            frames.append((match["file"], match["line"], match["name"]))
    return frames


def describe_wait(stacks: str, kernel: str) -> str:
    """What the main thread waits for, by its stacks and by what it waits for in the kernel (empty if not known)."""
    if is_in_collective(stacks):
        return "waiting for other ranks"
    frames = read_main_thread(stacks)
    if any(file.endswith(_LOADER_FILE) and name in _LOADER_WAITS for file, _, name in frames):
        return LOADER_WAIT
    if frames and frames[0][0].endswith(_LOCK_FILES):
        return "waiting for a lock or a queue"
    return kernel
