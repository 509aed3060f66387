"""Asks the ranks of this node for their stacks and flight records, and reads the answers; never waits for them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.agent.flight_recorder import read_flight_record
from launcher.agent.hang_detection import RankState, describe_wait
from launcher.agent.rank_activity import describe_wait_channel, read_process_status, read_wait_channel
from launcher.agent.rank_main import STACKS_SIGNAL
from launcher.process.heartbeat import UNKNOWN, Heartbeat, read_heartbeat
from launcher.process.rank_status import beat_path, flight_path, flight_request_path, stacks_path

# psutil's names of process states in which a process does not answer a signal.
_UNRESPONSIVE = {"stopped", "zombie", "dead"}


@dataclass(frozen=True, slots=True)
class RankProcess:
    """One of this agent's ranks; `ended` is the time when the agent saw it end, in seconds since the epoch."""

    pid: int
    exit_code: int | None
    ended: float = 0.0


class StateRequest:
    """One request to the running ranks, which write into the attempt's folder; it is sent at once."""

    def __init__(self, folder: Path, ranks: Mapping[int, RankProcess]) -> None:
        self._folder = folder
        self._pids = {rank: process.pid for rank, process in ranks.items() if process.exit_code is None}
        self._heartbeats = {rank: read_heartbeat(beat_path(folder, rank)) for rank in self._pids}
        self._statuses = {rank: read_process_status(pid) for rank, pid in self._pids.items()}
        self._stacks: dict[int, str] = {}
        # Where the answer starts in the file of each rank that can answer.
        self._starts = {
            rank: path.stat().st_size if (path := stacks_path(folder, rank)).exists() else 0
            for rank, beat in self._heartbeats.items()
            if beat is not None and beat.dumps_stacks and self._statuses[rank] not in _UNRESPONSIVE
        }
        for rank in self._starts:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids[rank], STACKS_SIGNAL)
        self._records: dict[int, Path] = {}

    def has_stacks(self) -> bool:
        """Whether all ranks that can write their stacks have done so."""
        for rank, start in self._starts.items():
            if rank not in self._stacks and (text := _read_complete_stacks(stacks_path(self._folder, rank), start)):
                self._stacks[rank] = text
        return len(self._stacks) == len(self._starts)

    def request_flight_records(self) -> None:
        """Ask for the flight records: a rank looks for this request once a second."""
        self._records = {
            rank: flight_path(self._folder, rank)
            for rank, beat in self._heartbeats.items()
            if beat is not None and beat.collectives != UNKNOWN and self._statuses[rank] not in _UNRESPONSIVE
        }
        with contextlib.suppress(OSError):
            for path in self._records.values():
                path.unlink(missing_ok=True)
            flight_request_path(self._folder).touch(mode=0o600)

    def has_flight_records(self) -> bool:
        """Whether all ranks that record collectives have written their record."""
        return all(path.exists() for path in self._records.values())

    def read(self) -> dict[int, RankState]:
        """The states by the answers so far."""
        self.has_stacks()
        return {rank: self._read(rank, beat) for rank, beat in self._heartbeats.items()}

    def _read(self, rank: int, beat: Heartbeat | None) -> RankState:
        stacks = self._stacks.get(rank)
        record = read_flight_record(self._records[rank]) if rank in self._records else None
        wait = describe_wait(stacks or "", describe_wait_channel(read_wait_channel(self._pids[rank])))
        return RankState(beat, self._statuses[rank], stacks, record, wait)


def _read_complete_stacks(path: Path, start: int) -> str | None:
    """The text after `start`; None until it ends with the main thread's outermost frame."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return None
    return text if text.endswith("\n") and (" in <module>" in text or "  ...\n" in text) else None
