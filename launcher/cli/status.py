"""`launcher status`: runs as a table or as JSON, or the members of a sweep."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from launcher.cli.parsers import add_runs_dir, new_parser
from launcher.core.wrapping import escape_controls

if TYPE_CHECKING:
    from rich.console import Console

    from launcher.jobs.status import RunStatus
    from launcher.jobs.sweep_status import MemberStatus

_WATCH_SECONDS = 5.0
_METRICS = "last metrics"
# Columns that make room for the metrics, the first one first; `--json` has all of them.
_LEFT_OUT = ("attempts", "saved", "job")
_Status = TypeVar("_Status", "RunStatus", "MemberStatus")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command's options."""
    parser = new_parser("status")
    parser.add_argument("run", nargs="?", metavar="RUN", help="name or path of one run or sweep (default: all runs)")
    parser.add_argument("--watch", action="store_true", help="repeat every few seconds, until Ctrl-C or the end")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_runs_dir(parser)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Print the state of all runs, of one run, or of a sweep; returns the exit code."""
    options = build_parser().parse_args(arguments)
    from launcher.jobs.status import read_run_status, read_run_statuses
    from launcher.runs.lookup import find_run_named, find_runs, locate_run
    from launcher.runs.sweep_record import find_sweep

    runs_dir = Path(options.runs_dir)
    if options.run is None:
        _show(options, lambda: read_run_statuses(find_runs(runs_dir)), _print_runs)
        return 0
    runs_dir, name = locate_run(runs_dir, options.run)
    sweep = find_sweep(runs_dir, name)
    if sweep is not None:
        from launcher.jobs.sweep_status import read_sweep_status

        _show(options, lambda: read_sweep_status(sweep), _print_members)
        return 0
    path = find_run_named(runs_dir, name)
    _show(options, lambda: [read_run_status(path)], _print_one, is_one=True)
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
    console = _start_page(clear)
    lines = format_runs(found, console.width) if found else ["no run yet"]
    for line in lines:
        # Names and messages of users may look like markup.
        console.print(line, markup=False, soft_wrap=True)


def _print_one(found: Sequence[RunStatus], clear: bool) -> None:
    console = _start_page(clear)
    (status,) = found
    lines = [*format_runs([dataclasses.replace(status, detail="", hang="")], console.width), *describe_status(status)]
    for line in lines:
        console.print(line, markup=False, soft_wrap=line.startswith("  launcher "))


def _print_members(found: Sequence[MemberStatus], clear: bool) -> None:
    console = _start_page(clear)
    for line in format_members(found, console.width):
        console.print(line, markup=False, soft_wrap=True)


def _start_page(clear: bool) -> Console:
    from launcher.core.terminal import make_console

    console = make_console()
    if clear and console.is_terminal:
        console.clear()
    return console


def format_runs(found: Sequence[RunStatus], width: int) -> list[str]:
    """A line for each run, below it why it ended and what to do, each at most `width` wide where names allow it.

    Where a line has no room for a metric, the columns of `_LEFT_OUT` are left out one by one, then the metrics.
    """
    metrics = [
        [f"{escape_controls(name)} {_short(value)}" for name, value in status.metrics.items()] for status in found
    ]
    firsts = [len(each[0]) for each in metrics if each] or [0]
    # At best, each run shows a metric; with a very long name, some run does.
    fitting = _fit_columns(found, width, max(firsts)) or _fit_columns(found, width, min(firsts))
    if all(s.is_script for s in found):
        fitting = None  # scripts report no metrics
    lines = fitting or _align_runs(found, ())
    shown = [f"{lines[0]}  {_METRICS}" if fitting else lines[0].rstrip()]
    for status, line, cells in zip(found, lines[1:], metrics, strict=True):
        while cells and len(line) + 2 + len("  ".join(cells)) > width:
            cells.pop()
        shown.append("  ".join([line, *cells[:6]]).rstrip())
        shown += _describe_below(status, width)
    return shown


def _fit_columns(found: Sequence[RunStatus], width: int, metric: int) -> list[str] | None:
    """The lines of the table with the most columns that leave room for a metric of this length; None if none do."""
    for count in range(len(_LEFT_OUT) + 1):
        lines = _align_runs(found, _LEFT_OUT[:count])
        if len(lines[0]) + 2 + max(metric, len(_METRICS)) <= width:
            return lines
    return None


def _align_runs(found: Sequence[RunStatus], left_out: Sequence[str]) -> list[str]:
    """The lines of the table without metrics, and without the columns of these names and those without content."""
    columns = {
        "run": [s.name for s in found],
        "state": [s.state for s in found],
        "step": ["-" if s.is_script else f"{s.step:,}" for s in found],
        "saved": ["-" if s.is_script else f"{s.checkpoint_step:,}" for s in found],
        "attempts": [str(s.attempts) for s in found] if any(s.attempts > 1 for s in found) else None,
        "job": [s.job or "" for s in found] if any(s.job for s in found) else None,
    }
    kept = {name: cells for name, cells in columns.items() if cells is not None and name not in left_out}
    right = [position for position, name in enumerate(kept) if name in ("step", "saved", "attempts")]
    return _align([list(kept), *map(list, zip(*kept.values(), strict=True))], right)


def format_members(found: Sequence[MemberStatus], width: int) -> list[str]:
    """A line for each member of a sweep, with the best marked, and below it why it ended and what to do."""
    from launcher.jobs.status import RunStatus
    from launcher.jobs.sweep import describe
    from launcher.jobs.sweep_status import sort_by_monitor

    monitor = found[0].monitor
    first = sort_by_monitor(found)[0]
    rows: list[list[str]] = []
    for member in found:
        status = member.status or RunStatus("", "not queued")
        is_best = member is first and member.best is not None
        rows.append([str(member.index), status.state, f"{status.step:,}", _short(member.last),
                     f"{_short(member.best)}{' *' if is_best else '  '}", describe(member.settings)])  # fmt: skip
    lines = _align([["", "state", "step", "last", "best  ", "settings"], *rows], right=(0, 2, 3, 4))
    shown = [lines[0].rstrip()]
    for member, line in zip(found, lines[1:], strict=True):
        shown.append(line.rstrip())
        if member.status is not None:
            shown += _describe_below(member.status, width)
    order = "highest" if first.is_highest_best else "lowest"
    return [*shown, f"last, best: values of {escape_controls(monitor)}; * marks the best ({order})"]


def describe_status(status: RunStatus) -> list[str]:
    """Why a run ended or waits, what to do next with the command, its peak memory and use of time, each complete."""
    from launcher.runs.goodput import describe_goodput
    from strategies.units import format_bytes

    lines = [text for text in (status.detail, status.hang) if text]
    if status.advice:
        lines.append(f"next: {status.advice}")
    if status.command:
        lines.append(f"  {status.command}")
    if status.peak_memory is not None:
        lines.append(f"peak memory of a rank: {format_bytes(status.peak_memory)}, {status.peak_memory_of}")
    if status.goodput is not None and status.goodput.ratio is not None:
        lines.append(describe_goodput(status.goodput))
    return lines


def _describe_below(status: RunStatus, width: int) -> list[str]:
    if status.hang:
        return [f"  {shorten_ending(status.hang, '', width - 2)}"]
    # A run that is done as planned needs no line.
    if not status.detail or status.reason in ("finished", "max_epochs", "max_steps"):
        return []
    return [f"  {shorten_ending(status.detail, status.advice, width - 2)}"]


def shorten_ending(text: str, advice: str, width: int) -> str:
    """The reason of an ending and the advice in at most `width` characters; as much of the advice as fits."""
    parts = advice.split("; ") if advice else []
    least = min(len(text), width // 2)
    while parts and least + 3 + len("; ".join(parts)) > width:
        parts.pop()
    end = f"; {'; '.join(parts)}" if parts else ""
    room = width - len(end)
    return (text if len(text) <= room else text[: room - 1].rstrip() + "\u2026") + end


def _align(rows: Sequence[Sequence[str]], right: Collection[int]) -> list[str]:
    """Lines with the columns of the rows, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for row in rows:
        cells = zip(range(len(row)), row, widths, strict=True)
        lines.append("  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, cell, width in cells))
    return lines


def _short(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, int | float) else str(value)
