"""The last step of the main path: Lightning trains what the plan says."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from launcher.checkpoint.resume import explain_other_model, scaler_problem
from launcher.core.errors import Interrupted, LauncherError
from launcher.core.secrets import find_secrets, redact
from launcher.hardware.topology import Topology
from launcher.loggers.selection import make_wandb_logger, own_loggers, run_loggers, wants_no_logger
from launcher.loggers.wandb_config import build_wandb_config
from launcher.loggers.wandb_run import QueuedWandbLogger, finish_wandb
from launcher.planning.changes import PlanChanges
from launcher.planning.fit_plan import check_model
from launcher.planning.plan import Plan
from launcher.process.open_resources import keep_open
from launcher.runs.directory import RunDirectory
from launcher.runs.selection import last_checkpoint
from launcher.training.callbacks import EventWriter, as_numbers
from launcher.training.context import RunContext
from launcher.training.convert import loadable_checkpoint
from launcher.training.data_order import DataOrder
from launcher.training.failures import record_failure, record_interruption
from launcher.training.graceful_stop import SignalListener, StopAgreement
from launcher.training.loops import use_resumable_loops
from launcher.training.memory_reporter import MeasuredMemory
from launcher.training.quiet_lightning import quiet_lightning
from launcher.training.result import FitResult
from launcher.training.run_callbacks import RunParts, run_callbacks
from launcher.training.run_checkpoint import best_checkpoint
from launcher.training.script_end import announce_end_of_training
from launcher.training.trainer import build_trainer
from launcher.user_code.objects import UserObjects, make_user_objects
from strategies.choice import AUTO


def train(ctx: RunContext) -> FitResult:
    """Make the model, the data and the Trainer, and fit.

    With `ctx.stays_open` the W&B run of a training that ended well is left to `launcher.process.open_resources`.

    Raises:
        TrainingError, Interrupted, DataError, ResumeError: see `launcher.training.fit.fit`.
    """
    topology = ctx.topology
    stop = StopAgreement(ctx.attempt_store, topology.rank, topology.world_size)
    # Signals are taken until W&B has ended: torchrun ends the other ranks as soon as the first has left.
    taken = SignalListener(
        stop,
        lambda number: _say_stopping(number, topology),
        has_agent=ctx.status.has_agent,
        has_scheduler="SLURM_JOB_ID" in os.environ,
    )
    # Lightning took its rank from the environment on import; objects made before the Trainer may ask for it.
    vars(rank_zero_only)["rank"] = topology.rank
    secrets = find_secrets(ctx.config.to_dict()).values()
    with taken as listener, _wandb(ctx) as wandb_logger:
        try:
            with quiet_lightning(), announce_end_of_training(ctx.attempt_store, topology, secrets):
                trainer = _fit(ctx, stop, listener, wandb_logger)
        except Interrupted as interruption:
            if ctx.stays_open:
                interruption.users_handler = listener.users_handler
                _say_stopped(interruption, topology)
            record_interruption(ctx, interruption)
            raise
        except Exception as error:
            failure = record_failure(ctx, error)
            if failure is error:
                raise
            raise failure from error
        finally:
            stop.close()
    result = _result(trainer, ctx.plan, ctx.run)
    if topology.rank == 0:
        ctx.output.events.write("finished", step=result.steps, metrics=dict(result.metrics),
                                checkpoint=result.checkpoint)  # fmt: skip
    if ctx.stays_open and listener.first is not None:
        # It came when the training ended by itself: the script must hear of it, before it begins another one.
        saved = None if result.checkpoint is None else str(result.checkpoint)
        interruption = Interrupted(listener.first, checkpoint=saved, step=result.steps)
        interruption.users_handler = listener.users_handler
        raise interruption
    return result


@contextlib.contextmanager
def _wandb(ctx: RunContext) -> Iterator[QueuedWandbLogger | None]:
    """The run's W&B, ended with the exit code of what happens inside."""
    values = redact({"config": ctx.config.to_dict(), "plan": ctx.plan.to_dict()})
    logger = make_wandb_logger(ctx.config.wandb, ctx.run, values, ctx.output.notice)
    exit_code = 1
    try:
        yield logger
        exit_code = 0
    except (LauncherError, Interrupted) as error:
        exit_code = error.exit_code
        raise
    finally:
        if logger is not None and ctx.stays_open and exit_code == 0:
            keep_open(partial(finish_wandb, logger, 0, ctx.output.notice))
        elif logger is not None:
            finish_wandb(logger, exit_code, ctx.output.notice)


def _fit(
    ctx: RunContext, stop: StopAgreement, listener: SignalListener, wandb_logger: QueuedWandbLogger | None
) -> pl.Trainer:
    """Make the objects and train; whatever they raise comes out as it is."""
    pl.seed_everything(ctx.config.seed, workers=True, verbose=False)
    measured = MeasuredMemory(ctx.plan.device_kind)
    objects = _user_objects(ctx)
    _check_loss_scale(ctx)
    changes = PlanChanges(ctx.plan, ctx.run, ctx.output)
    own = own_loggers(ctx.config, objects.loggers, ctx.run)
    loggers = run_loggers(own, wandb_logger, ctx.run, is_off=wants_no_logger(ctx.config))
    parts = RunParts(objects, stop, listener, measured, loggers, wandb_logger, _described(ctx, objects))
    events = EventWriter(ctx.output.events)
    trainer = build_trainer(
        ctx,
        objects,
        run_callbacks(ctx, parts, events),
        loggers,
        on_unused=changes.unused_parameters if ctx.config.strategy == AUTO else None,
    )
    use_resumable_loops(trainer, _data_order(ctx, changes))
    stop.start()
    _train_from_checkpoint(ctx, trainer, objects)
    if ctx.run.resume_from is not None and not events.batches:
        ctx.output.notice(
            f"nothing was left to train after step {trainer.global_step}: raise trainer.max_epochs or trainer.max_steps"
        )
    return trainer


def _user_objects(ctx: RunContext) -> UserObjects:
    objects = ctx.given or make_user_objects(ctx.config, ctx.plan.batch.micro_batch_size)
    for text in objects.notices:
        ctx.output.notice(text)
    check_model(objects.model, ctx.plan, ctx.output.notice)
    return objects


def _described(ctx: RunContext, objects: UserObjects) -> Mapping[str, Any]:
    """The model for W&B's config. Before the Trainer: a strategy may divide the parameters that are counted."""
    wishes = {} if ctx.config.use_amp is None else {"use_amp": ctx.config.use_amp}
    return build_wandb_config(objects.model, getattr(objects.model, "config", None), wishes, ctx.plan)


def _check_loss_scale(ctx: RunContext) -> None:
    if ctx.run.resume_from is None or not ctx.plan.has_loss_scale:
        return
    damaged = scaler_problem(ctx.run.resume_from)
    if damaged is not None:
        ctx.output.notice(f"cannot restore the checkpoint's loss scale ({damaged}); it starts afresh")


def _data_order(ctx: RunContext, changes: PlanChanges) -> DataOrder:
    return DataOrder(
        ctx.plan.batch,
        rank=ctx.topology.rank,
        seed=ctx.config.seed,
        fixed_global_batch=ctx.config.global_batch_size is not None,
        distribute=ctx.config.trainer.use_distributed_sampler is not False,
        notice=ctx.output.notice,
        on_batch=changes.loader_batch,
    )


def _train_from_checkpoint(ctx: RunContext, trainer: pl.Trainer, objects: UserObjects) -> None:
    """Fit, from the run's checkpoint if there is one."""
    resume, notice = ctx.run.resume_from, ctx.output.notice
    with (
        loadable_checkpoint(resume, ctx.plan, ctx.run, ctx.topology.rank, notice, ctx.trust) as loadable,
        explain_other_model(resume, objects.model, trainer),
    ):
        path = None if loadable is None else str(loadable)
        trainer.fit(objects.model, datamodule=objects.data, ckpt_path=path, weights_only=True)


def _result(trainer: pl.Trainer, plan: Plan, run: RunDirectory) -> FitResult:
    metrics = as_numbers(trainer.callback_metrics)
    last = last_checkpoint(run.checkpoints)
    best, monitor = best_checkpoint(trainer)
    return FitResult(run.path, plan, metrics, trainer.global_step, last, best or last, trainer, monitor)


def _say_stopping(number: int, topology: Topology) -> None:
    if topology.rank == 0:
        text = f"signal {number}: saving at the next step boundary; Ctrl-C again ends at once\n"
        sys.stdout.write(text)
        sys.stdout.flush()


def _say_stopped(interruption: Interrupted, topology: Topology) -> None:
    """A script ends without a traceback then."""
    if topology.rank == 0:
        saved = f"; saved {interruption.checkpoint}" if interruption.checkpoint else ""
        sys.stdout.write(f"{interruption}{saved}\n")
        sys.stdout.flush()
