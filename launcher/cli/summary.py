"""The summary at the end of a run."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.text import Text

from launcher.core.distribution import describe_install
from launcher.core.terminal import make_console
from launcher.core.wrapping import escape_controls
from launcher.loggers.wandb_sync import find_sync_command
from launcher.runs.continuation import RecordedCommand, make_recorded_command, read_recorded_plan, shorten
from launcher.training.callbacks.progress_text import wrap_items
from launcher.training.result import FitResult

_INDENT = 12
# Columns of the metrics in a file or a pipe, which has no width.
_WIDEST = 160


def print_summary(result: FitResult, console: Console | None = None) -> None:
    """Print the folders, the last metrics, and the next commands."""
    console = console or make_console()
    console.print("Done", style="italic")

    def add(name: str, *lines: str) -> None:
        for index, line in enumerate(lines):
            label = ("" if index else name).ljust(_INDENT)
            # A long command is not divided: the terminal wraps it, and it can be copied.
            console.print(Text.assemble((label, "bold"), line), soft_wrap=True)

    add("steps", str(result.steps))
    add("metrics", *_metric_lines(result.metrics, min(console.width, _WIDEST) - _INDENT))
    if result.problem is not None:
        add("problem", result.problem)
    add("run", shorten(result.run))
    add("checkpoint", shorten(result.checkpoint) if result.checkpoint else "none")
    if result.best is not None and result.monitor is not None:
        best = shorten(result.best) if isinstance(result.best, Path) else result.best
        add("best", f"{best} ({escape_controls(result.monitor)})")
    wandb = _wandb_line(result.run / "wandb")
    if wandb is not None:
        add("W&B", wandb)
    # matplotlib is optional: where it is installed, every start takes half a second longer.
    first = "" if importlib.util.find_spec("matplotlib") else f"{describe_install('plot')} && "
    add("report", f"{first}python -m launcher report {shlex.quote(shorten(result.run))}")
    if result.checkpoint is not None:
        add("continue", *_continue_lines(result))


def _continue_lines(result: FitResult) -> list[str]:
    command = make_recorded_command(result.run, read_recorded_plan(result.run))
    longer = (*command.arguments, f"--trainer.{_reached_limit(result)}", "N")
    text = f"python -m {RecordedCommand(longer).text}"
    return [f"{command.place}:", text] if command.place else [text]


def _reached_limit(result: FitResult) -> str:
    """The limit that must be raised to train on."""
    most = -1 if result.trainer is None else result.trainer.max_steps
    return "max_steps" if most != -1 and result.steps >= most else "max_epochs"


def _metric_lines(metrics: Mapping[str, float], width: int) -> list[str]:
    """Lines on which no metric is divided."""
    return wrap_items([f"{escape_controls(name)} {value:.4g}" for name, value in metrics.items()], width) or [
        "none logged"
    ]


def _wandb_line(folder: Path) -> str | None:
    """The command that uploads the run, or the folder of its last attempt if W&B was online."""
    command = find_sync_command(folder, Path(shorten(folder)))
    online = sorted(path for path in folder.glob("run-*") if path.is_dir())
    return command or (shorten(online[-1]) if online else None)
