"""Decides whether the ranks of a run keep the state of their last step."""

from __future__ import annotations

import os

import lightning.pytorch as pl

from launcher.config.schema import RunConfig
from launcher.monitoring.buffers import BufferMonitor
from launcher.monitoring.loss_scale_monitor import LossScaleMonitor
from launcher.planning.plan import Plan
from launcher.process.kept_folder import can_restart
from launcher.runs.kept_state import KEPT_STATES
from launcher.training.callbacks.events import EventWriter
from launcher.training.callbacks.progress import MeasuredProgress
from launcher.training.context import RunContext
from launcher.training.resume.epoch_metrics import EpochMetrics
from launcher.training.resume.random_states import RandomStates
from launcher.training.survivors.keeper import KeptFolders, StepKeeper

# They write of a checkpoint, or gather what the records have.
_SILENT: tuple[type[pl.Callback], ...] = (EventWriter, LossScaleMonitor, BufferMonitor, MeasuredProgress, RandomStates)


def make_step_keeper(ctx: RunContext, metrics: EpochMetrics) -> list[pl.Callback]:
    """The callback that keeps the last step, if this run can; otherwise the agent gets the reason."""
    if ctx.kept_folder is None or ctx.topology.world_size == 1:
        return []
    reason = find_obstacle(ctx.config, ctx.plan)
    if reason is not None:
        ctx.status.update(not_kept=reason)
        return []
    # Other nodes do not see this node's memory.
    on_disk = ctx.run.path / KEPT_STATES
    states = on_disk if ctx.topology.num_nodes > 1 else ctx.kept_folder
    folders = KeptFolders(ctx.kept_folder, states, on_disk)
    return [StepKeeper(folders, metrics, ctx.status, _SILENT, keeps=can_restart(os.environ))]


def find_obstacle(config: RunConfig, plan: Plan) -> str | None:
    """Why the ranks cannot keep the state of their last step; None if they can."""
    if config.trainer.barebones or config.trainer.fast_dev_run:
        return "it is a trial"
    name = plan.strategy.name
    if not name.startswith("ddp"):
        return f"under {name} no other rank has a copy of a rank's states"
    if config.keep_last_step is False:
        return "keep_last_step is false"
    if plan.device_kind == "cuda" and config.keep_last_step == "auto":
        return "on GPUs it is done only with keep_last_step: true"
    return None
