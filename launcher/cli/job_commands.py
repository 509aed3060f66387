"""`launcher submit`, `status`, `logs` and `cancel`: from their words to their exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli.job_parser import build_job_parser
from launcher.core.errors import LauncherError, NoSuchRunError, QueueError, RunDirectoryError

if TYPE_CHECKING:
    from launcher.jobs.status import RunStatus
    from launcher.jobs.submission import Submission

WATCH_EVERY = 5.0


def run_job_command(command: str, words: Sequence[str]) -> int:
    """Run one of `launcher.cli.job_parser.JOB_COMMANDS`; returns the exit code."""
    parser = build_job_parser(command)
    options, overrides = parser.parse_known_args(list(words))
    if overrides and command != "submit":
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        if command == "submit":
            return _submit(options, overrides)
        return {"status": _status, "logs": _logs, "cancel": _cancel}[command](options)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read has enough, as in `launcher logs RUN | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except LauncherError as error:
        if options.debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


def _submit(options: Namespace, overrides: Sequence[str]) -> int:
    from launcher.config.loading import load_config
    from launcher.jobs.submission import prepare, terms_of

    given = {key.removeprefix("slurm_"): value for key, value in vars(options).items() if key.startswith("slurm_")}
    if options.sweep or options.array is not None:
        from launcher.cli.sweep import submit_sweep

        return submit_sweep(options, overrides, given)
    config = load_config(options.config, overrides)
    submission = prepare(config, given, os.environ, options.export_env, terms_of(options))
    if options.dry_run:
        from launcher.jobs.preview import show
        from launcher.jobs.submit import batch_script

        # The script alone is on stdout: `launcher submit --dry-run > job.sh` is what sbatch would get.
        show(submission, None if options.cluster == "local" else batch_script(submission))
        return 0
    refuse_second(submission)
    if options.cluster == "local":
        from launcher.jobs.submit import submit_local

        said = submit_local(submission, snapshot=not options.no_snapshot)
    else:
        from launcher.jobs.submit import submit_slurm

        said = submit_slurm(submission, snapshot=not options.no_snapshot)
    name = submission.name
    where = "" if config.runs_dir == "runs" else f" --runs-dir {config.runs_dir}"
    sys.stdout.write(f"{said}\nrun {name}: launcher status {name}{where}, logs, cancel\n")
    return 0


def refuse_second(submission: Submission) -> None:
    """One run trains once at a time."""
    from launcher.jobs.status import run_status

    status = run_status(submission.place.path) if submission.place.path.exists() else None
    if status is not None and not status.has_ended:
        raise RunDirectoryError(
            f"run {submission.name!r} is {status.state} already ({status.job or 'on this machine'}); "
            f"choose another --name, or end it first: launcher cancel {submission.name}"
        )


def _status(options: Namespace) -> int:
    from launcher.jobs.status import run_status
    from launcher.runs.lookup import find_run_named, find_runs
    from launcher.runs.sweep_record import find_sweep

    runs_dir = Path(options.runs_dir)
    sweep = None if options.run is None else find_sweep(runs_dir, options.run)
    if sweep is not None:
        from launcher.cli.sweep import show_sweep

        return show_sweep(sweep, watch=options.watch, as_json=options.json)
    named = None if options.run is None else find_run_named(runs_dir, options.run)
    while True:
        runs = find_runs(runs_dir) if named is None else [named]
        found = [run_status(run) for run in runs]
        if options.json:
            values = [status.to_dict() for status in found]
            sys.stdout.write(json.dumps(values if named is None else values[0], default=str) + "\n")
        else:
            _print_status(found, clear=options.watch)
        sys.stdout.flush()
        if not options.watch or all(status.has_ended for status in found):
            return 0
        time.sleep(WATCH_EVERY)


def _print_status(found: Sequence[RunStatus], *, clear: bool) -> None:
    from rich.table import Table

    from launcher.core.terminal import make_console

    console = make_console()
    if clear and console.is_terminal:
        console.clear()
    if not found:
        console.print("no run yet")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("run", "state", "job", "attempts", "step", "saved", "last metrics", ""):
        table.add_column(column, overflow="fold")
    for status in found:
        metrics = "  ".join(f"{name} {_short(value)}" for name, value in list(status.metrics.items())[:3])
        row = (status.name, status.state, status.job or "", status.attempts, status.step, status.checkpoint_step,
               metrics, status.detail)  # fmt: skip
        # Text, not markup: what a job or a model says may look like any.
        table.add_row(*(_plain(cell) for cell in row))
    console.print(table)


def _plain(value: object) -> str:
    from rich.markup import escape

    return escape(str(value))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _logs(options: Namespace) -> int:
    from launcher.jobs.logs import follow_log, read_log
    from launcher.jobs.status import run_status
    from launcher.runs.lookup import find_run_named
    from launcher.runs.sweep_record import find_sweep, read_members

    sweep = find_sweep(Path(options.runs_dir), options.run)
    if sweep is not None:
        names = ", ".join(member["name"] for member in read_members(sweep)[:8])
        raise NoSuchRunError(f"{options.run!r} is a sweep, and its runs have the logs; name one of {names}")
    run = find_run_named(Path(options.runs_dir), options.run)
    lines = read_log(run, options.rank)
    if options.follow:
        lines = follow_log(run, options.rank, lambda: run_status(run).has_ended)
    for piece in lines:
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    return 0


def _cancel(options: Namespace) -> int:
    from launcher.jobs.status import run_status
    from launcher.process.background import ask_to_stop
    from launcher.runs.lock import read_owner
    from launcher.runs.lookup import find_run_named
    from launcher.runs.submission_record import read_records
    from launcher.runs.sweep_record import find_sweep
    from slurm.queue import QueueCommandError, cancel_job

    sweep = find_sweep(Path(options.runs_dir), options.run)
    if sweep is not None:
        from launcher.cli.sweep import cancel_sweep

        return cancel_sweep(sweep)
    run = find_run_named(Path(options.runs_dir), options.run)
    status = run_status(run)
    records = read_records(run)
    record = records[-1] if records else None
    if status.has_ended:
        sys.stdout.write(f"run {run.name} is not running: {status.state}\n")
        return 0
    if record is not None and record["cluster"] == "slurm":
        try:
            cancel_job(str(record["job_id"]))
        except QueueCommandError as error:
            raise QueueError(str(error)) from error
        sys.stdout.write(f"job {record['job_id']} is cancelled; its ranks save if SLURM leaves them the time\n")
        return 0
    if record is not None and record.get("waits_in"):
        raise QueueError(f"run {run.name!r} has not begun; cancel its sweep ({status.job}), or this run once it trains")
    if record is not None and ask_to_stop(record.get("pid", 0), record.get("started")):
        sys.stdout.write(f"process {record['pid']} is asked to save and stop\n")
        return 0
    raise QueueError(
        f"run {run.name!r} was not submitted and is trained by {read_owner(run)[0] or 'nobody any more'}; "
        "Ctrl-C there, or SIGTERM to that process, saves and stops it"
    )
