"""Errors of a training or an evaluation: their events, and the error that the caller gets."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from launcher.checkpoint.manifest import read_step
from launcher.checkpoint.storage import explain_any_os_error
from launcher.core.errors import (
    Interrupted,
    LateUsageError,
    LauncherError,
    PlanError,
    StorageError,
    TrainingError,
    UsageError,
)
from launcher.core.event_text import name_stop_reason
from launcher.core.secrets import find_secrets, scrub
from launcher.planning.oom import device_peak, is_out_of_memory, out_of_memory
from launcher.process.rank_status import RankError
from launcher.runs.continuation import Stop, describe_stop, shorten
from launcher.runs.oom_record import OomRecord, add_oom_record
from launcher.runs.selection import find_last_checkpoint
from launcher.training.context import RunContext
from strategies.choice import StrategyError

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.training.stop.progress import StopProgress
    from launcher.training.stop.signals import SignalListener

# What torch reports when a loader's worker has ended.
_LOST_WORKER = re.compile(r"DataLoader worker \(pid")
_STORAGE_ADVICE = {
    "disk_full": "free space, or set another runs_dir",
    "quota": "free space, or set another runs_dir",
    "read_only": "make the disk writable, or set another runs_dir",
    "no_permission": "correct the folder's permissions, or set another runs_dir",
}


@contextlib.contextmanager
def error_boundary(ctx: RunContext, explain: Callable[[RunContext, Exception], Exception]) -> Iterator[None]:
    """Replace an error inside by the one that `explain` returns.

    It is `record_failure` for a training; `explain_error` for an evaluation, which does not change the run's state.
    """
    try:
        yield
    except Exception as error:
        failure = explain(ctx, error)
        if failure is error:
            raise
        raise failure from error


@contextlib.contextmanager
def late_usage_boundary(ctx: RunContext, has_trained: Callable[[], bool]) -> Iterator[None]:
    """Replace an error of the request that is found after a batch was trained; before it, the error is not changed.

    Raises:
        LateUsageError: names the run's last checkpoint; its exit code is that of a failed training.
    """
    try:
        yield
    except (UsageError, StrategyError) as error:
        if not has_trained():
            raise
        kept, newest = _describe_last_checkpoint(ctx)
        text = f"{error}\nthe training stopped; {kept}; correct this, then run again with the same name"
        advice = "" if newest is None else " and --resume auto"
        late = LateUsageError(f"{text}{advice}", rank=ctx.topology.rank)
        late.checkpoint = None if newest is None else str(newest)
        raise late from error


@contextlib.contextmanager
def interrupt_boundary(ctx: RunContext, listener: SignalListener) -> Iterator[None]:
    """Replace an error that Ctrl-C has caused by the interruption.

    Raises:
        Interrupted: Ctrl-C, which a terminal sends to every process of a script, ended a process that this rank needs.
    """
    try:
        yield
    except Exception as error:
        is_caused = _LOST_WORKER.match(str(error)) or RankError.from_exception(error, 0.0, 0).lost_peer
        if listener.first != signal.SIGINT or not is_caused:
            raise
        newest = find_last_checkpoint(ctx.run.checkpoints)
        saved = None if newest is None else str(newest)
        raise Interrupted(signal.SIGINT, checkpoint=saved, step=listener.progress.step) from error


@contextlib.contextmanager
def record_ending(ctx: RunContext) -> Iterator[None]:
    """Write the event of an error or of Ctrl-C that ends the attempt, unless `record_failure` has written it.

    Raises:
        Interrupted: for a KeyboardInterrupt, which no training has handled.
    """
    try:
        yield
    except KeyboardInterrupt:
        interruption = Interrupted(signal.SIGINT, checkpoint=None, step=0)
        interruption.run = str(ctx.run.path)
        record_interruption(ctx, interruption)
        if ctx.stays_open and ctx.topology.rank == 0:
            # Imported here: without Lightning, the coordinator's error has the install command.
            from launcher.training.stop.signals import write_line

            write_line(describe_stop(Stop(signal.SIGINT)))
        raise interruption from None
    except Exception as error:
        if not getattr(error, "is_recorded", False):
            _write_failed(ctx, error)
        raise


def record_failure(ctx: RunContext, error: Exception, progress: StopProgress) -> Exception:
    """Write an error to the run's events; see `explain_error`."""
    done = progress.trained_step
    is_explained = isinstance(error, LauncherError | StrategyError)
    if not is_explained and is_out_of_memory(error):
        failure = _record_out_of_memory(ctx, error, done)
    else:
        failure = explain_error(ctx, error)
        _write_failed(ctx, failure if isinstance(failure, StorageError) else error, done)
    if isinstance(failure, LauncherError):
        failure.is_recorded = True
    return failure


def _write_failed(ctx: RunContext, error: Exception, done: int | None = None) -> None:
    """Write the event of an error after `done` optimizer steps, with what `status` needs to explain it."""
    is_explained = isinstance(error, LauncherError | StrategyError)
    storage = error if isinstance(error, StorageError) else StorageError("", reason=_name_reason(error))
    text = str(error) if is_explained else _describe(ctx, error)
    newest, step = _find_checkpoint(ctx)
    ctx.output.events.write("failed", step=done, host=ctx.topology.host, error=text, reason=storage.reason,
                            checkpoint=newest, checkpoint_step=step, folder=storage.folder,
                            needed_bytes=storage.needed_bytes, free_bytes=storage.free_bytes)  # fmt: skip


def explain_error(ctx: RunContext, error: Exception) -> Exception:
    """The error to raise: the launcher's own errors unchanged, others as one that names the rank.

    The tracebacks of other errors are written to this rank's log.
    """
    if isinstance(error, StrategyError):
        # Only the optimizer, which Lightning creates late, could show this obstacle.
        return PlanError(str(error))
    if isinstance(error, StorageError):
        return _with_checkpoint(ctx, error)
    if isinstance(error, LauncherError):
        return error
    # Any exception of the user's code. It is reported at once: W&B may take time to end, and until then other ranks
    # of the run may end this one.
    storage = explain_any_os_error(error, ctx.run.path)
    ctx.status.record_error(error if storage is None else storage)
    ctx.status.write_traceback(error, is_raised=ctx.stays_open)
    if storage is not None:
        return _with_checkpoint(ctx, storage)
    rank, host = ctx.topology.rank, ctx.topology.host
    return TrainingError(f"rank {rank} ({host}): {_describe(ctx, error)}", rank=rank)


def _with_checkpoint(ctx: RunContext, error: StorageError) -> StorageError:
    """The error with the run's newest checkpoint, and what to do."""
    kept, newest = _describe_last_checkpoint(ctx)
    explained = StorageError(
        f"{error}; {kept}; {_STORAGE_ADVICE[error.reason]}, then run again",
        reason=error.reason,
        folder=error.folder,
        needed_bytes=error.needed_bytes,
        free_bytes=error.free_bytes,
        rank=ctx.topology.rank,
    )
    explained.checkpoint = None if newest is None else str(newest)
    explained.run = str(ctx.run.path)
    return explained


def _describe_last_checkpoint(ctx: RunContext) -> tuple[str, Path | None]:
    newest = find_last_checkpoint(ctx.run.checkpoints)
    if newest is None:
        return "no checkpoint was saved before", None
    step = read_step(newest)
    return f"the last valid checkpoint is {shorten(newest)}" + ("" if step is None else f" (step {step})"), newest


def record_interruption(ctx: RunContext, interruption: Interrupted, *, is_second: bool = False) -> None:
    """Write to the run's events that a signal stopped it; a second one ends it at once."""
    number = interruption.signal_number
    ctx.output.events.write("interrupted", signal=number, step=interruption.step, checkpoint=interruption.checkpoint,
                            reason=name_stop_reason(number), second=is_second)  # fmt: skip


def _name_reason(error: Exception) -> str:
    if isinstance(error, UsageError | LateUsageError | StrategyError):
        return "usage"
    return "lost_connection" if RankError.from_exception(error, 0.0, 0).lost_peer else "exception"


def _find_checkpoint(ctx: RunContext) -> tuple[str | None, int | None]:
    """Path and step of the newest valid checkpoint: an earlier event may be about one that was not written."""
    newest = find_last_checkpoint(ctx.run.checkpoints)
    return (None, None) if newest is None else (str(newest), read_step(newest))


def _describe(ctx: RunContext, error: Exception) -> str:
    return scrub(f"{type(error).__name__}: {error}", find_secrets(ctx.config.to_dict()).values())


def _record_out_of_memory(ctx: RunContext, error: Exception, done: int | None) -> Exception:
    plan, topology = ctx.plan, ctx.topology
    failure = out_of_memory(error, plan, rank=topology.rank, host=topology.host,
                            allocated_bytes=device_peak(plan.device_kind), on_oom=ctx.config.on_oom)  # fmt: skip
    newest, step = _find_checkpoint(ctx)
    ctx.output.events.write("out_of_memory", step=done, host=topology.host, strategy=plan.strategy.name,
                            next=failure.next_strategy, next_checkpointed=failure.next_checkpointed,
                            expected_bytes=failure.expected_bytes,
                            allocated_bytes=failure.allocated_bytes, go_on=failure.restarts,
                            checkpoint=newest, checkpoint_step=step)  # fmt: skip
    add_oom_record(ctx.run.path, OomRecord.of(ctx.config.to_dict(), plan.to_dict()))
    ctx.status.write_traceback(error, is_raised=ctx.stays_open)
    return failure
