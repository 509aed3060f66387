"""The last step of the main path: Lightning trains according to the plan."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from launcher.checkpoint.resume import explain_other_model, scaler_problem
from launcher.core.errors import Interrupted
from launcher.core.secrets import find_secrets, redact
from launcher.hardware.topology import Topology
from launcher.loggers.selection import choose_loggers, list_own_loggers, wants_no_logger
from launcher.loggers.wandb_config import build_wandb_config
from launcher.loggers.wandb_run import QueuedWandbLogger
from launcher.planning.changes import PlanChanges
from launcher.planning.fit_plan import check_model
from launcher.runs.selection import find_last_checkpoint
from launcher.training.callbacks.events import EventWriter, as_numbers
from launcher.training.callbacks.memory import MeasuredMemory
from launcher.training.callbacks.run_callbacks import RunParts, run_callbacks
from launcher.training.callbacks.run_checkpoint import find_best_checkpoint
from launcher.training.context import RunContext
from launcher.training.data.order import DataOrder, DataSplit
from launcher.training.failures import error_boundary, record_failure, record_interruption
from launcher.training.loops.fit_loop import use_resumable_loops
from launcher.training.quiet_lightning import quiet_lightning
from launcher.training.result import FitResult
from launcher.training.resume.convert import loadable_checkpoint
from launcher.training.script_end import announce_end_of_training
from launcher.training.stop.agreement import StopAgreement
from launcher.training.stop.signals import SignalListener
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
    with _signal_listener(ctx, stop) as listener, wandb_session(ctx, _wandb_values(ctx)) as wandb_logger:
        try:
            with error_boundary(ctx, record_failure), quiet_lightning(), _announced_to_script(ctx):
                trainer = _fit(ctx, stop, listener, wandb_logger)
        except Interrupted as interruption:
            if ctx.stays_open:
                interruption.users_handler = listener.users_handler
                _print_stopped(interruption, ctx.topology)
            record_interruption(ctx, interruption)
            raise
        finally:
            stop.close()
    result = _result(ctx, trainer)
    if ctx.topology.rank == 0:
        ctx.output.events.write("finished", step=result.steps, metrics=dict(result.metrics),
                                checkpoint=result.checkpoint)  # fmt: skip
    if ctx.stays_open and listener.first is not None:
        # The signal came when the training had ended: the script must stop before it starts another training.
        saved = None if result.checkpoint is None else str(result.checkpoint)
        interruption = Interrupted(listener.first, checkpoint=saved, step=result.steps)
        interruption.users_handler = listener.users_handler
        raise interruption
    return result


def _fit(
    ctx: RunContext, stop: StopAgreement, listener: SignalListener, wandb_logger: QueuedWandbLogger | None
) -> pl.Trainer:
    """Create the objects and train; exceptions of the user's code are not changed."""
    pl.seed_everything(ctx.config.seed, workers=True, verbose=False)
    measured = MeasuredMemory(ctx.plan.device_kind)
    objects = _user_objects(ctx)
    _notify_lost_loss_scale(ctx)
    changes = PlanChanges(ctx.plan, ctx.run, ctx.output)
    own = list_own_loggers(ctx.config, objects.loggers, ctx.run)
    loggers = choose_loggers(own, wandb_logger, ctx.run, is_off=wants_no_logger(ctx.config))
    parts = RunParts(objects, stop, listener, measured, loggers, wandb_logger, _describe_model(ctx, objects))
    events = EventWriter(ctx.output.events)
    trainer = build_trainer(
        ctx,
        objects,
        run_callbacks(ctx, parts, events),
        loggers,
        on_unused=changes.unused_parameters if ctx.config.strategy == AUTO else None,
    )
    use_resumable_loops(trainer, DataOrder(DataSplit.of_run(ctx), ctx.output.notice, changes.loader_batch))
    stop.start()
    _train_from_checkpoint(ctx, trainer, objects)
    if ctx.run.resume_from is not None and not events.batches:
        ctx.output.notice(
            f"nothing was left to train after step {trainer.global_step}: raise trainer.max_epochs or trainer.max_steps"
        )
    return trainer


def _signal_listener(ctx: RunContext, stop: StopAgreement) -> SignalListener:
    return SignalListener(
        stop,
        lambda number: _print_stopping(number, ctx.topology),
        has_agent=ctx.status.has_agent,
        has_scheduler="SLURM_JOB_ID" in os.environ,
    )


def _announced_to_script(ctx: RunContext) -> contextlib.AbstractContextManager[None]:
    return announce_end_of_training(ctx.attempt_store, ctx.topology, find_secrets(ctx.config.to_dict()).values())


def _wandb_values(ctx: RunContext) -> dict[str, Any]:
    return redact({"config": ctx.config.to_dict(), "plan": ctx.plan.to_dict()})


def _user_objects(ctx: RunContext) -> UserObjects:
    objects = ctx.given or make_user_objects(ctx.config, ctx.plan.batch.micro_batch_size)
    for text in objects.notices:
        ctx.output.notice(text)
    check_model(objects.model, ctx.plan, ctx.output.notice)
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


def _train_from_checkpoint(ctx: RunContext, trainer: pl.Trainer, objects: UserObjects) -> None:
    """Fit, from the run's checkpoint if there is one."""
    with loadable_checkpoint(ctx) as loadable, explain_other_model(ctx.run.resume_from, objects.model, trainer):
        path = None if loadable is None else str(loadable)
        trainer.fit(objects.model, datamodule=objects.data, ckpt_path=path, weights_only=True)


def _result(ctx: RunContext, trainer: pl.Trainer) -> FitResult:
    metrics = as_numbers(trainer.callback_metrics)
    last = find_last_checkpoint(ctx.run.checkpoints)
    best, monitor = find_best_checkpoint(trainer)
    return FitResult(ctx.run.path, ctx.plan, metrics, trainer.global_step, last, best or last, trainer, monitor)


def _print_stopping(number: int, topology: Topology) -> None:
    if topology.rank == 0:
        text = f"signal {number}: saving at the next step boundary; Ctrl-C again ends at once\n"
        sys.stdout.write(text)
        sys.stdout.flush()


def _print_stopped(interruption: Interrupted, topology: Topology) -> None:
    """The script then ends without a traceback."""
    if topology.rank == 0:
        saved = f"; saved {interruption.checkpoint}" if interruption.checkpoint else ""
        sys.stdout.write(f"{interruption}{saved}\n")
        sys.stdout.flush()
