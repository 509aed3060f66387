"""How the ranks of a script leave a training that failed: all of them, so that they can go on to the script's next one.

Each rank writes to the store how it left. One whose code raised waits a moment for the others: they raise too, or lose
the connection to it. What does not come is in a collective that never ends, or dead.
"""

from __future__ import annotations

import functools
import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from launcher.agreement.script_ranks import end_script_ranks, ended_ranks, is_script_rank
from launcher.core.errors import Interrupted, TrainingError, UsageError
from launcher.core.secrets import scrub
from launcher.hardware.topology import Topology
from launcher.process.rank_status import RankError

P = ParamSpec("P")
R = TypeVar("R")
# Seconds that the other ranks have to leave a training in which this one failed.
_GRACE = 10.0
# The same before they are ended, after Ctrl-C.
_GRACE_AT_CTRL_C = 1.0
_PAUSE = 0.05


@dataclass(frozen=True, slots=True)
class _Training:
    """What the ranks are in now."""

    store: Any
    rank: int
    world_size: int

    def tell(self, how: Mapping[str, Any]) -> None:
        self.store.set(_key(self.rank), json.dumps(how))

    def await_all(self) -> list[int]:
        """Wait until all ranks have left; the ranks that have not, once that is for good."""
        keys = [_key(rank) for rank in range(self.world_size)]
        give_up = time.monotonic() + _GRACE
        try:
            while not self.store.check(keys):
                missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                if time.monotonic() > give_up or not ended_ranks().keys().isdisjoint(missing):
                    return missing
                time.sleep(_PAUSE)
        except RuntimeError:
            return [0]  # the store has ended with it
        return []

    def first_failure(self) -> dict[str, Any] | None:
        """What the rank that failed first told; None if all of them only lost another one."""
        told = [json.loads(text) for text in self.store.multi_get([_key(rank) for rank in range(self.world_size)])]
        failed = [how for how in told if how and not how["lost_peer"]]
        return min(failed, key=lambda how: how["time"], default=None)


_now: list[_Training] = []


def _key(rank: int) -> str:
    return f"left/{rank}"


@contextmanager
def announce_end_of_training(store: Any, topology: Topology, secrets: Iterable[Any]) -> Iterator[None]:
    """Tell the other ranks of this script how the training inside ended on this one.

    Args:
        store: of this training alone.
        topology: this rank's place.
        secrets: values that are left out of what is told.
    """
    if topology.world_size == 1 or not is_script_rank():
        yield
        return
    training = _Training(store, topology.rank, topology.world_size)
    _now[:] = [training]
    try:
        yield
    except Interrupted:
        training.tell({})
        raise
    except Exception as error:
        told = RankError.from_exception(error, time.time(), 0)
        text = scrub(f"rank {topology.rank} ({topology.host}) failed first: {told.kind}: {told.message}", secrets)
        training.tell({"rank": topology.rank, "text": text, "time": told.time, "lost_peer": told.lost_peer})
        raise
    training.tell({})


@contextmanager
def leave_together() -> Iterator[None]:
    """Around a training of a script's ranks: what it raises, it raises once all of them have left it.

    Raises:
        TrainingError: names the rank that failed first, where this one only lost the connection to it.
        SystemExit: rank zero does not leave the training, so this rank cannot be of use to the script.
    """
    _now.clear()
    try:
        yield
    except Interrupted:
        raise  # at one step, on every rank
    except Exception as error:
        if not _now:
            if isinstance(error, UsageError):
                raise  # every rank was refused
            end_script_ranks()
            raise
        training = _now.pop()
        missing = training.await_all()
        gone = ended_ranks()
        if missing and training.rank == 0:
            # In a collective they take SIGTERM as a wish to save, which they cannot.
            end_script_ranks(0.0, 1.0)
            if gone and isinstance(error, TrainingError):
                names = "; ".join(f"rank {rank} of this script {how}" for rank, how in gone.items())
                raise TrainingError(f"{names}; rank 0 then failed: {error}", rank=min(gone)) from error
        elif 0 in missing:
            # It is in a collective that this rank has left, and hears of this rank's end.
            raise SystemExit(1) from error
        elif isinstance(error, TrainingError) and not missing:
            first = training.first_failure()
            if first is not None and first["rank"] != training.rank and _lost_peer(error):
                raise TrainingError(first["text"], rank=first["rank"]) from error
        raise
    except BaseException as error:  # the others would wait in a collective; raised on
        if isinstance(error, KeyboardInterrupt):
            # They have it too, or wait for this one; Python's own traceback would come from every rank.
            end_script_ranks(_GRACE_AT_CTRL_C)
            raise Interrupted(signal.SIGINT, checkpoint=None, step=0).for_script() from None
        end_script_ranks()
        raise


def _lost_peer(error: TrainingError) -> bool:
    return RankError.from_exception(error, 0.0, 0).lost_peer


def ends_script(train: Callable[P, R]) -> Callable[P, R]:
    """Have `train` raise what ends a script after a signal, once all that it holds is closed and released."""

    @functools.wraps(train)
    def outer(*args: P.args, **options: P.kwargs) -> R:
        try:
            return train(*args, **options)
        except Interrupted as error:
            if error.users_handler is not None:
                error.users_handler()
            raise error.for_script() from None

    return outer
