"""A training that ended with an error: what is recorded of it, and the error that the caller gets."""

from __future__ import annotations

from launcher.core.errors import Interrupted, LauncherError, PlanError, TrainingError
from launcher.core.secrets import find_secrets, scrub
from launcher.planning.oom import device_peak, is_out_of_memory, out_of_memory
from launcher.runs.oom_record import OomRecord, add_oom_record
from launcher.training.context import RunContext
from strategies.choice import StrategyError


def record_failure(ctx: RunContext, error: Exception) -> Exception:
    """Write an error to the run's events, and this rank's traceback where it is not explained.

    Returns:
        The error to raise: the same one if it is the launcher's own, else one that names the rank.
    """
    if isinstance(error, LauncherError | StrategyError):
        ctx.output.events.write("failed", host=ctx.topology.host, error=str(error))
        # What only the optimizer could show, which Lightning makes late.
        return PlanError(str(error)) if isinstance(error, StrategyError) else error
    if is_out_of_memory(error):
        return _record_out_of_memory(ctx, error)
    # The user's code may raise anything; it is reported with this rank's name and handed on whole.
    text = scrub(f"{type(error).__name__}: {error}", find_secrets(ctx.config.to_dict()).values())
    ctx.output.events.write("failed", host=ctx.topology.host, error=text)
    ctx.status.record_error(error)
    # Now: W&B may take its time to end, and until then the others of this run may end this rank.
    ctx.status.write_traceback(error)
    return TrainingError(f"rank {ctx.topology.rank} ({ctx.topology.host}): {text}", rank=ctx.topology.rank)


def record_interruption(ctx: RunContext, interruption: Interrupted) -> None:
    """Write to the run's events that a signal stopped it."""
    ctx.output.events.write("interrupted", signal=interruption.signal_number, step=interruption.step,
                            checkpoint=interruption.checkpoint)  # fmt: skip


def _record_out_of_memory(ctx: RunContext, error: Exception) -> Exception:
    plan, topology = ctx.plan, ctx.topology
    told = out_of_memory(error, plan, rank=topology.rank, host=topology.host,
                         allocated_bytes=device_peak(plan.device_kind), on_oom=ctx.config.on_oom)  # fmt: skip
    ctx.output.events.write("out_of_memory", host=topology.host, strategy=plan.strategy.name, next=told.next_strategy,
                            expected_bytes=told.expected_bytes, allocated_bytes=told.allocated_bytes,
                            go_on=told.restarts)  # fmt: skip
    add_oom_record(ctx.run.path, OomRecord.of(ctx.config.to_dict(), plan.to_dict()))
    ctx.status.write_traceback(error)
    return told
