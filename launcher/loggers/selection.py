"""Selects the loggers of a run, the same list on every rank with the user's own first, and their trackers."""

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
from launcher.core.errors import describe_error
from launcher.core.secrets import redact
from launcher.loggers.base import Tracker
from launcher.loggers.lightning_tracker import LightningTracker
from launcher.loggers.wandb_run import QueuedWandbLogger
from launcher.loggers.wandb_tracker import WandbTracker
from launcher.runs.directory import RunDirectory


class FileLogger(CSVLogger):
    """Lightning's logger to a CSV file, without secrets."""

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        super().log_hyperparams(_without_secrets(params))


class BoardLogger(TensorBoardLogger):
    """Lightning's logger to TensorBoard's files, without secrets."""

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any = None, metrics: Any = None, step: int | None = None) -> None:
        super().log_hyperparams(_without_secrets(params), metrics, step)


def _without_secrets(params: Any) -> Any:
    return redact(params if isinstance(params, Mapping) else vars(params or Namespace()))


def list_own_loggers(config: RunConfig, given: Sequence[Logger], run: RunDirectory) -> list[Logger]:
    """The user's loggers; with `trainer.logger: true` Lightning's default one is first, in the run's directory."""
    if config.trainer.logger is not True:
        return list(given)
    has_board = bool(_TENSORBOARD_AVAILABLE or _TENSORBOARDX_AVAILABLE)
    return [BoardLogger(str(run.path)) if has_board else FileLogger(str(run.path)), *given]


def make_wandb_logger(
    options: WandbOptions, run: RunDirectory, values: Mapping[str, Any], notice: Callable[[str], None]
) -> QueuedWandbLogger | None:
    """Make the run's W&B logger, equal on all ranks; None if W&B is not installed. The run does not begin yet."""
    try:
        return QueuedWandbLogger(options, run, values, notice, os.environ)
    except ModuleNotFoundError as error:
        notice(f"W&B is not used: {describe_error(error)}")
        return None


def wants_no_logger(config: RunConfig) -> bool:
    """Whether the user disabled all loggers, as `trainer.logger: false` does."""
    return config.trainer.logger == [] and config.wandb.mode == "disabled"


def logs_to_wandb(loggers: Sequence[Logger]) -> bool:
    """Whether one of them writes to a W&B run."""
    return any(
        isinstance(logger, WandbLogger) and not (isinstance(logger, QueuedWandbLogger) and logger.mode == "disabled")
        for logger in loggers
    )


def choose_loggers(
    own: Sequence[Logger], wandb: QueuedWandbLogger | None, run: RunDirectory, is_off: bool
) -> list[Logger]:
    """Return the loggers of every rank: the user's `own` first, as `self.logger` is the first one.

    The run's logger `wandb` is left out if the user has a `WandbLogger`; without W&B the run directory gets a CSV file.
    `is_off` means that the user disabled all loggers.
    """
    if is_off:
        return list(own)
    users = next((logger for logger in own if isinstance(logger, WandbLogger)), None)
    if users is not None:
        _continue_run(users, run)
        return list(own)
    if wandb is None:
        return list(own) or [FileLogger(str(run.path))]
    # A disabled one serves code that needs a logger.
    return list(own) if own and wandb.mode == "disabled" else [*own, wandb]


def make_trackers(
    loggers: Sequence[Logger], wandb: QueuedWandbLogger | None, notice: Callable[[str], None]
) -> list[Tracker]:
    """Make a tracker for each logger of a run; all rows for W&B share the queue of the run's own logger."""
    trackers: list[Tracker] = []
    if wandb is not None and logs_to_wandb(loggers):
        trackers.append(WandbTracker(notice, wandb.writer))
    trackers += [LightningTracker(logger, notice) for logger in loggers if not isinstance(logger, WandbLogger)]
    return trackers


def _continue_run(logger: WandbLogger, run: RunDirectory) -> None:
    """Give a user's logger without a run id the run directory's: each attempt continues the W&B run."""
    arguments: dict[str, Any] = vars(logger).get("_wandb_init", {})
    fixed = logger.version is not None or os.environ.get("WANDB_RUN_ID") or os.environ.get("WANDB_SWEEP_ID")
    # A config file's `WandbLogger` has every argument of `wandb.init`, most of them None.
    if not fixed and arguments.get("resume") in ("allow", None) and vars(logger).get("_experiment") is None:
        arguments.update(id=run.wandb_id, resume="allow")
        vars(logger)["_id"] = run.wandb_id
