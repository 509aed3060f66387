"""The summary at the end of a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.core.distribution import describe_install
from launcher.core.terminal import make_console
from launcher.training.result import FitResult


def print_summary(result: FitResult, console: Console | None = None) -> None:
    """Print the folders, the last metrics, and the next commands."""
    console = console or make_console()
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0), title="Done", title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    metrics = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    table.add_row("steps", str(result.steps))
    table.add_row("metrics", Text(metrics or "none logged"))
    table.add_row("run", Text(_short(result.run)))
    table.add_row("checkpoint", Text(_short(result.checkpoint) if result.checkpoint else "none"))
    if result.best is not None and result.monitor is not None:
        best = _short(result.best) if isinstance(result.best, Path) else result.best
        table.add_row("best", Text(f"{best} ({result.monitor})"))
    for folder in sorted((result.run / "wandb").glob("*run-*")):
        if folder.is_dir():
            sync = "wandb sync " if folder.name.startswith("offline") else ""
            table.add_row("W&B", Text(sync + _short(folder)))
    # matplotlib is optional: where it is installed, every start takes half a second longer.
    first = "" if importlib.util.find_spec("matplotlib") else f"{describe_install('plot')} && "
    table.add_row("report", Text(f"{first}python -m launcher report {_short(result.run)}"))
    if result.checkpoint is not None:
        config = _short(result.run / "config.yaml")
        table.add_row(
            "continue", Text(f"python -m launcher fit --config {config} --resume auto --trainer.max_epochs N")
        )
    console.print(table)


def _short(path: Path) -> str:
    """Relative to the current directory if it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
