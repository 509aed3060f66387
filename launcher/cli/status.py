"""`launcher status`: runs as a table or as JSON, or the members of a sweep."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from launcher.cli.parsers import add_runs_dir, new_parser

if TYPE_CHECKING:
    from launcher.jobs.status import RunStatus
    from launcher.jobs.sweep_status import MemberStatus

_WATCH_SECONDS = 5.0
_Status = TypeVar("_Status", "RunStatus", "MemberStatus")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command's options."""
    parser = new_parser("status")
    parser.add_argument("run", nargs="?", metavar="RUN", help="name of one run or sweep (default: all runs)")
    parser.add_argument("--watch", action="store_true", help="repeat every few seconds, until Ctrl-C or the end")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_runs_dir(parser)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Print the state of all runs, of one run, or of a sweep; returns the exit code."""
    options = build_parser().parse_args(arguments)
    from launcher.jobs.status import read_run_status, read_run_statuses
    from launcher.runs.lookup import find_run_named, find_runs
    from launcher.runs.sweep_record import find_sweep

    runs_dir = Path(options.runs_dir)
    if options.run is None:
        _show(options, lambda: read_run_statuses(find_runs(runs_dir)), _print_runs)
        return 0
    sweep = find_sweep(runs_dir, options.run)
    if sweep is not None:
        from launcher.jobs.sweep_status import read_sweep_status

        _show(options, lambda: read_sweep_status(sweep), _print_members)
        return 0
    path = find_run_named(runs_dir, options.run)
    _show(options, lambda: [read_run_status(path)], _print_runs, is_one=True)
    return 0


def _show(
    options: argparse.Namespace,
    read: Callable[[], Sequence[_Status]],
    print_table: Callable[[Sequence[_Status], bool], None],
    *,
    is_one: bool = False,
) -> None:
    """Print the result of `read`; with `--watch` repeatedly, until all have ended."""
    while True:
        found = read()
        if options.json:
            values = [status.to_dict() for status in found]
            sys.stdout.write(json.dumps(values[0] if is_one else values, default=str) + "\n")
        else:
            print_table(found, options.watch)
        sys.stdout.flush()
        if not options.watch or all(status.has_ended for status in found):
            return
        time.sleep(_WATCH_SECONDS)


def _print_runs(found: Sequence[RunStatus], clear: bool) -> None:
    rows = []
    for status in found:
        metrics = "  ".join(f"{name} {_short(value)}" for name, value in list(status.metrics.items())[:3])
        rows.append((status.name, status.state, status.job or "", status.attempts, status.step, status.checkpoint_step,
                     metrics, status.detail))  # fmt: skip
    _print_table(("run", "state", "job", "attempts", "step", "saved", "last metrics", ""), rows, clear=clear)


def _print_members(found: Sequence[MemberStatus], clear: bool) -> None:
    from launcher.jobs.status import RunStatus
    from launcher.jobs.sweep import describe

    rows = []
    for member in found:
        status = member.status or RunStatus("", "not queued")
        rows.append((member.index, describe(member.settings), status.state, status.attempts, status.step,
                     _short(member.last), _short(member.best), status.detail))  # fmt: skip
    monitors = ", ".join(dict.fromkeys(member.monitor for member in found))
    _print_table(("", "settings", "state", "attempts", "step", monitors, "best", ""), rows, clear=clear)


def _print_table(columns: Iterable[str], rows: Sequence[Iterable[object]], *, clear: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    from launcher.core.terminal import make_console

    console = make_console()
    if clear and console.is_terminal:
        console.clear()
    if not rows:
        console.print("no run yet")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Names and messages of users may look like markup.
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)


def _short(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, int | float) else str(value)
