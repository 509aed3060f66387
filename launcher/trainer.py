"""Lightning's Trainer for a plan."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichModelSummary, RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import Precision as PrecisionPlugin
from lightning.pytorch.strategies import SingleDeviceStrategy
from rich.console import Console

from launcher.batch_end import CheckpointAfterBatch
from launcher.checkpoint_files import note_hashes
from launcher.checkpoint_io import WholeCheckpointIO
from launcher.config import RunConfig
from launcher.deepspeed_ready import pretends_cpu_fp16
from launcher.plan import Plan
from launcher.run_callbacks import ProgressLines
from launcher.run_directory import RunDirectory
from launcher.topology import Topology
from strategies.build import KnownRanks, RankPlace, build_strategy, precision_plugin
from strategies.precision import Precision

# Ours to decide, or handed over in another way.
_NOT_PASSED_ON = (
    "callbacks",
    "logger",
    "plugins",
    "accumulate_grad_batches",
    "enable_progress_bar",
    "enable_model_summary",
)


def build_trainer(
    config: RunConfig,
    plan: Plan,
    topology: Topology,
    run: RunDirectory,
    callbacks: list[pl.Callback],
    loggers: list[Logger],
    console: Console,
    own_plugin: PrecisionPlugin | None = None,
) -> pl.Trainer:
    """The Trainer that does what the plan says.

    Args:
        config: Lightning's own settings.
        plan: strategy, precision and batch split.
        topology: this rank's place.
        run: where checkpoints go.
        callbacks: the launcher's and the user's.
        loggers: W&B and the user's.
        console: rank zero's terminal, for the progress.
        own_plugin: the user's, where the plan says 'custom'.
    """
    place = RankPlace(
        topology.rank,
        topology.world_size,
        topology.local_rank,
        topology.local_world_size,
        topology.node_rank,
        topology.master_addr or "127.0.0.1",
        topology.master_port or 0,
    )
    plugin = own_plugin or precision_plugin(
        Precision(plan.precision), plan.device_kind, config.watch.floor, strategy=plan.strategy.name
    )
    precision: dict[str, Any] = {"precision": plan.precision} if plugin is None else {}
    plugins: list[Any] = [WholeCheckpointIO(run.path), *([] if plugin is None else [plugin])]
    options = {k: v for k, v in _options(config).items() if k not in _NOT_PASSED_ON}
    wants_bar = config.trainer.enable_progress_bar is not False and not config.trainer.barebones
    if config.trainer.enable_checkpointing is not False and not config.trainer.barebones:
        callbacks = [*callbacks, _checkpointing(config, run)]
    if config.trainer.enable_model_summary is not False and not config.trainer.barebones:
        callbacks = [*callbacks, RichModelSummary()]
    if wants_bar and topology.rank == 0:
        callbacks = [*callbacks, RichProgressBar() if console.is_terminal else ProgressLines(console)]
    strategy = build_strategy(
        plan.strategy,
        plan.device_kind,
        place,
        config.process_group_timeout,
        deepspeed=plan.deepspeed,
        pretend_fp16=pretends_cpu_fp16(os.environ),
    )
    if isinstance(strategy, SingleDeviceStrategy):
        # It has no place of its own, and Lightning would look for SLURM's variables and requeue the job by itself.
        plugins.append(KnownRanks(place))
    if hasattr(strategy, "on_written"):
        # DeepSpeed writes its folders itself.
        vars(strategy)["on_written"] = note_hashes
    return pl.Trainer(
        **options,
        **precision,
        plugins=plugins,
        accelerator="gpu" if plan.device_kind == "cuda" else plan.device_kind,
        strategy=strategy,
        devices=topology.local_world_size if plan.device_kind != "mps" else 1,
        num_nodes=topology.num_nodes,
        accumulate_grad_batches=plan.batch.accumulate,
        callbacks=callbacks,
        logger=False if config.trainer.barebones else loggers or False,
        default_root_dir=str(run.path),
        # Bar and summary of its own would be added beside ours.
        enable_progress_bar=wants_bar and topology.rank == 0 and console.is_terminal,
        enable_model_summary=False,
    )


def _options(config: RunConfig) -> dict[str, Any]:
    return {entry.name: getattr(config.trainer, entry.name) for entry in dataclasses.fields(config.trainer)}


def _checkpointing(config: RunConfig, run: RunDirectory) -> CheckpointAfterBatch:
    options = config.checkpoint
    return CheckpointAfterBatch(
        dirpath=run.checkpoints,
        filename="{epoch}-{step}",
        monitor=options.monitor,
        mode=options.mode,
        save_top_k=options.save_top_k,
        save_last=True,
        every_n_train_steps=options.every_n_steps,
        every_n_epochs=options.every_n_epochs,
        # One `last.ckpt`, overwritten: that is where a resume looks.
        enable_version_counter=False,
    )
