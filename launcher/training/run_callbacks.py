"""The callbacks of every run, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

from launcher.checkpoint.resume import read_checkpoint
from launcher.checkpoint.secrets import SecretRedactor
from launcher.loggers.kept_logs import KEY, LogFileState
from launcher.loggers.selection import make_trackers
from launcher.loggers.wandb_callback import WandbStarter
from launcher.loggers.wandb_run import QueuedWandbLogger
from launcher.monitoring.buffers import BufferMonitor
from launcher.monitoring.rank_monitor import RankMonitor
from launcher.runs.selection import LAST_CHECKPOINT
from launcher.training.callbacks import EventWriter, GracefulStop, LastCheckpointWriter, PlanRecorder, as_numbers
from launcher.training.context import RunContext
from launcher.training.epoch_hooks import PartialEpochNotices
from launcher.training.epoch_metrics import EpochMetrics
from launcher.training.graceful_stop import SignalListener, StopAgreement
from launcher.training.heartbeat_callback import heartbeat_callbacks
from launcher.training.memory_reporter import MeasuredMemory, MemoryReporter
from launcher.training.plateau_callback import StepPlateaus
from launcher.training.rng_callback import RandomStates
from launcher.training.run_checkpoint import best_checkpoint
from launcher.training.trained_parameters import TrainedParameters
from launcher.training.tuned_values import TunedValues
from launcher.user_code.objects import UserObjects


@dataclass(frozen=True)
class RunParts:
    """What a training has made before its Trainer.

    Attributes:
        objects: the user's.
        stop: the ranks' decision to stop.
        listener: receives the signals.
        measured: memory since before the model was made.
        loggers: of the Trainer.
        wandb: the run's own W&B logger; None if W&B is not installed.
        described: the model and its precision, for W&B's config.
    """

    objects: UserObjects
    stop: StopAgreement
    listener: SignalListener
    measured: MeasuredMemory
    loggers: Sequence[Logger]
    wandb: QueuedWandbLogger | None
    described: Mapping[str, Any]


def run_callbacks(ctx: RunContext, parts: RunParts, writes_events: EventWriter) -> list[pl.Callback]:
    """The user's callbacks and the launcher's."""
    config, notice, events = ctx.config, ctx.output.notice, ctx.output.events
    checkpoint = ctx.run.checkpoints / LAST_CHECKPOINT if config.trainer.enable_checkpointing is not False else None
    # Lightning itself takes the loggers and the checkpoints away.
    is_trial = bool(config.trainer.barebones or config.trainer.fast_dev_run)
    if checkpoint is None and not is_trial:
        notice("trainer.enable_checkpointing is false: nothing is saved, and this run cannot be resumed")
    wandb = parts.wandb
    trackers = [] if is_trial else make_trackers(parts.loggers, wandb, notice)
    watch = RankMonitor(config.watch, ctx.plan.precision, ctx.output, trackers, _final_summary)
    tuned = TunedValues(parts.objects.callbacks, resumes=ctx.run.resume_from is not None, notice=notice)
    return [
        *tuned.kept,
        tuned,
        *([] if wandb is None else [WandbStarter(wandb.values, parts.described, notice)]),
        watch,
        BufferMonitor(watch.alert, events, notice),
        PlanRecorder(ctx.plan),
        writes_events,
        *heartbeat_callbacks(ctx.status),
        RandomStates(notice),
        SecretRedactor(notice),
        EpochMetrics(notice),
        TrainedParameters(notice),
        PartialEpochNotices(notice),
        StepPlateaus(notice),
        MemoryReporter(ctx.plan, parts.measured, events),
        _kept_logs(ctx, [] if is_trial else parts.loggers),
        GracefulStop(parts.stop, parts.listener, checkpoint),
        *([] if checkpoint is None else [LastCheckpointWriter(checkpoint)]),
    ]


def _final_summary(trainer: pl.Trainer) -> dict[str, Any]:
    """The result of a training, for its loggers: the last value of every metric, steps and best checkpoint."""
    summary: dict[str, Any] = {f"final/{name}": value for name, value in as_numbers(trainer.callback_metrics).items()}
    summary["final/steps"] = trainer.global_step
    best, _ = best_checkpoint(trainer)
    return summary if best is None else {**summary, "final/best_checkpoint": str(best)}


def _kept_logs(ctx: RunContext, loggers: Sequence[Logger]) -> LogFileState:
    # No more of the checkpoint, as its file would stay open.
    written = None if ctx.run.resume_from is None else read_checkpoint(ctx.run.resume_from, outline=True).get(KEY, {})
    return LogFileState(loggers, ctx.run, ctx.topology, ctx.attempt_store, ctx.config.process_group_timeout, written)
