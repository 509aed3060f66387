"""Errors of a training or an evaluation: their events, and the error that the caller gets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from launcher.core.errors import Interrupted, LauncherError, PlanError, TrainingError
from launcher.core.secrets import find_secrets, scrub
from launcher.planning.oom import device_peak, is_out_of_memory, out_of_memory
from launcher.runs.oom_record import OomRecord, add_oom_record
from launcher.training.context import RunContext
from strategies.choice import StrategyError


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


def record_failure(ctx: RunContext, error: Exception) -> Exception:
    """Write an error to the run's events; see `explain_error`."""
    is_explained = isinstance(error, LauncherError | StrategyError)
    if not is_explained and is_out_of_memory(error):
        return _record_out_of_memory(ctx, error)
    text = str(error) if is_explained else _describe(ctx, error)
    ctx.output.events.write("failed", host=ctx.topology.host, error=text)
    return explain_error(ctx, error)


def explain_error(ctx: RunContext, error: Exception) -> Exception:
    """The error to raise: the launcher's own errors unchanged, others as one that names the rank.

    The tracebacks of other errors are written to this rank's log.
    """
    if isinstance(error, StrategyError):
        # Only the optimizer, which Lightning creates late, could show this obstacle.
        return PlanError(str(error))
    if isinstance(error, LauncherError):
        return error
    # Any exception of the user's code. It is reported at once: W&B may take time to end, and until then other ranks
    # of the run may end this one.
    ctx.status.record_error(error)
    ctx.status.write_traceback(error, is_raised=ctx.stays_open)
    rank, host = ctx.topology.rank, ctx.topology.host
    return TrainingError(f"rank {rank} ({host}): {_describe(ctx, error)}", rank=rank)


def record_interruption(ctx: RunContext, interruption: Interrupted) -> None:
    """Write to the run's events that a signal stopped it."""
    ctx.output.events.write("interrupted", signal=interruption.signal_number, step=interruption.step,
                            checkpoint=interruption.checkpoint)  # fmt: skip


def _describe(ctx: RunContext, error: Exception) -> str:
    return scrub(f"{type(error).__name__}: {error}", find_secrets(ctx.config.to_dict()).values())


def _record_out_of_memory(ctx: RunContext, error: Exception) -> Exception:
    plan, topology = ctx.plan, ctx.topology
    failure = out_of_memory(error, plan, rank=topology.rank, host=topology.host,
                            allocated_bytes=device_peak(plan.device_kind), on_oom=ctx.config.on_oom)  # fmt: skip
    ctx.output.events.write("out_of_memory", host=topology.host, strategy=plan.strategy.name,
                            next=failure.next_strategy, expected_bytes=failure.expected_bytes,
                            allocated_bytes=failure.allocated_bytes, go_on=failure.restarts)  # fmt: skip
    add_oom_record(ctx.run.path, OomRecord.of(ctx.config.to_dict(), plan.to_dict()))
    ctx.status.write_traceback(error, is_raised=ctx.stays_open)
    return failure
