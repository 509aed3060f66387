"""What an agent can find out about its ranks while and after they run: their words, logs, stacks and process states."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.agent.failure_report import RankEnd
from launcher.agent.flight_recorder import read_flight_record
from launcher.agent.hang_detection import RankState
from launcher.process.heartbeat import BEFORE_TRAINING, UNKNOWN, Heartbeat, read_beat
from launcher.process.oom_kills import count_oom_kills, oom_kill_counters
from launcher.process.rank_status import (
    RankStatus,
    beat_path,
    flight_path,
    flight_request_path,
    read_status,
    stacks_path,
)

_LAST_LINES = 16
_TAIL_BYTES = 16384


@dataclass(frozen=True, slots=True)
class RankProcess:
    """One of this agent's ranks.

    Attributes:
        rank: global rank.
        pid: its process.
        exit_code: None while it runs.
        ended: when the agent saw it end, in seconds since the epoch.
    """

    rank: int
    pid: int
    exit_code: int | None
    ended: float = 0.0


class RankEvidence:
    """Reads what the ranks of one attempt leave in its folder.

    Args:
        folder: the attempt's.
        ask_for_stacks: sends a process the signal upon which it writes its stacks.
        clock: CLOCK_MONOTONIC, in seconds.
    """

    def __init__(
        self, folder: Path, ask_for_stacks: Callable[[int], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._ask = ask_for_stacks
        self._clock = clock
        self._counters = oom_kill_counters()
        self._oom_kills = count_oom_kills(self._counters)
        self._host = socket.gethostname()

    def beat(self, rank: int) -> Heartbeat | None:
        """The rank's last sign of life."""
        return read_beat(beat_path(self._folder, rank))

    def words(self, rank: int) -> RankStatus:
        """What the rank has told."""
        return read_status(self._folder, rank)

    def run_directory(self, ranks: Mapping[int, RankProcess]) -> Path | None:
        """The run's directory, once a rank knows it."""
        return next((words.run for rank in ranks if (words := self.words(rank)).run is not None), None)

    def states(self, ranks: Mapping[int, RankProcess], wait: float) -> dict[int, RankState]:
        """What the running ranks are doing.

        Args:
            ranks: all of this agent's.
            wait: seconds to give them to write their stacks.
        """
        running = {rank: process for rank, process in ranks.items() if process.exit_code is None}
        beats = {rank: self.beat(rank) for rank in running}
        letters = {rank: process_state(process.pid) for rank, process in running.items()}
        asked = {
            rank: _size(stacks_path(self._folder, rank))
            for rank in running
            if (beat := beats[rank]) is not None and beat.dumps_stacks and letters[rank] not in "TZX"
        }
        for rank in asked:
            self._ask(running[rank].pid)
        give_up = self._clock() + wait
        texts: dict[int, str] = {}
        while len(texts) < len(asked) and self._clock() < give_up:
            for rank, before in asked.items():
                if rank not in texts and (text := _complete(stacks_path(self._folder, rank), before)):
                    texts[rank] = text
            time.sleep(0.005)
        return {rank: RankState(beats[rank], letters[rank], texts.get(rank)) for rank in running}

    def ends(
        self,
        ranks: Mapping[int, RankProcess],
        states: Mapping[int, RankState],
        hung: Mapping[int, str] | None = None,
    ) -> list[RankEnd]:
        """How each rank ended, or what it was doing.

        Args:
            ranks: all of this agent's.
            states: of those that still ran.
            hung: the ranks that the others waited for, and what they did.
        """
        killed_for_memory = count_oom_kills(self._counters) > self._oom_kills
        found: list[RankEnd] = []
        for rank, process in ranks.items():
            words, beat = self.words(rank), self.beat(rank)
            state = states.get(rank)
            found.append(
                RankEnd(
                    rank=rank,
                    host=self._host,
                    exit_code=process.exit_code,
                    time=process.ended,
                    step=BEFORE_TRAINING if beat is None else beat.step,
                    error=words.error,
                    log=None if words.log is None else str(words.log),
                    last_lines=last_lines(words.log),
                    out_of_memory=killed_for_memory and process.exit_code == -9,
                    doing=(hung or {}).get(rank) or (state.doing if state else None),
                    hung=rank in (hung or {}),
                )
            )
        return found

    def with_flight_records(self, states: Mapping[int, RankState], wait: float) -> dict[int, RankState]:
        """The same with what the ranks' flight recorders know; once for each attempt, as it ends with a hang.

        Args:
            states: of the ranks that run.
            wait: seconds to give them to write it.
        """
        paths = {
            rank: flight_path(self._folder, rank)
            for rank, state in states.items()
            if state.beat is not None and state.beat.collectives != UNKNOWN and state.process_state not in "TZX"
        }
        with contextlib.suppress(OSError):
            flight_request_path(self._folder).touch(mode=0o600)
        give_up = self._clock() + wait
        while not all(path.exists() for path in paths.values()) and self._clock() < give_up:
            time.sleep(0.05)
        return {
            rank: dataclasses.replace(state, record=read_flight_record(paths[rank]) if rank in paths else None)
            for rank, state in states.items()
        }

    def keep_stacks(self, states: Mapping[int, RankState], folder: Path) -> None:
        """Write the ranks' stacks and flight records into the run's directory, for people."""
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for rank in states:
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(flight_path(self._folder, rank), folder / f"rank-{rank}.flight.json")
            for rank, state in states.items():
                descriptor = os.open(
                    folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600
                )
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    collectives = state.beat.collectives if state.beat else "unknown"
                    file.write(f"{state.doing}\ncollectives entered: {collectives}\n\n{state.stacks or ''}")


def process_state(pid: int) -> str:
    """The kernel's letter for what a process does: R, S, D, T, Z; X if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def last_lines(path: Path | None, count: int = _LAST_LINES) -> tuple[str, ...]:
    """The last lines of a log, or how it says that the process crashed; none if it cannot be read."""
    if path is None:
        return ()
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ()
    lines = [line for line in text.splitlines() if line.strip()]
    crash = [n for n, line in enumerate(lines) if line.startswith("Fatal Python error")]
    guilty = [n for n, line in enumerate(lines) if line.startswith("Current thread")]
    if crash and guilty:
        # faulthandler's report of a crash is long: what happened, and where the thread was that did it.
        return (lines[crash[-1]], *lines[guilty[-1] : guilty[-1] + count - 1])
    return tuple(lines[-count:])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _complete(path: Path, before: int) -> str | None:
    """What was written since, once the main thread's outermost frame is there."""
    try:
        with path.open("rb") as file:
            file.seek(before)
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return None
    return text if text.endswith("\n") and (" in <module>" in text or "  ...\n" in text) else None
