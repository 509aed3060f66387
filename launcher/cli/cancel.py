"""`launcher cancel`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.cli.parsers import add_runs_dir, new_parser
from launcher.core.errors import QueueError


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command's options."""
    parser = new_parser("cancel")
    parser.add_argument("run", metavar="RUN", help="name or path of the run or sweep")
    add_runs_dir(parser)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Stop a run or a sweep; returns the exit code."""
    options = build_parser().parse_args(arguments)
    from launcher.runs.lookup import find_run_named, locate_run
    from launcher.runs.sweep_record import find_sweep

    runs_dir, name = locate_run(Path(options.runs_dir), options.run)
    sweep = find_sweep(runs_dir, name)
    lines = _cancel_run(find_run_named(runs_dir, name)) if sweep is None else _cancel_sweep(sweep)
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 0


def _cancel_run(path: Path) -> list[str]:
    from launcher.jobs.backends.registry import find_backend
    from launcher.jobs.status import read_run_status
    from launcher.runs.lock import read_owner
    from launcher.runs.submission_record import read_records

    status = read_run_status(path)
    if status.has_ended:
        return [f"run {path.name} is not running: {status.state}"]
    records = read_records(path)
    if not records:
        trainer = read_owner(path)[0] or "no process"
        raise QueueError(
            f"run {path.name!r} was not submitted; {trainer} trains it; to save and stop, use Ctrl-C there, or send it "
            "SIGTERM"
        )
    return [find_backend(records[-1].get("cluster")).cancel(records[-1])]


def _cancel_sweep(path: Path) -> list[str]:
    from launcher.jobs.sweep_status import cancel_sweep, read_sweep_status

    if all(member.has_ended for member in read_sweep_status(path)):
        return [f"sweep {path.name} is not running"]
    return cancel_sweep(path)
