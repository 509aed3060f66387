"""Collects what an agent can learn about its ranks: reported status, heartbeats, logs, stacks and process states."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from launcher.agent.failure_report import RankOutcome
from launcher.agent.hang_detection import RankState
from launcher.agent.state_request import RankProcess, StateRequest
from launcher.process.heartbeat import BEFORE_TRAINING, NO_STEPS, Heartbeat, HeartbeatReader
from launcher.process.rank_log import read_tail
from launcher.process.rank_status import (
    RankStatus,
    beat_path,
    flight_path,
    read_status,
)
from launcher.user_code.sources import is_users_file

_LAST_LINES = 16
_TAIL_BYTES = 16384


class RankInspector:
    """Reads what the ranks of one attempt write into its folder; `has_steps`: whether they report their steps."""

    def __init__(self, folder: Path, *, has_steps: bool = True) -> None:
        self._folder = folder
        self._has_steps = has_steps
        self._readers: dict[int, HeartbeatReader] = {}
        self._counters = find_oom_kill_counters()
        self._oom_kills = count_oom_kills(self._counters)
        self._host = socket.gethostname()

    def read_heartbeat(self, rank: int) -> Heartbeat | None:
        """The rank's last heartbeat."""
        return self._reader(rank).read()

    def read_status(self, rank: int) -> RankStatus:
        """The status that the rank has reported."""
        return read_status(self._folder, rank)

    def find_run_directory(self, ranks: Mapping[int, RankProcess]) -> Path | None:
        """The run directory; None until a rank has reported it."""
        return next((status.run for rank in ranks if (status := self.read_status(rank)).run is not None), None)

    def read_durations(self, rank: int, phase: int) -> tuple[float, ...]:
        """The last durations of a phase of the rank, in seconds."""
        return self._reader(rank).read_durations(phase)

    def _reader(self, rank: int) -> HeartbeatReader:
        return self._readers.setdefault(rank, HeartbeatReader(beat_path(self._folder, rank)))

    def request_states(self, ranks: Mapping[int, RankProcess]) -> StateRequest:
        """Ask the running ranks for their stacks."""
        return StateRequest(self._folder, ranks)

    def collect_states(self, ranks: Mapping[int, RankProcess], wait: float) -> dict[int, RankState]:
        """States of the running ranks, which have `wait` seconds to write their stacks."""
        request = self.request_states(ranks)
        _wait_until(request.has_stacks, wait)
        return request.read()

    def collect_states_with_records(
        self, ranks: Mapping[int, RankProcess], wait: float, record_wait: float
    ) -> dict[int, RankState]:
        """As `collect_states`, with the flight records that ranks write within `record_wait` seconds."""
        request = self.request_states(ranks)
        request.request_flight_records()
        _wait_until(request.has_stacks, wait)
        _wait_until(request.has_flight_records, record_wait)
        return request.read()

    def collect_outcomes(
        self,
        ranks: Mapping[int, RankProcess],
        states: Mapping[int, RankState],
        hung: Mapping[int, str] | None = None,
    ) -> list[RankOutcome]:
        """How each rank ended, or what it is doing. `hung` has the position of each rank that the others wait for."""
        has_oom_kill = count_oom_kills(self._counters) > self._oom_kills
        found: list[RankOutcome] = []
        for rank, process in ranks.items():
            status, heartbeat = self.read_status(rank), self.read_heartbeat(rank)
            state = states.get(rank)
            step = BEFORE_TRAINING if heartbeat is None else heartbeat.step
            found.append(
                RankOutcome(
                    rank=rank,
                    host=self._host,
                    exit_code=process.exit_code,
                    time=process.ended,
                    step=step if self._has_steps else NO_STEPS,
                    error=status.error,
                    log=None if status.log is None else str(status.log),
                    last_lines=read_last_lines(status.log),
                    out_of_memory=has_oom_kill and process.exit_code == -9,
                    doing=(hung or {}).get(rank) or (state.doing if state else None),
                    hung=rank in (hung or {}),
                    exits=status.exits,
                    last_beat=None if heartbeat is None else time.time() - time.monotonic() + heartbeat.clock,
                )
            )
        return found

    def save_stacks(self, states: Mapping[int, RankState], folder: Path) -> None:
        """Write the ranks' stacks and flight records into a folder of the run directory, for the user."""
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for rank, state in states.items():
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(flight_path(self._folder, rank), folder / f"rank-{rank}.flight.json")
                descriptor = os.open(
                    folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600
                )
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    collectives = state.heartbeat.collectives if state.heartbeat else "unknown"
                    file.write(f"{state.doing}\ncollectives entered: {collectives}\n\n{state.stacks or ''}")


def _wait_until(is_done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_done() and time.monotonic() < deadline:
        time.sleep(0.005)


def read_last_lines(path: Path | None, count: int = _LAST_LINES) -> tuple[str, ...]:
    """The last lines of a log, or its report of a crash; empty if the log cannot be read."""
    text = "" if path is None else read_tail(path, _TAIL_BYTES)
    lines = [line for line in text.splitlines() if line.strip()]
    crashes = [n for n, line in enumerate(lines) if line.startswith("Fatal Python error")]
    crashed_threads = [n for n, line in enumerate(lines) if line.startswith("Current thread")]
    if crashes and crashed_threads:
        # faulthandler's report is long: keep the error and the stack of the thread that crashed.
        return (lines[crashes[-1]], *_find_crash_stack(lines[crashed_threads[-1] :])[: count - 1])
    return tuple(lines[-count:])


def _find_crash_stack(lines: Sequence[str]) -> list[str]:
    """The header and the frames of the thread that crashed, innermost first, up to the outermost one of the user."""
    frames = list(itertools.takewhile(lambda line: line.startswith("  File "), lines[1:]))
    own = [n for n, line in enumerate(frames) if is_users_file(line.split('"')[1])]
    return [lines[0], *(frames[: own[-1] + 1] if own else frames)]


def find_oom_kill_counters(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[Path, ...]:
    """The files that count OOM kills: those of this process's cgroups (v1 or v2), then the machine's."""
    found: list[Path] = []
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if controllers == "":
            # In a container the path is that of the host, and the container's files are at the mount point.
            found += [cgroups / inside / "memory.events", cgroups / "memory.events"]
        elif "memory" in controllers.split(","):
            found += [cgroups / "memory" / inside / "memory.oom_control", cgroups / "memory/memory.oom_control"]
    found.append(proc / "vmstat")
    return tuple(dict.fromkeys(path for path in found if path.is_file()))


def count_oom_kills(counters: Iterable[Path]) -> int:
    """The sum of the `oom_kill` lines; it rises with each kill."""
    total = 0
    for path in counters:
        try:
            lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
            total += sum(int(fields[1]) for fields in lines if len(fields) == 2 and fields[0] == "oom_kill")
        except (OSError, ValueError):
            continue  # a cgroup is removed after its last process
    return total
