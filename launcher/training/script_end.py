"""All ranks of a script leave a failed training before the script starts the next one.

Each rank writes to the store how it left. A rank whose code raised an error waits for the others, which raise too or
lose the connection to it. A rank that does not arrive is dead, or in a collective that does not end.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from launcher.agreement.process_group import announce_error, rank_zero_prints_error
from launcher.agreement.script_ranks import end_script_ranks, is_script_rank, list_ended_ranks
from launcher.core.error_display import format_failure, show_once
from launcher.core.errors import Interrupted, LauncherError, TrainingError, UsageError
from launcher.core.secrets import scrub
from launcher.hardware.topology import Topology
from launcher.process.rank_status import RankError

P = ParamSpec("P")
R = TypeVar("R")
# Seconds that the other ranks have to leave a training after this one failed.
_GRACE = 10.0
# Seconds until the other ranks are ended after Ctrl-C.
_GRACE_AT_CTRL_C = 1.0
_POLL_INTERVAL = 0.05
# Seconds that another rank waits for rank zero to print the error that ends both.
_REPORT_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class _Training:
    """The training that the ranks are in."""

    store: Any
    rank: int
    world_size: int

    def report_end(self, end: Mapping[str, Any]) -> None:
        self.store.set(_key(self.rank), json.dumps(end))

    def await_all(self) -> list[int]:
        """Wait until all ranks have left; return those that have ended or timed out without doing so."""
        keys = [_key(rank) for rank in range(self.world_size)]
        deadline = time.monotonic() + _GRACE
        try:
            while not self.store.check(keys):
                missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                if time.monotonic() > deadline or not list_ended_ranks().keys().isdisjoint(missing):
                    return missing
                time.sleep(_POLL_INTERVAL)
        except RuntimeError:
            return [0]  # rank zero serves the store and has ended
        return []

    def read_failures(self) -> list[dict[str, Any]]:
        """The reports of the ranks that have failed, the first failure first."""
        keys = [_key(rank) for rank in range(self.world_size)]
        known = [key for key in keys if self.store.check([key])]
        failed = [end for text in self.store.multi_get(known) if (end := json.loads(text))] if known else []
        return sorted(failed, key=lambda end: (end["lost_peer"], end["time"]))


def _format_failures(failed: Sequence[Mapping[str, Any]], missing: Sequence[int]) -> str:
    """The report of the ranks that failed, the first failure first, and of those that did not leave the training."""
    first, *later = failed
    ended = list_ended_ranks()
    others = [f"rank {end['rank']} {end['end']}" for end in later]
    others += [f"rank {rank} {ended.get(rank, 'was ended')}" for rank in missing if rank != first["rank"]]
    return format_failure(first["text"], others, first["traceback"])


_current: list[_Training] = []


def _key(rank: int) -> str:
    return f"left/{rank}"


def _without(value: Any, secrets: Sequence[Any]) -> Any:
    """A text, or a sequence of texts, without the secrets."""
    if isinstance(value, tuple):
        return [scrub(line, secrets) for line in value]
    return scrub(value, secrets) if isinstance(value, str) else value


@contextmanager
def announce_end_of_training(store: Any, topology: Topology, secrets: Iterable[Any]) -> Iterator[None]:
    """Report to the other ranks of this script how the training inside ended on this one, without the secrets.

    The store has keys of this training only.
    """
    if topology.world_size == 1 or not is_script_rank():
        yield
        return
    training = _Training(store, topology.rank, topology.world_size)
    _current[:] = [training]
    try:
        yield
    except Interrupted:
        training.report_end({})
        raise
    except Exception as error:
        found = RankError.from_exception(error, time.time(), 0)
        what = f"{found.kind}: {found.message}"
        end = "lost the connection to another rank" if found.lost_peer else what
        values = {"rank": topology.rank, "text": f"rank {topology.rank} ({topology.host}) failed first: {what}",
                  "end": end, "traceback": found.traceback, "time": found.time,
                  "lost_peer": found.lost_peer}  # fmt: skip
        hidden = list(secrets)
        training.report_end({name: _without(value, hidden) for name, value in values.items()})
        raise
    training.report_end({})


@contextmanager
def leave_together() -> Iterator[None]:
    """Around a training of a script's ranks: raise its error only after all ranks have left the training.

    Raises:
        TrainingError: names the rank that failed first, if this rank only lost the connection to it.
        SystemExit: rank zero does not leave the training, so the script cannot use this rank any more.
    """
    _current.clear()
    try:
        yield
    except Interrupted as error:
        if error.step == 0:
            # Before the training the ranks are not at the same place; others may wait for this one.
            end_script_ranks(_GRACE_AT_CTRL_C)
        raise
    except Exception as error:
        if not _current:
            if isinstance(error, UsageError):
                raise  # on every rank
            end_script_ranks()
            raise
        _raise_first_failure(_current.pop(), error)
        raise
    except BaseException as error:  # otherwise the other ranks would wait in a collective; raised on
        if isinstance(error, KeyboardInterrupt):
            # The others received it too, or wait for this rank. Without this, every rank would print a traceback.
            end_script_ranks(_GRACE_AT_CTRL_C)
            raise Interrupted(signal.SIGINT, checkpoint=None, step=0).for_script() from None
        end_script_ranks()
        raise


def _raise_first_failure(training: _Training, error: Exception) -> None:
    """Wait for the other ranks; raise an error that explains `error` if there is one."""
    missing = training.await_all()
    ended = list_ended_ranks()
    if missing and training.rank == 0:
        # Within a collective they take SIGTERM as a request to save, which they cannot do.
        end_script_ranks(0.0, 1.0)
    elif 0 in missing:
        # Rank zero is in a collective that this rank has left, and detects the end of this rank.
        raise SystemExit(1) from error
    if not isinstance(error, TrainingError):
        return
    failed = training.read_failures()
    if failed and not failed[0]["lost_peer"]:
        error.report = _format_failures(failed, missing)
        if failed[0]["rank"] != training.rank and RankError.from_exception(error, 0.0, 0).lost_peer:
            raise TrainingError(failed[0]["text"], rank=failed[0]["rank"], report=error.report) from error
    elif ended and training.rank == 0:
        names = "; ".join(f"rank {rank} of this script {how}" for rank, how in ended.items())
        raise TrainingError(f"{names}; rank 0 then failed: {error}", rank=min(ended)) from error


def shows_errors() -> bool:
    """Whether this rank of a script prints the error that ends it: one rank prints it for all, rank zero if it ends.

    Rank zero waits for the others to end, so that the error is the last line on the terminal.
    """
    if not is_script_rank():
        return True
    if os.environ["RANK"] == "0":
        announce_error()
        end_script_ranks()
        return True
    give_up = time.monotonic() + _REPORT_TIMEOUT
    while time.monotonic() < give_up:
        if rank_zero_prints_error():
            return False
        time.sleep(_POLL_INTERVAL)
    return True


def ends_script(train: Callable[P, R]) -> Callable[P, R]:
    """Make `train` raise the error that ends a script after all its resources are released; see `show_once`."""

    @functools.wraps(train)
    def outer(*args: P.args, **options: P.kwargs) -> R:
        try:
            return train(*args, **options)
        except Interrupted as error:
            if error.users_handler is not None:
                error.users_handler()
            raise error.for_script() from None
        except LauncherError as error:
            if options.get("stays_open", True):
                show_once(error, shows_errors)
            raise

    return outer
