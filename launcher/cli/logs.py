"""`launcher logs`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.cli.parsers import add_runs_dir, new_parser
from launcher.core.errors import NoSuchRunError


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command's options."""
    parser = new_parser("logs")
    parser.add_argument("run", metavar="RUN", help="name or path of the run")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="the rank (default 0)")
    parser.add_argument("--follow", "-f", action="store_true", help="keep printing new output, until the end")
    add_runs_dir(parser)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Print a rank's log; returns the exit code."""
    options = build_parser().parse_args(arguments)
    from launcher.jobs.logs import follow_log, read_log
    from launcher.jobs.status import read_run_status
    from launcher.runs.lookup import find_run_named, locate_run
    from launcher.runs.sweep_record import find_sweep, read_members

    runs_dir, name = locate_run(Path(options.runs_dir), options.run)
    sweep = find_sweep(runs_dir, name)
    if sweep is not None:
        names = ", ".join(member["name"] for member in read_members(sweep)[:8])
        raise NoSuchRunError(f"{options.run!r} is a sweep, and its runs have the logs; name one of {names}")
    path = find_run_named(runs_dir, name)
    chunks = read_log(path, options.rank)
    if options.follow:
        chunks = follow_log(path, options.rank, lambda: read_run_status(path).has_ended)
    for chunk in chunks:
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    return 0
