"""The status that a rank reports to its agent: a small file for each rank in a private folder of the attempt.

The agent reads from it where the rank's log is, which error it raised and when, and that it is alive. Without the
launcher's agent (torchrun, one process) nothing is written.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.core.atomic_write import write_file
from launcher.core.errors import Interrupted, LateUsageError, OutOfMemoryError, StorageError, TrainingError, UsageError
from launcher.core.secrets import scrub
from launcher.process.heartbeat import BEFORE_TRAINING, HeartbeatWriter
from strategies.sharding import describe_strategy

FOLDER_VARIABLE = "LAUNCHER_ATTEMPT_DIR"
# `multiprocessing` gives this exit code if the fork server died before it could report the real one.
FORK_SERVER_DIED = 255
_TRACEBACK_LINES = 40
# Seconds between two reports of the number of collectives.
_COLLECTIVES_EVERY = 1.0
# How gloo, NCCL, c10d and the launcher report that another rank has died.
_LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "connectfullmesh",
              "timed out waiting", "remote process exited", "ncclremoteerror", "ncclsystemerror", "socket timeout",
              "connection was likely closed", "read error", "application timeout caused pair closure",
              "cannot reach the store of the ranks", "watchdog caught collective", "wait timeout",
              "timed out after waiting")  # fmt: skip
# Errors that a restart cannot fix.
_REPEATING = (UsageError, LateUsageError, StorageError, ImportError, SyntaxError)
# Errors whose message is complete.
_EXPLAINED = (UsageError, LateUsageError, OutOfMemoryError, StorageError)


def _describe_next(error: OutOfMemoryError) -> str | None:
    name = error.next_strategy
    return None if name is None else describe_strategy(name, error.next_checkpointed)


def _shorten(lines: Sequence[str]) -> tuple[str, ...]:
    """The last lines of a traceback, from the start of a frame."""
    if len(lines) <= _TRACEBACK_LINES:
        return tuple(lines)
    tail = lines[-_TRACEBACK_LINES:]
    start = next((n for n, line in enumerate(tail) if line.startswith("  File ")), 0)
    return ("Traceback (most recent call last):", "  ...", *tail[start:])


def has_lost_peer(error: BaseException) -> bool:
    """Whether an exception only reports that another rank has ended."""
    return any(part in str(error).lower() for part in _LOST_PEER)


@dataclass(frozen=True, slots=True)
class RankError:
    """An exception that a rank raised; `kind` is the name of its class.

    Attributes:
        traceback: the last lines of it.
        signature: equal for the same exception from the same place in the code.
        lost_peer: whether it only reports that another rank has ended.
        repeats: whether every further attempt would raise it again.
        explained: whether the message is complete, so that no traceback is needed.
        interrupted: whether a signal caused it.
        next_strategy: the strategy to restart with, as text, after running out of memory (`on_oom: next`).
        checkpoint: what a rank that a signal stopped has saved.
        storage: why a file could not be written, as `StorageError.reason`.
    """

    kind: str
    message: str
    traceback: tuple[str, ...]
    signature: str
    time: float
    step: int
    lost_peer: bool = False
    repeats: bool = False
    explained: bool = False
    interrupted: bool = False
    next_strategy: str | None = None
    checkpoint: str | None = None
    storage: str | None = None

    @classmethod
    def from_exception(cls, error: BaseException, now: float, step: int) -> RankError:
        """Describe an exception; a `TrainingError` by its cause, except one that explains it."""
        no_memory = error if isinstance(error, OutOfMemoryError) else None
        is_explained = isinstance(error, _EXPLAINED)
        cause = error.__cause__ if isinstance(error, TrainingError) and not is_explained and error.__cause__ else error
        frames = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(cause.__traceback__)]
        text = str(cause)
        lines = "".join(traceback.format_exception(cause)).rstrip().splitlines()
        return cls(
            kind=type(cause).__name__,
            message=text,
            traceback=_shorten(lines),
            signature=hashlib.sha256(repr((type(cause).__name__, frames)).encode()).hexdigest()[:16],
            time=now,
            step=cause.step if isinstance(cause, Interrupted) else step,
            lost_peer=has_lost_peer(cause),
            repeats=isinstance(cause, _REPEATING),
            explained=isinstance(cause, _EXPLAINED),
            interrupted=isinstance(cause, Interrupted),
            checkpoint=cause.checkpoint if isinstance(cause, Interrupted | LateUsageError | StorageError) else None,
            storage=cause.reason if isinstance(cause, StorageError) else None,
            next_strategy=_describe_next(no_memory) if no_memory and no_memory.restarts else None,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankError:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**values, "traceback": tuple(values["traceback"])})


class RankStatusWriter:
    """The rank's side; `folder` is the attempt's, None without an agent."""

    def __init__(self, folder: Path | None, rank: int, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._rank = rank
        self._clock = clock
        self._values: dict[str, Any] = {}
        self._heart: HeartbeatWriter | None = None
        self._watched = threading.Event()
        self._secrets: tuple[Any, ...] = ()
        if folder is not None:
            # Without a heartbeat the agent cannot detect a hang; the training itself can run.
            with contextlib.suppress(OSError):
                self._heart = HeartbeatWriter(beat_path(folder, rank))

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> RankStatusWriter:
        """The status writer of the rank that `env` describes."""
        return _writer_of(env.get(FOLDER_VARIABLE), env.get("RANK", "0"))

    @property
    def has_agent(self) -> bool:
        """Whether the launcher's agent reads this, and reports errors to the user."""
        return self._folder is not None

    def update(self, **values: Any) -> None:
        """Publish `log` or `run` to the agent. Counts as a heartbeat."""
        self._values.update(values)
        self._write()
        self.beat()

    def hide_values(self, values: Iterable[Any]) -> None:
        """Remove these values from the text of all later errors."""
        self._secrets = tuple(values)

    def record_error(self, error: BaseException) -> None:
        """Publish an exception; only the first one is kept."""
        if "error" in self._values or self._folder is None:
            return
        step = BEFORE_TRAINING if self._heart is None else self._heart.step
        record = RankError.from_exception(error, self._clock(), step)
        lines = tuple(scrub(line, self._secrets) for line in record.traceback)
        self._values["error"] = asdict(replace(record, message=scrub(record.message, self._secrets), traceback=lines))
        self._write()

    def write_traceback(self, error: BaseException, *, is_raised: bool = False) -> None:
        """Write the traceback into this rank's log, or to stderr if neither an agent nor a script reports the error.

        `is_raised` means that the user's script gets the error.
        """
        text = scrub("".join(traceback.format_exception(error)), self._secrets)
        if self._values.get("log") is None or not (self.has_agent or is_raised):
            sys.stderr.write(text)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.append_to_log(text)

    def append_to_log(self, text: str) -> None:
        """Write into this rank's log without showing it on the terminal; without a log, nothing happens."""
        log = self._values.get("log")
        if log is not None:
            # A message may contain a file name that is no UTF-8.
            content = text.encode(errors="backslashreplace")
            with contextlib.suppress(OSError), open(log, "ab") as file:  # noqa: PTH123 -- str or Path
                file.write(content)

    def beat(self, step: int | None = None) -> None:
        """Report that this rank is alive, and how many optimizer steps it has done."""
        if self._heart is not None:
            self._heart.beat(step)

    def enter_phase(self, phase: int) -> None:
        """Report that a `Phase` begins."""
        if self._heart is not None:
            self._heart.enter_phase(phase)

    def announce_stack_dumps(self) -> None:
        """Report that this rank writes its stacks on request."""
        if self._heart is not None:
            self._heart.announce_stack_dumps()

    def watch_collectives(self, count: Callable[[], int], record: Callable[[], str]) -> None:
        """Report the number of collectives once a second, from a thread; on request, write the flight record.

        `count` returns the number that the process group has entered, `record` the flight recorder's content as JSON.
        """
        heart, folder = self._heart, self._folder
        if heart is None or folder is None:
            return

        def watch() -> None:
            answered = 0
            # The group may end in the meantime.
            with contextlib.suppress(RuntimeError, ValueError):
                while not self._watched.wait(_COLLECTIVES_EVERY):
                    heart.set_collectives(count())
                    # The agent may ask again.
                    with contextlib.suppress(OSError):
                        requested = flight_request_path(folder).stat().st_mtime_ns
                        if requested != answered:
                            answered = requested
                            write_file(flight_path(folder, self._rank), record())

        threading.Thread(target=watch, name="launcher-collectives", daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        self._watched.set()

    def _write(self) -> None:
        if self._folder is None:
            return
        # A full disk must not end a training. The agent on this machine reads it through memory.
        with contextlib.suppress(OSError):
            text = json.dumps(self._values, default=str)
            write_file(report_path(self._folder, self._rank), text, durable=False)


@functools.cache
def _writer_of(folder: str | None, rank: str) -> RankStatusWriter:
    """One writer per process, so that the values published by one caller stay."""
    return RankStatusWriter(Path(folder) if folder else None, int(rank) if rank.isdecimal() else 0)


@dataclass(frozen=True, slots=True)
class RankStatus:
    """The agent's side: the log file, the run directory and the exception that a rank has published.

    Attributes:
        exits: whether it ends with exit code 255 itself, as after `sys.exit(-1)`.
        keeping: whether it is saving the state of its last step for the next attempt.
        not_kept: why it cannot save that state; None if it can, or has not tried.
    """

    log: Path | None = None
    run: Path | None = None
    error: RankError | None = None
    exits: bool = False
    keeping: bool = False
    not_kept: str | None = None


def read_status(folder: Path, rank: int) -> RankStatus:
    """The status that the rank has published so far."""
    try:
        values = json.loads(report_path(folder, rank).read_text(encoding="utf-8"))
        error = values.get("error")
        return RankStatus(
            log=Path(values["log"]) if values.get("log") else None,
            run=Path(values["run"]) if values.get("run") else None,
            error=RankError.from_dict(error) if error else None,
            exits=values.get("exits") is True,
            keeping=values.get("keeping") is True,
            not_kept=values.get("not_kept"),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return RankStatus()


def report_path(folder: Path, rank: int) -> Path:
    """The status file of a rank."""
    return folder / f"rank-{rank}.json"


def beat_path(folder: Path, rank: int) -> Path:
    """The heartbeat file of a rank."""
    return folder / f"rank-{rank}.beat"


def flight_request_path(folder: Path) -> Path:
    """The agent creates this file to request the flight records of all ranks."""
    return folder / "flight-wanted"


def flight_path(folder: Path, rank: int) -> Path:
    """The file of a rank's flight record."""
    return folder / f"rank-{rank}.flight.json"


def stacks_path(folder: Path, rank: int) -> Path:
    """The file of a rank's stacks."""
    return folder / f"rank-{rank}.stacks"
