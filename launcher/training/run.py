"""The last step of the main path: Lightning trains according to the plan."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from launcher.checkpoint.background import BackgroundWriter
from launcher.checkpoint.manifest import remove_partial_checkpoints
from launcher.checkpoint.resume import explain_other_model, scaler_problem
from launcher.core.errors import Interrupted, describe_stop_signal
from launcher.core.secrets import find_secrets, redact
from launcher.hardware.topology import Topology
from launcher.loggers.selection import choose_loggers, list_own_loggers, wants_no_logger
from launcher.loggers.wandb_config import build_wandb_config
from launcher.loggers.wandb_run import QueuedWandbLogger
from launcher.planning.changes import PlanChanges
from launcher.planning.fit_plan import check_model
from launcher.runs.continuation import Stop, describe_stop
from launcher.runs.selection import find_last_checkpoint
from launcher.training.callbacks.events import EventWriter
from launcher.training.callbacks.memory import MeasuredMemory
from launcher.training.callbacks.progress import as_numbers
from launcher.training.callbacks.run_callbacks import RunParts, run_callbacks
from launcher.training.callbacks.run_checkpoint import find_best_checkpoint
from launcher.training.context import RunContext
from launcher.training.data.order import DataOrder, DataSplit
from launcher.training.end_reason import EndReason, find_end_reason, find_problem
from launcher.training.failures import (
    error_boundary,
    interrupt_boundary,
    late_usage_boundary,
    record_failure,
    record_interruption,
)
from launcher.training.loops.fit_loop import use_resumable_loops
from launcher.training.quiet_lightning import quiet_lightning
from launcher.training.result import FitResult
from launcher.training.resume.convert import loadable_checkpoint
from launcher.training.script_end import announce_end_of_training
from launcher.training.stop.agreement import StopAgreement
from launcher.training.stop.progress import StopProgress
from launcher.training.stop.signals import SignalListener, write_line
from launcher.training.trainer import build_trainer
from launcher.training.wandb_session import wandb_session
from launcher.user_code.objects import UserObjects, make_user_objects
from strategies.choice import AUTO


def train(ctx: RunContext) -> FitResult:
    """Create the model, the data and the Trainer, and fit.

    With `ctx.stays_open`, `launcher.process.open_resources` closes the W&B run of a successful training later.

    Raises:
        TrainingError, Interrupted, DataError, ResumeError: see `launcher.training.fit.fit`.
    """
    stop = StopAgreement(ctx.attempt_store, ctx.topology.rank, ctx.topology.world_size)
    # Lightning reads its rank from the environment on import; objects made before the Trainer may use it.
    vars(rank_zero_only)["rank"] = ctx.topology.rank
    # The listener stays until W&B has ended: torchrun ends the other ranks as soon as the first one has left.
    values = redact({"config": ctx.config.to_dict(), "plan": ctx.plan.to_dict()})
    secrets = find_secrets(ctx.config.to_dict()).values()
    announced = announce_end_of_training(ctx.attempt_store, ctx.topology, secrets)
    with _signal_listener(ctx, stop) as listener, wandb_session(ctx, values) as wandb_logger:
        try:
            interrupted = interrupt_boundary(ctx, listener)
            explain = functools.partial(record_failure, progress=listener.progress)
            with error_boundary(ctx, explain), _quiet_lightning(ctx), announced, interrupted:
                trainer, end = _fit(ctx, stop, listener, wandb_logger)
        except Interrupted as interruption:
            interruption.run = str(ctx.run.path)
            if ctx.stays_open:
                interruption.users_handler = listener.users_handler
                # The script then ends without a traceback.
                stopped = dataclasses.replace(Stop.of(interruption), script=ctx.arguments_to_continue)
                _print_on_rank_zero(describe_stop(stopped), ctx.topology)
            record_interruption(ctx, interruption)
            raise
        finally:
            stop.close()
    result = _result(ctx, trainer)
    if ctx.topology.rank == 0:
        ctx.output.events.write("finished", step=result.steps, metrics=dict(result.metrics),
                                checkpoint=result.checkpoint, epoch=trainer.current_epoch, reason=end.name,
                                message=end.message, problem=result.problem)  # fmt: skip
    if ctx.stays_open and listener.first is not None:
        # The signal came when the training had ended: the script must stop before it starts another training.
        saved = None if result.checkpoint is None else str(result.checkpoint)
        interruption = Interrupted(listener.first, checkpoint=saved, step=result.steps)
        interruption.users_handler = listener.users_handler
        interruption.run = str(ctx.run.path)
        raise interruption
    return result


def _quiet_lightning(ctx: RunContext) -> contextlib.AbstractContextManager[None]:
    # Lightning's advice is no event of the run.
    output = dataclasses.replace(ctx.output, records_notices=False)
    return quiet_lightning(notice=output.notice if output.is_rank_zero else None)


def _fit(
    ctx: RunContext, stop: StopAgreement, listener: SignalListener, wandb_logger: QueuedWandbLogger | None
) -> tuple[pl.Trainer, EndReason]:
    """Create the objects and train; exceptions of the user's code are not changed."""
    pl.seed_everything(ctx.config.seed, workers=True, verbose=False)
    measured = MeasuredMemory(ctx.plan.device_kind)
    objects = _user_objects(ctx)
    _notify_lost_loss_scale(ctx)
    changes = PlanChanges(ctx.plan, ctx.run, ctx.output)
    own = list_own_loggers(ctx.config, objects.loggers, ctx.run)
    loggers = choose_loggers(own, wandb_logger, ctx.run, is_off=wants_no_logger(ctx.config))
    background = BackgroundWriter(ctx.output.notice)
    described = _describe_model(ctx, objects)
    parts = RunParts(objects, stop, listener, measured, background, loggers, wandb_logger, described)
    events = EventWriter(ctx.output.events, background.after_write)
    on_unused = changes.unused_parameters if ctx.config.strategy == AUTO else None
    callbacks = run_callbacks(ctx, parts, events)
    trainer = build_trainer(ctx, objects, callbacks, loggers, on_unused=on_unused, background=background)
    use_resumable_loops(trainer, DataOrder(DataSplit.of_run(ctx), ctx.output.notice, changes.loader_batch))
    stop.start()
    explained = explain_other_model(ctx.run.resume_from, objects.model, trainer)
    with late_usage_boundary(ctx, lambda: events.batches > 0), loadable_checkpoint(ctx) as loadable, explained:
        path = None if loadable is None else str(loadable)
        trainer.fit(objects.model, datamodule=objects.data, ckpt_path=path, weights_only=True)
    end = find_end_reason(trainer, trained_batches=events.batches, resumed=ctx.run.resume_from is not None)
    if end.name == "nothing_to_train" and end.message is not None:
        ctx.output.notice(end.message)
    return trainer, end


def _signal_listener(ctx: RunContext, stop: StopAgreement) -> SignalListener:
    progress = StopProgress(saves=ctx.config.trainer.enable_checkpointing is not False)

    def on_request(number: int) -> None:
        text = f"{describe_stop_signal(number)}: {progress.describe_stop()}; Ctrl-C again ends at once"
        _print_on_rank_zero(text, ctx.topology)

    def on_second(number: int) -> None:
        record_interruption(ctx, Interrupted(number, checkpoint=None, step=progress.step), is_second=True)
        remove_partial_checkpoints(ctx.run.checkpoints)
        if ctx.topology.rank == 0 and not ctx.status.has_agent:
            stopped = Stop(number, progress.step, None, ctx.run.path, at_once=True, script=ctx.arguments_to_continue)
            write_line(describe_stop(stopped))

    has_scheduler = "SLURM_JOB_ID" in os.environ
    return SignalListener(stop, on_request, on_second, progress=progress, has_agent=ctx.status.has_agent,
                          has_scheduler=has_scheduler)  # fmt: skip


def _user_objects(ctx: RunContext) -> UserObjects:
    size = ctx.plan.batch.micro_batch_size
    if ctx.given is None:
        objects = make_user_objects(ctx.config, size)
    else:
        objects = ctx.given
        if ctx.config.global_batch_size is not None and size is not None:
            objects.use_batch_size(size)
    for text in objects.notices:
        ctx.output.notice(text)
    check_model(objects.model, ctx.plan, ctx.output.notice, ctx.config)
    return objects


def _describe_model(ctx: RunContext, objects: UserObjects) -> Mapping[str, Any]:
    """The model for W&B's config. Before the Trainer, as a strategy may shard the parameters that are counted."""
    requested = {} if ctx.config.use_amp is None else {"use_amp": ctx.config.use_amp}
    return build_wandb_config(objects.model, getattr(objects.model, "config", None), requested, ctx.plan)


def _notify_lost_loss_scale(ctx: RunContext) -> None:
    if ctx.run.resume_from is None or not ctx.plan.has_loss_scale:
        return
    problem = scaler_problem(ctx.run.resume_from)
    if problem is not None:
        ctx.output.notice(f"cannot restore the checkpoint's loss scale ({problem}); it starts at its initial value")


def _result(ctx: RunContext, trainer: pl.Trainer) -> FitResult:
    metrics = as_numbers(trainer.callback_metrics)
    last = find_last_checkpoint(ctx.run.checkpoints)
    best, monitor = find_best_checkpoint(trainer)
    return FitResult(ctx.run.path, ctx.plan, metrics, trainer.global_step, last, best or last, trainer, monitor,
                     find_problem(trainer))  # fmt: skip


def _print_on_rank_zero(text: str, topology: Topology) -> None:
    if topology.rank == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
