"""Which loggers a run has: the same list on every rank, the user's own first."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.fabric.loggers.tensorboard import _TENSORBOARD_AVAILABLE, _TENSORBOARDX_AVAILABLE
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from launcher.config.schema import RunConfig, WandbOptions
from launcher.core.secrets import redact
from launcher.loggers.wandb_run import QueuedWandbLogger, first_line
from launcher.runs.directory import RunDirectory


class FileLogger(CSVLogger):
    """Lightning's logger to a CSV file, which keeps no secret."""

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        super().log_hyperparams(_without_secrets(params))


class BoardLogger(TensorBoardLogger):
    """Lightning's logger to TensorBoard's files, which keeps no secret."""

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any = None, metrics: Any = None, step: int | None = None) -> None:
        super().log_hyperparams(_without_secrets(params), metrics, step)


def _without_secrets(params: Any) -> Any:
    return redact(params if isinstance(params, Mapping) else vars(params or Namespace()))


def own_loggers(config: RunConfig, given: Sequence[Logger], run: RunDirectory) -> list[Logger]:
    """The user's; where `trainer.logger` is true, Lightning's default one comes first, in the run's directory."""
    if config.trainer.logger is not True:
        return list(given)
    has_board = bool(_TENSORBOARD_AVAILABLE or _TENSORBOARDX_AVAILABLE)
    return [BoardLogger(str(run.path)) if has_board else FileLogger(str(run.path)), *given]


def make_wandb_logger(
    options: WandbOptions, run: RunDirectory, values: Mapping[str, Any], notice: Callable[[str], None]
) -> QueuedWandbLogger | None:
    """The run's logger, equal on all ranks; None if W&B is not installed. Nothing begins yet."""
    try:
        return QueuedWandbLogger(options, run, values, notice, os.environ)
    except ModuleNotFoundError as error:
        notice(f"W&B is not used: {first_line(error)}")
        return None


def wants_no_logger(config: RunConfig) -> bool:
    """Whether the user switched all loggers off, as `trainer.logger: false` does."""
    return config.trainer.logger == [] and config.wandb.mode == "disabled"


def logs_to_wandb(loggers: Sequence[Logger]) -> bool:
    """Whether one of them writes to a W&B run."""
    return any(
        isinstance(logger, WandbLogger) and not (isinstance(logger, QueuedWandbLogger) and logger.mode == "disabled")
        for logger in loggers
    )


def run_loggers(own: Sequence[Logger], ours: QueuedWandbLogger | None, run: RunDirectory, is_off: bool) -> list[Logger]:
    """The loggers of every rank: the user's first, as `self.logger` is the first one.

    Args:
        own: the user's.
        ours: the run's W&B; left out where a `WandbLogger` of the user's decides what W&B gets.
        run: where a CSV file is kept if W&B is not installed.
        is_off: the user wants no logger (`trainer.logger: false`).
    """
    if is_off:
        return list(own)
    theirs = next((logger for logger in own if isinstance(logger, WandbLogger)), None)
    if theirs is not None:
        _continue_run(theirs, run)
        return list(own)
    if ours is None:
        return list(own) or [FileLogger(str(run.path))]
    # One that is switched off is there for code that wants a logger.
    return list(own) if own and ours.mode == "disabled" else [*own, ours]


def _continue_run(logger: WandbLogger, run: RunDirectory) -> None:
    """Give a logger of the user's that names no run the run directory's id: an attempt goes on with the one before."""
    arguments: dict[str, Any] = vars(logger).get("_wandb_init", {})
    fixed = logger.version is not None or os.environ.get("WANDB_RUN_ID") or os.environ.get("WANDB_SWEEP_ID")
    # A config file's `WandbLogger` has every argument of `wandb.init`, most of them None.
    if not fixed and arguments.get("resume") in ("allow", None) and vars(logger).get("_experiment") is None:
        arguments.update(id=run.wandb_id, resume="allow")
        vars(logger)["_id"] = run.wandb_id
