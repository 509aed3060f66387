"""`launcher submit`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.cli.keys import SUBMIT_SYNONYMS, check_class_paths, check_positionals, command_keys
from launcher.cli.main import SEE_SETTINGS
from launcher.cli.parsers import add_config, new_parser
from launcher.core.command_parser import CommandParser
from launcher.core.errors import Problem, SubmitError
from launcher.jobs.backends.registry import find_backend, list_backends
from slurm.job import list_job_options

if TYPE_CHECKING:
    from launcher.config.suggestions import CommandKeys

_EPILOG = f"""\
settings of the run are given as to `launcher fit`:
  --model my_pkg.MyModule --trainer.max_epochs 3 --devices 4 --precision auto
  {SEE_SETTINGS}

SLURM warns the job before its time is up or a preemption (--signal-delay): all
ranks save at one step, the job is queued again and continues with the next
step, in the same run directory and W&B run.

exit codes:
  0 queued   2 refused before anything was queued   1 SLURM refused the job
"""
_SHORT = {"partition": "-p", "account": "-A", "qos": "-q", "nodes": "-N", "time": "-t"}


def build_parser() -> CommandParser:
    """The parser of the command's options."""
    parser = new_parser("submit", usage="launcher submit [options] [--key value ...]", epilog=_EPILOG)
    add_config(parser)
    names = [backend.name for backend in list_backends()]
    summaries = "; ".join(f"{backend.name}: {backend.summary}" for backend in list_backends())
    parser.add_argument("--cluster", choices=names, default=names[0], help=f"where to run it. {summaries}")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and the plan; queue nothing")
    parser.add_argument("--no-snapshot", action="store_true",
                        help="use the code in place instead of a copy; later edits reach the job")  # fmt: skip
    parser.add_argument("--export-env", action="append", default=[], metavar="NAME",
                        help="pass this variable to the job too; once for each")  # fmt: skip
    parser.add_argument("--interface", metavar="NAME",
                        help="network interface of the nodes (default: the one that connects them)")  # fmt: skip
    parser.add_argument("--max-fruitless", type=int, default=3, metavar="N",
                        help="attempts in a row without a saved step that end the requeues (default 3)")  # fmt: skip
    parser.add_argument("--join-timeout", type=float, default=600.0, metavar="SECONDS",
                        help="how long the nodes wait for each other (default 600)")  # fmt: skip
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=V,V,...|FILE",
                        help="a run for each value, or each entry of a file's list; several make a grid")  # fmt: skip
    parser.add_argument("--array", metavar="0-3%2", help="which members of the sweep, and how many at once")
    group = parser.add_argument_group("SLURM, with sbatch's names")
    for name, text in list_job_options().items():
        short = [_SHORT[name]] if name in _SHORT else []
        group.add_argument(f"--{name}", *short, dest=f"slurm_{name}", metavar="X", help=text)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Submit a run or a sweep; returns the exit code."""
    parser = build_parser()
    options, overrides = parser.parse_known_args(list(arguments))
    keys = command_keys(parser, SUBMIT_SYNONYMS)
    check_positionals("submit", arguments, overrides, keys)
    if options.sweep:
        _submit_sweep(options, overrides, keys)
    elif options.array is not None:
        raise SubmitError([Problem("--array", f"given {options.array!r} without --sweep, whose runs it selects")])
    else:
        _submit_run(options, overrides, keys)
    return 0


def _submit_run(options: argparse.Namespace, overrides: Sequence[str], keys: CommandKeys) -> None:
    from launcher.config.loading import load_config
    from launcher.jobs.submission import JobOptions, prepare

    backend = find_backend(options.cluster)
    config = load_config(options.config, overrides, keys)
    check_class_paths(config, keys, has_all_modules=False)
    submission = prepare(config, JobOptions.from_arguments(options), os.environ)
    if options.dry_run:
        from launcher.jobs.preview import print_preview

        print_preview(submission, backend.render(submission))
        return
    from launcher.jobs.submit import refuse_running, submit_run

    refuse_running(submission)
    message = submit_run(backend, submission, snapshot=not options.no_snapshot)
    commands = f"launcher status {submission.name}{_runs_dir(config.runs_dir)}, logs, cancel"
    sys.stdout.write(f"{message}\nrun {submission.name}: {commands}\n")


def _submit_sweep(options: argparse.Namespace, overrides: Sequence[str], keys: CommandKeys) -> None:
    from launcher.jobs.submit import refuse_running
    from launcher.jobs.sweep import describe
    from launcher.jobs.sweep_submit import prepare_sweep, submit_sweep

    backend = find_backend(options.cluster)
    sweep = prepare_sweep(options, overrides, keys)
    for member in sweep.members:
        check_class_paths(member.config, keys, has_all_modules=False)
    if options.dry_run:
        from launcher.jobs.preview import print_preview

        chosen = set(sweep.choice.indices)
        notes = [f"{m.name}: {describe(m.overrides)}{'' if m.index in chosen else ' (not now)'}" for m in sweep.members]
        print_preview(sweep.submissions[0], backend.render_sweep(sweep), notes)
        return
    for submission in sweep.submissions:
        refuse_running(submission)
    message = submit_sweep(backend, sweep, snapshot=not options.no_snapshot)
    commands = f"launcher status {sweep.name}{_runs_dir(sweep.members[0].config.runs_dir)}, cancel"
    sys.stdout.write(f"{message}\nsweep {sweep.name}: {commands}\n")


def _runs_dir(runs_dir: str) -> str:
    return "" if runs_dir == "runs" else f" --runs-dir {runs_dir}"
