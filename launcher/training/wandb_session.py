"""The W&B run of a training or an evaluation, from its logger to its exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from launcher.core.errors import Interrupted, LauncherError
from launcher.loggers.selection import make_wandb_logger
from launcher.loggers.wandb_run import QueuedWandbLogger, finish_wandb
from launcher.process.open_resources import keep_open
from launcher.training.context import RunContext


@contextlib.contextmanager
def wandb_session(ctx: RunContext, values: Mapping[str, Any]) -> Iterator[QueuedWandbLogger | None]:
    """The run's W&B logger, with the values in W&B's config; its W&B run ends with the exit code of the code inside.

    With `ctx.stays_open`, the W&B run of a successful training is closed later.
    """
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
