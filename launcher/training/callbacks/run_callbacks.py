"""The callbacks of every run, in their order."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

from launcher.checkpoint.background import BackgroundWriter
from launcher.checkpoint.resume import read_checkpoint
from launcher.checkpoint.secrets import SecretRedactor
from launcher.core.events import FILE_NAME, read_events
from launcher.loggers.kept_logs import KEY, LogFileState
from launcher.loggers.selection import make_trackers
from launcher.loggers.wandb_callback import WandbStarter
from launcher.loggers.wandb_run import QueuedWandbLogger
from launcher.monitoring.buffers import BufferMonitor
from launcher.monitoring.rank_monitor import RankMonitor
from launcher.planning.flops import ModelWork
from launcher.runs.ledger_reader import LedgerReader
from launcher.runs.selection import LAST_CHECKPOINT
from launcher.training.callbacks.activation_checkpointing import ActivationCheckpointing
from launcher.training.callbacks.events import EventWriter
from launcher.training.callbacks.heartbeat import heartbeat_callbacks
from launcher.training.callbacks.memory import MeasuredMemory, MemoryReporter
from launcher.training.callbacks.pending_writes import PendingWrites
from launcher.training.callbacks.progress import as_numbers
from launcher.training.callbacks.run_checkpoint import LastCheckpointWriter, PlanRecorder, find_best_checkpoint
from launcher.training.context import RunContext
from launcher.training.resume.epoch_metrics import EpochMetrics
from launcher.training.resume.partial_epoch import PartialEpochNotices
from launcher.training.resume.plateaus import StepPlateaus
from launcher.training.resume.random_states import RandomStates
from launcher.training.resume.trained_parameters import TrainedParameters
from launcher.training.resume.tuned_values import TunedValues
from launcher.training.stop.agreement import StopAgreement
from launcher.training.stop.callback import GracefulStop
from launcher.training.stop.signals import SignalListener
from launcher.training.survivors.selection import make_step_keeper
from launcher.user_code.objects import UserObjects


@dataclass(frozen=True)
class RunParts:
    """The objects that a training creates before its Trainer."""

    objects: UserObjects
    stop: StopAgreement
    listener: SignalListener
    measured: MeasuredMemory
    background: BackgroundWriter
    loggers: Sequence[Logger]  # of the Trainer
    wandb: QueuedWandbLogger | None  # None if W&B is not installed
    described: Mapping[str, Any]  # the model and its precision, for W&B's config


def run_callbacks(ctx: RunContext, parts: RunParts, event_writer: EventWriter) -> list[pl.Callback]:
    """The heartbeat, which marks where a phase begins, then the user's callbacks, then the launcher's others."""
    config, notice, events = ctx.config, ctx.output.notice, ctx.output.events
    checkpoint = ctx.run.checkpoints / LAST_CHECKPOINT if config.trainer.enable_checkpointing is not False else None
    # In these modes Lightning itself removes loggers and checkpoints.
    is_trial = bool(config.trainer.barebones or config.trainer.fast_dev_run)
    if checkpoint is None and not is_trial:
        notice("trainer.enable_checkpointing is false: nothing is saved, and this run cannot be resumed")
    wandb = parts.wandb
    trackers = [] if is_trial else make_trackers(parts.loggers, wandb, notice)
    summarize = functools.partial(_final_summary, events=ctx.run.path / FILE_NAME)
    monitor = RankMonitor(config.watch, ctx.plan.precision, ctx.output, trackers, summarize, ModelWork.of(ctx.plan))
    event_writer.check_metrics = monitor.check_logged
    tuned = TunedValues(parts.objects.callbacks, resumes=ctx.run.resume_from is not None, notice=notice)
    metrics = EpochMetrics(notice)
    return [
        *heartbeat_callbacks(ctx.status),
        # After a failure the agent waits for the kept step, not for a checkpoint that is being written.
        *make_step_keeper(ctx, metrics),
        PendingWrites(parts.background),
        *tuned.kept,
        tuned,
        *([ActivationCheckpointing(config.fsdp.blocks)] if ctx.plan.activation_checkpointing else []),
        *([] if wandb is None else [WandbStarter(wandb.values, parts.described, notice)]),
        monitor,
        BufferMonitor(monitor.alert, events, notice),
        PlanRecorder(ctx.plan, notice, keeps_batch=config.global_batch_size is not None),
        event_writer,
        RandomStates(notice),
        SecretRedactor(notice),
        metrics,
        TrainedParameters(notice),
        PartialEpochNotices(notice),
        StepPlateaus(notice),
        MemoryReporter(ctx.plan, parts.measured, events),
        _kept_logs(ctx, [] if is_trial else parts.loggers),
        GracefulStop(parts.stop, parts.listener, checkpoint),
        *([] if checkpoint is None else [LastCheckpointWriter(checkpoint)]),
    ]


def _final_summary(trainer: pl.Trainer, events: Path) -> dict[str, Any]:
    """The result of a training, for its loggers: the last value of every metric, steps, best checkpoint, use of time.

    `events` is the file with the events of all attempts.
    """
    summary: dict[str, Any] = {f"final/{name}": value for name, value in as_numbers(trainer.callback_metrics).items()}
    summary["final/steps"] = trainer.global_step
    with contextlib.suppress(OSError):
        ledger = LedgerReader(read_events(events)).ledger()
        summary |= {} if ledger is None else ledger.to_summary()
    best, _ = find_best_checkpoint(trainer)
    return summary if best is None else {**summary, "final/best_checkpoint": str(best)}


def _kept_logs(ctx: RunContext, loggers: Sequence[Logger]) -> LogFileState:
    # Only this value: more of the checkpoint would keep its file open.
    written = None if ctx.run.resume_from is None else read_checkpoint(ctx.run.resume_from, outline=True).get(KEY, {})
    return LogFileState(loggers, ctx.run, ctx.topology, ctx.attempt_store, ctx.config.process_group_timeout, written)
