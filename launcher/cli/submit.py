"""`launcher submit`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.cli.keys import check_class_paths, check_positionals, command_keys
from launcher.cli.main import SEE_SETTINGS
from launcher.cli.parsers import add_config, new_parser
from launcher.config.synonyms import ADVICE
from launcher.core.command_parser import CommandParser
from launcher.core.errors import Problem, SubmitError
from launcher.jobs.backends.registry import find_backend, list_backends
from slurm.job import list_job_options

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from launcher.config.suggestions import CommandKeys
    from launcher.jobs.submission import Submission

_EPILOG = f"""\
settings of the run are given as to `launcher fit`:
  --model my_pkg.MyModule --trainer.max_epochs 3 --devices 4 --precision auto
  {SEE_SETTINGS}

SLURM warns the job before its time is up or a preemption (--signal-delay): all
ranks save at one step, the job is queued again and continues with the next
step, in the same run directory and W&B run.

A plain PyTorch script:
  launcher submit --script train.py [options of `launcher run`] -- --lr 1e-3
Its ranks get SIGTERM and have the time until the job's end to save; the job is
queued again, and the script resumes itself.

exit codes:
  0 queued   2 refused before anything was queued   1 SLURM refused the job
"""
# submitit's names of sbatch's options, too.
SYNONYMS = {**{f"slurm_{name.replace('-', '_')}": f"--{name}" for name in list_job_options()}, **ADVICE["submit"]}
_SHORT = {"partition": "-p", "account": "-A", "qos": "-q", "nodes": "-N", "time": "-t"}


def build_parser() -> CommandParser:
    """The parser of the command's options."""
    parser = new_parser("submit", usage="launcher submit [options] [--key value ...]", epilog=_EPILOG)
    add_config(parser)
    names = [backend.name for backend in list_backends()]
    summaries = "; ".join(f"{backend.name}: {backend.summary}" for backend in list_backends())
    parser.add_argument("--script", metavar="SCRIPT.py",
                        help="a plain script, with options of `launcher run`; its arguments follow --")  # fmt: skip
    parser.add_argument("-m", "--module", metavar="MODULE", help="the same for a module, as in `python -m`")
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
    own, script_arguments = split_arguments(arguments)
    parser = build_parser()
    options, overrides = parser.parse_known_args(own)
    if options.script is not None or options.module is not None:
        _submit_script(options, overrides, script_arguments)
        return 0
    keys = command_keys(parser, SYNONYMS)
    check_positionals("submit", own, overrides, keys)
    if script_arguments:
        raise SubmitError([Problem("--", "given without --script or -m, whose arguments follow it")])
    if options.sweep:
        _submit_sweep(options, overrides, keys)
    elif options.array is not None:
        raise SubmitError([Problem("--array", f"given {options.array!r} without --sweep, whose runs it selects")])
    else:
        _submit_run(options, overrides, keys)
    return 0


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before and after the first `--`."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:end]), list(arguments[end + 1 :])


def _submit_script(options: argparse.Namespace, run_options: Sequence[str], arguments: Sequence[str]) -> None:
    from launcher.cli.run import prepare_script_submission
    from launcher.config.schema import RunConfig
    from launcher.jobs.submission import JobOptions, prepare

    given = [f"--{name}" for name in ("config", "sweep", "array") if getattr(options, name)]
    if given:
        raise SubmitError([Problem(each, "given with a script, which has no config; leave it out") for each in given])
    if options.script is not None and options.module is not None:
        raise SubmitError([Problem("-m", "given with --script; leave out one of them")])
    script = [str(options.script)] if options.module is None else ["-m", str(options.module)]
    found = prepare_script_submission(run_options, [*script, *arguments])
    config = RunConfig(name=found.name, runs_dir=found.runs_dir, devices=found.devices)
    submission = prepare(config, JobOptions.from_arguments(options), os.environ, found.command)
    backend = find_backend(options.cluster)
    if options.dry_run:
        sys.stdout.write(backend.render(submission) or "")
        sys.stderr.write(f"on each node: {shlex.join([*submission.command, *found.command.script])}\n")
        return
    _queue(options, submission, config)


def _queue(options: argparse.Namespace, submission: Submission, config: RunConfig) -> None:
    from launcher.jobs.submit import refuse_running, submit_run

    refuse_running(submission)
    message = submit_run(find_backend(options.cluster), submission, snapshot=not options.no_snapshot)
    commands = f"launcher status {submission.name}{_runs_dir(config.runs_dir)}, logs, cancel"
    sys.stdout.write(f"{message}\nrun {submission.name}: {commands}\n")


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
    _queue(options, submission, config)


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
