"""The W&B run: rank zero's alone, with an id that is fixed before the training, and never in its way."""

from __future__ import annotations

import contextlib
import netrc
import os
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from launcher.config import WandbOptions
from launcher.run_directory import RunDirectory
from launcher.wandb_writer import WandbWriter
from launcher.whole_file import private_umask


def resolve_mode(options: WandbOptions, env: Mapping[str, str]) -> tuple[str, str | None]:
    """Online, offline or disabled, and a notice where that is not what was asked for.

    Without a key W&B would ask for one on the terminal, and all ranks would wait for the answer.

    Args:
        options: the user's wish; `auto` takes WANDB_MODE, else online if a key is at hand.
        env: the environment.
    """
    asked = env.get("WANDB_MODE") if options.mode == "auto" else options.mode
    if asked in ("offline", "disabled"):
        return asked, None
    if env.get("WANDB_API_KEY") or env.get("WANDB_IDENTITY_TOKEN_FILE") or _has_netrc_key(env):
        return "online", None
    return "offline", "W&B is offline: no key is set (`wandb login` makes the next run online)"


def _has_netrc_key(env: Mapping[str, str]) -> bool:
    host = urllib.parse.urlparse(env.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(env.get("NETRC") or Path(env.get("HOME", "/")) / ".netrc")
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


class QueuedWandbLogger(WandbLogger):
    """Lightning's logger, its rows written by a thread: a stalled W&B must not hold the training up.

    Args:
        writer: has the queue.
        options: Lightning's own arguments.
    """

    def __init__(self, writer: WandbWriter, **options: Any) -> None:
        super().__init__(**options)
        self.writer = writer

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = dict(metrics)
        write = super().log_metrics
        self.writer.put(lambda: write(row, step))


def start_wandb(
    options: WandbOptions, run: RunDirectory, values: Mapping[str, Any], notice: Callable[[str], None]
) -> QueuedWandbLogger | None:
    """Start the run; offline if the server doesn't answer in time, not at all if W&B is broken or disabled.

    Args:
        options: the user's settings.
        run: says the directory and the id.
        values: config and plan, as plain values.
        notice: told what was done instead of what was asked for.
    """
    mode, remark = resolve_mode(options, os.environ)
    if remark:
        notice(remark)
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError as error:
        notice(f"W&B is not used: {error}")
        return None
    for attempt in (mode, "offline") if mode == "online" else (mode,):
        try:
            # W&B's own process writes until after the run's end.
            experiment = private_umask()(wandb.init)(
                project=options.project,
                entity=options.entity,
                group=options.group,
                tags=list(options.tags),
                name=run.name,
                id=run.wandb_id,
                dir=str(run.path),
                config=dict(values),
                resume="allow",
                mode=attempt,  # type: ignore[arg-type] -- one of its literals
                settings=wandb.Settings(init_timeout=options.init_timeout, silent=True, console="off"),
            )
        except Exception as error:  # noqa: BLE001 -- W&B raises many kinds, and none may stop a training
            wandb.teardown()
            notice(f"W&B {attempt} failed: {_first_line(error)}")
            continue
        # As Lightning does for runs that it starts: every chart against the true step.
        experiment.define_metric("trainer/global_step")
        experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return QueuedWandbLogger(WandbWriter(), experiment=experiment, save_dir=str(run.path), id=run.wandb_id)
    return None


def describe_run(logger: WandbLogger, values: Mapping[str, Any], notice: Callable[[str], None]) -> None:
    """Add to the run's config what is only known once the model is made.

    Args:
        logger: from `start_wandb`.
        values: from `launcher.wandb_config.build_wandb_config`.
        notice: told if W&B does not take them.
    """
    try:
        # A resumed run may have been trained on another number of ranks.
        logger.experiment.config.update(dict(values), allow_val_change=True)
    except Exception as error:  # noqa: BLE001 -- W&B raises many kinds, and none may stop a training
        notice(f"W&B did not take the model's config: {_first_line(error)}")


def finish_wandb(
    logger: QueuedWandbLogger, exit_code: int, notice: Callable[[str], None], timeout: float = 60.0
) -> None:
    """End the run; if the upload does not end in time, leave it to `wandb sync`.

    Args:
        logger: from `start_wandb`.
        exit_code: what the run ends with.
        notice: told if the upload was left.
        timeout: seconds that the end of a training may wait for W&B.
    """
    began = time.monotonic()
    dropped = logger.writer.close(timeout)
    if dropped:
        notice(f"W&B did not take {dropped} rows; the training was not held up")
    experiment = logger.experiment
    folder = Path(experiment.dir).parent
    done = threading.Event()

    def finish() -> None:
        with contextlib.suppress(Exception):
            experiment.finish(exit_code=exit_code)
        done.set()

    threading.Thread(target=finish, name="launcher-wandb-finish", daemon=True).start()
    if not done.wait(max(timeout - (time.monotonic() - began), 1.0)):
        notice(f"W&B did not take everything within {timeout:g} s; later: wandb sync {folder}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
