"""Lightning's Trainer for a plan."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from launcher.checkpoint.atomic_io import AtomicCheckpointIO
from launcher.checkpoint.background import BackgroundWriter
from launcher.checkpoint.formats import format_of
from launcher.checkpoint.manifest import write_manifest
from launcher.checkpoint.read_back import ReadBack
from launcher.checkpoint.reader import guarded_loads
from launcher.checkpoint.resume import check_fits_model
from launcher.checkpoint.save_interval import FailureHistory, read_failures
from launcher.checkpoint.storage import explained_saves, explained_writes
from launcher.config.schema import RunConfig
from launcher.core.events import FILE_NAME, read_events
from launcher.core.terminal import is_interactive
from launcher.hardware.topology import Topology
from launcher.planning.deepspeed_facts import pretends_cpu_fp16
from launcher.planning.plan import shard_options
from launcher.training.callbacks.model_summary import ShortModelSummary
from launcher.training.callbacks.progress import ProgressLines
from launcher.training.callbacks.progress_bar import TerminalProgress
from launcher.training.callbacks.run_checkpoint import (
    RunCheckpoint,
    accept_file_urls,
    hide_multiple_checkpoints_warning,
)
from launcher.training.callbacks.save_schedule import SaveSchedule
from launcher.training.context import RunContext
from launcher.user_code.classes import make_ddp_options, make_profiler
from launcher.user_code.objects import UserObjects
from strategies.base import BuildOptions, CheckpointHooks, RankLocation
from strategies.build import build_strategy, precision_plugin
from strategies.environment import FixedClusterEnvironment
from strategies.precision import Precision
from strategies.registry import find_strategy

# Settings that the plan decides, or that are passed in another way.
_NOT_PASSED_ON = (
    "callbacks",
    "logger",
    "plugins",
    "accumulate_grad_batches",
    "enable_progress_bar",
    "enable_model_summary",
    "profiler",
)


def build_trainer(
    ctx: RunContext,
    objects: UserObjects,
    callbacks: Sequence[pl.Callback],
    loggers: Sequence[Logger],
    *,
    on_unused: Callable[[tuple[str, ...]], None] | None = None,
    background: BackgroundWriter | None = None,
) -> pl.Trainer:
    """The Trainer for the plan, with callbacks for checkpoints, progress and summary added to the given ones.

    `on_unused` is called with the names of parameters that get no gradient under DDP; None makes them an error.
    `background` writes the run's checkpoints beside the training, where that is safe.
    """
    config, plan, topology = ctx.config, ctx.plan, ctx.topology
    read_back = ReadBack(ctx.trust, ctx.output.notice)
    strategy = _strategy(ctx, read_back, on_unused)
    is_sharded = find_strategy(plan.strategy.name).is_sharded
    plugin = objects.precision_plugin or precision_plugin(
        Precision(plan.precision), plan.device_kind, config.watch.floor, strategy=plan.strategy.name
    )
    files = AtomicCheckpointIO(ctx.trust, read_back, background, maps_files=is_sharded)
    background = _safe_background(ctx, background, strategy, objects.plugins)
    plugins = _with_checkpoint_io(objects.plugins, files)
    plugins += [] if plugin is None else [plugin]
    if isinstance(strategy, SingleDeviceStrategy):
        # It has no cluster environment, so Lightning would read SLURM's variables and requeue the job itself.
        plugins.append(FixedClusterEnvironment(_location(topology)))
    # Lightning refuses a second progress bar, and a progress bar callback without the flag.
    has_bar = any(isinstance(each, ProgressBar) for each in callbacks)
    shows_bar = has_bar or (topology.rank == 0 and is_interactive(ctx.output.console))
    precision: dict[str, Any] = {"precision": plan.precision} if plugin is None else {}
    trainer = pl.Trainer(
        **plain_options(config),
        **precision,
        profiler=objects.profiler or make_profiler(config),
        plugins=plugins,
        accelerator="gpu" if plan.device_kind == "cuda" else plan.device_kind,
        strategy=strategy,
        devices=topology.local_world_size if plan.device_kind != "mps" else 1,
        num_nodes=topology.num_nodes,
        accumulate_grad_batches=plan.batch.accumulate,
        callbacks=[*callbacks, *_added_callbacks(ctx, callbacks, background, has_bar=has_bar)],
        logger=False if config.trainer.barebones else list(loggers) or False,
        default_root_dir=str(ctx.run.path),
        # Otherwise Lightning adds its own bar and summary to those added above.
        enable_progress_bar=_wants_bar(config) and shows_bar,
        enable_model_summary=False,
    )
    hide_multiple_checkpoints_warning(trainer)
    return trainer


def _strategy(ctx: RunContext, read_back: ReadBack, on_unused: Callable[[tuple[str, ...]], None] | None) -> Any:
    options = BuildOptions(
        ctx.plan.device_kind,
        _location(ctx.topology),
        ctx.config.process_group_timeout,
        deepspeed=ctx.plan.deepspeed,
        pretend_fp16=pretends_cpu_fp16(os.environ),
        ddp=make_ddp_options(ctx.config),
        on_unused=on_unused,
        checkpoint=_checkpoint_hooks(ctx, read_back),
        sharding=shard_options(ctx.config, checkpoint_activations=ctx.plan.activation_checkpointing),
    )
    return build_strategy(ctx.plan.strategy, options)


def _checkpoint_hooks(ctx: RunContext, read_back: ReadBack) -> CheckpointHooks:
    """The launcher's checks, for strategies that read and write their checkpoints themselves."""

    def on_written(written: Path, name: Path, step: int | None) -> None:
        read_back(written, name)
        # A folder of the user gets the same files as with plain Lightning.
        is_own = name.absolute().is_relative_to(ctx.run.path.absolute())
        with explained_writes(name.parent):
            write_manifest(written, name, step, with_manifest=is_own)

    resume = ctx.run.resume_from
    return CheckpointHooks(
        on_written,
        writing=explained_saves,
        reading=functools.partial(guarded_loads, trust=ctx.trust),
        read_consolidated=lambda path: format_of(path).read_consolidated(path),
        check_model=None if resume is None else functools.partial(check_fits_model, resume),
    )


def _location(topology: Topology) -> RankLocation:
    return RankLocation(
        topology.rank,
        topology.world_size,
        topology.local_rank,
        topology.local_world_size,
        topology.node_rank,
        topology.master_addr or "127.0.0.1",
        topology.master_port or 0,
    )


def _wants_bar(config: RunConfig) -> bool:
    return config.trainer.enable_progress_bar is not False and not config.trainer.barebones


def _safe_background(
    ctx: RunContext, background: BackgroundWriter | None, strategy: Strategy, plugins: Sequence[Any]
) -> BackgroundWriter | None:
    """The writer for the run's checkpoints; None if they are written while the training waits."""
    requested = ctx.config.checkpoint.background
    if background is None or requested is False:
        return None
    reason = None
    if any(isinstance(each, CheckpointIO) for each in plugins):
        reason = "a CheckpointIO plugin of the user writes them"
    elif type(strategy).save_checkpoint is not Strategy.save_checkpoint:
        reason = f"{ctx.plan.strategy.name} writes its own files"
    if reason is not None and requested is True:
        background.decline(reason)
    return background if reason is None else None


def _added_callbacks(
    ctx: RunContext, callbacks: Sequence[pl.Callback], background: BackgroundWriter | None, *, has_bar: bool
) -> list[pl.Callback]:
    """The run's checkpoint, model summary and progress, unless switched off or replaced by a callback of the user."""
    config, console = ctx.config, ctx.output.console
    added: list[pl.Callback] = []
    if config.trainer.enable_checkpointing is not False and not config.trainer.barebones:
        accept_file_urls(callbacks)
        added.append(RunCheckpoint(config.checkpoint, ctx.run.checkpoints, background, _schedule(ctx, background)))
    has_summary = any(isinstance(each, ModelSummary) for each in callbacks)
    # A restart trains the same model.
    wants_summary = config.trainer.enable_model_summary is not False and ctx.topology.restart_count == 0
    if wants_summary and not config.trainer.barebones and not has_summary:
        added.append(ShortModelSummary(console))
    if _wants_bar(config) and ctx.topology.rank == 0 and not has_bar:
        added.append(TerminalProgress(console) if is_interactive(console) else ProgressLines(console))
    return added


def _schedule(ctx: RunContext, background: BackgroundWriter | None) -> SaveSchedule | None:
    """When to save, for `checkpoint.every: auto`."""
    if ctx.config.checkpoint.every is None:
        return None
    file = ctx.run.path / FILE_NAME

    def history() -> FailureHistory:
        return read_failures(read_events(file) if file.exists() else (), ctx.topology.world_size)

    return SaveSchedule(ctx.output.events, history, lambda: 0.0 if background is None else background.seconds)


def plain_options(config: RunConfig) -> dict[str, Any]:
    """The settings of `config.trainer` that Lightning's Trainer takes unchanged."""
    names = [entry.name for entry in dataclasses.fields(config.trainer) if entry.name not in _NOT_PASSED_ON]
    return {name: getattr(config.trainer, name) for name in names}


def _with_checkpoint_io(plugins: Sequence[Any], default: AtomicCheckpointIO) -> list[Any]:
    """The user's plugins, and the launcher's CheckpointIO unless the user has one; the user's may wrap it."""
    own = [each for each in plugins if isinstance(each, CheckpointIO)]
    for each in own:
        if isinstance(each, _WrappingCheckpointIO) and each.checkpoint_io is None:
            each.checkpoint_io = default
    return [*plugins, *([] if own else [default])]
