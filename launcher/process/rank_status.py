"""What a rank tells its agent: a small file for each rank in a private folder of the attempt.

The agent learns from it where the rank's log is, what it raised and when, and that it lives. Without an agent of ours
(plain torchrun, one process) nobody asks, and nothing is written.
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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.core.atomic_write import write_file
from launcher.core.errors import Interrupted, OutOfMemoryError, TrainingError, UsageError
from launcher.core.secrets import scrub
from launcher.process.heartbeat import BEFORE_TRAINING, HeartbeatWriter

FOLDER_VARIABLE = "LAUNCHER_ATTEMPT_DIR"
_TRACEBACK_LINES = 40
# Seconds between two looks at how many collectives this rank has entered.
_COLLECTIVES_EVERY = 1.0
# What another rank's death looks like from here, in the words of gloo, NCCL, c10d and ours.
_LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "connectfullmesh",
              "timed out waiting", "remote process exited", "ncclremoteerror", "ncclsystemerror", "socket timeout",
              "connection was likely closed", "read error", "application timeout caused pair closure",
              "the store that the ranks meet at is gone", "watchdog caught collective", "wait timeout",
              "timed out after waiting")  # fmt: skip
# What no second attempt mends.
_REPEATING = (UsageError, ImportError, SyntaxError)


@dataclass(frozen=True, slots=True)
class RankError:
    """What a rank raised.

    Attributes:
        kind: name of the exception's class.
        message: its text.
        traceback: its last lines.
        signature: equal for the same exception from the same place in the code.
        time: seconds since the epoch.
        step: optimizer steps done.
        lost_peer: whether it only says that another rank is gone.
        repeats: whether a second attempt would meet it again, whatever happens.
        explained: whether the message says all that there is to say.
        interrupted: whether a signal asked for it.
        next_strategy: what the config asks to go on with, out of memory.
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

    @classmethod
    def from_exception(cls, error: BaseException, now: float, step: int) -> RankError:
        """Describe what was raised; a `TrainingError` by what caused it, unless it says more."""
        no_memory = error if isinstance(error, OutOfMemoryError) else None
        cause = error.__cause__ if isinstance(error, TrainingError) and not no_memory and error.__cause__ else error
        frames = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(cause.__traceback__)]
        text = str(cause)
        lines = "".join(traceback.format_exception(cause)).rstrip().splitlines()
        return cls(
            kind=type(cause).__name__,
            message=text,
            traceback=tuple(lines[-_TRACEBACK_LINES:]),
            signature=hashlib.sha256(repr((type(cause).__name__, frames)).encode()).hexdigest()[:16],
            time=now,
            step=step,
            lost_peer=any(word in text.lower() for word in _LOST_PEER),
            repeats=isinstance(cause, _REPEATING),
            explained=isinstance(cause, UsageError | OutOfMemoryError),
            interrupted=isinstance(cause, Interrupted),
            next_strategy=no_memory.next_strategy if no_memory and no_memory.restarts else None,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankError:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**values, "traceback": tuple(values["traceback"])})


class RankStatusWriter:
    """The rank's side.

    Args:
        folder: the attempt's; None if nobody asks.
        rank: this rank.
        clock: seconds since the epoch.
    """

    def __init__(self, folder: Path | None, rank: int, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._rank = rank
        self._clock = clock
        self._values: dict[str, Any] = {}
        self._heart: HeartbeatWriter | None = None
        self._watched = threading.Event()
        self._secrets: tuple[Any, ...] = ()
        if folder is not None:
            # Without a sign of life the agent cannot see a hang; the training itself can go on.
            with contextlib.suppress(OSError):
                self._heart = HeartbeatWriter(beat_path(folder, rank))

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> RankStatusWriter:
        """The report of the rank that `env` describes."""
        return _report_of(env.get(FOLDER_VARIABLE), env.get("RANK", "0"))

    @property
    def has_agent(self) -> bool:
        """Whether an agent of ours reads this, and tells people what went wrong."""
        return self._folder is not None

    def update(self, **values: Any) -> None:
        """Add to what the agent knows: `log`, `run`. A sign of life too."""
        self._values.update(values)
        self._write()
        self.beat()

    def hide_values(self, values: Iterable[Any]) -> None:
        """Leave these values out of what is told of errors from now on."""
        self._secrets = tuple(values)

    def record_error(self, error: BaseException) -> None:
        """Tell what was raised; the first error stays."""
        if "error" in self._values or self._folder is None:
            return
        step = BEFORE_TRAINING if self._heart is None else self._heart.step
        told = RankError.from_exception(error, self._clock(), step)
        lines = tuple(scrub(line, self._secrets) for line in told.traceback)
        told = replace(told, message=scrub(told.message, self._secrets), traceback=lines)
        self._values["error"] = asdict(told)
        self._write()

    def write_traceback(self, error: BaseException) -> None:
        """Write the traceback into this rank's log; on the terminal too if no agent tells people what went wrong."""
        log = self._values.get("log")
        text = scrub("".join(traceback.format_exception(error)), self._secrets)
        if log is None or not self.has_agent:
            sys.stderr.write(text)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(OSError), open(log, "a", encoding="utf-8") as file:  # noqa: PTH123 -- str or Path
            file.write(text)

    def beat(self, step: int | None = None) -> None:
        """A sign of life."""
        if self._heart is not None:
            self._heart.beat(step)

    def announce_stack_dumps(self) -> None:
        """Say that the agent may ask for stacks."""
        if self._heart is not None:
            self._heart.announce_stack_dumps()

    def watch_collectives(self, count: Callable[[], int], record: Callable[[], str]) -> None:
        """Say once a second, from a thread, how many collectives this rank has entered; once asked, say which.

        Args:
            count: collectives that the process group has entered.
            record: what the flight recorder knows, as JSON.
        """
        heart, folder = self._heart, self._folder
        if heart is None or folder is None:
            return

        def watch() -> None:
            told = False
            # The group may end while it is asked.
            with contextlib.suppress(RuntimeError, ValueError):
                while not self._watched.wait(_COLLECTIVES_EVERY):
                    heart.collectives(count())
                    if not told and flight_request_path(folder).exists():
                        told = True
                        with contextlib.suppress(OSError):
                            write_file(flight_path(folder, self._rank), record())

        threading.Thread(target=watch, name="launcher-collectives", daemon=True).start()

    def close(self) -> None:
        """Let the thread end."""
        self._watched.set()

    def _write(self) -> None:
        if self._folder is None:
            return
        # A full disk must not end a training. The agent on this machine reads it through memory.
        with contextlib.suppress(OSError):
            text = json.dumps(self._values, default=str)
            write_file(report_path(self._folder, self._rank), text, durable=False)


@functools.cache
def _report_of(folder: str | None, rank: str) -> RankStatusWriter:
    """One for the process, wherever it is asked for: what it has told must stay told."""
    return RankStatusWriter(Path(folder) if folder else None, int(rank) if rank.isdecimal() else 0)


@dataclass(frozen=True, slots=True)
class RankStatus:
    """The agent's side: what a rank has told.

    Attributes:
        log: the file that its output is in.
        run: the run's directory.
        error: what it raised.
    """

    log: Path | None = None
    run: Path | None = None
    error: RankError | None = None


def read_status(folder: Path, rank: int) -> RankStatus:
    """What the rank has told so far; nothing if it did not come to it."""
    try:
        values = json.loads(report_path(folder, rank).read_text(encoding="utf-8"))
        error = values.get("error")
        return RankStatus(
            log=Path(values["log"]) if values.get("log") else None,
            run=Path(values["run"]) if values.get("run") else None,
            error=RankError.from_dict(error) if error else None,
        )
    except (OSError, ValueError, TypeError, KeyError):
        return RankStatus()


def report_path(folder: Path, rank: int) -> Path:
    """The file of what a rank tells."""
    return folder / f"rank-{rank}.json"


def beat_path(folder: Path, rank: int) -> Path:
    """The file of a rank's signs of life."""
    return folder / f"rank-{rank}.beat"


def flight_request_path(folder: Path) -> Path:
    """The agent makes this file to ask all ranks for their flight records."""
    return folder / "flight-wanted"


def flight_path(folder: Path, rank: int) -> Path:
    """The file of a rank's flight record."""
    return folder / f"rank-{rank}.flight.json"


def stacks_path(folder: Path, rank: int) -> Path:
    """The file that a rank's stacks go to."""
    return folder / f"rank-{rank}.stacks"
