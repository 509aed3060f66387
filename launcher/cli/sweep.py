"""`submit --sweep`, and `status` and `cancel` of a sweep."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.core.errors import Problem, QueueError, SubmitError
from launcher.jobs.sweep import describe
from launcher.jobs.sweep_status import print_sweep, sweep_status
from launcher.runs.sweep_record import read_arrays
from slurm.queue import QueueCommandError, cancel_job


def submit_sweep(options: Namespace, overrides: Sequence[str], given: Mapping[str, str | None]) -> int:
    """`launcher submit` with `--sweep`; returns the exit code.

    Raises:
        SubmitError, ConfigError, RunDirectoryError, QueueError: nothing was queued.
    """
    from launcher.cli.job_commands import refuse_second
    from launcher.jobs.sweep_submit import array_executor, prepare_sweep, submit_array, submit_here

    if not options.sweep:
        raise SubmitError(
            [Problem("--array", f"given {options.array!r} without --sweep; it chooses among the sweep's runs")]
        )
    sweep = prepare_sweep(options, overrides, given)
    if options.dry_run:
        from launcher.jobs.preview import show

        chosen = dict.fromkeys(sweep.choice.indices, "")
        notes = [f"{m.name}: {describe(m.overrides)}{chosen.get(m.index, ' (not now)')}" for m in sweep.members]
        script = None if options.cluster == "local" else array_executor(sweep).batch_script()
        show(sweep.submissions[0], script, notes)
        return 0
    for submission in sweep.submissions:
        refuse_second(submission)
    snapshot = not options.no_snapshot
    if options.cluster == "local":
        said = submit_here(sweep, snapshot=snapshot)
    else:
        said = submit_array(sweep, snapshot=snapshot)
    runs_dir = sweep.members[0].config.runs_dir
    where = "" if runs_dir == "runs" else f" --runs-dir {runs_dir}"
    sys.stdout.write(f"{said}\nsweep {sweep.name}: launcher status {sweep.name}{where}, cancel\n")
    return 0


def show_sweep(sweep: Path, *, watch: bool, as_json: bool) -> int:
    """`launcher status SWEEP`; returns the exit code."""
    from launcher.cli.job_commands import WATCH_EVERY

    while True:
        found = sweep_status(sweep)
        if as_json:
            sys.stdout.write(json.dumps([member.to_dict() for member in found], default=str) + "\n")
        else:
            print_sweep(found, clear=watch)
        sys.stdout.flush()
        if not watch or all(member.has_ended for member in found):
            return 0
        time.sleep(WATCH_EVERY)


def cancel_sweep(sweep: Path) -> int:
    """`launcher cancel SWEEP`; returns the exit code.

    Raises:
        QueueError: SLURM's own words.
    """
    from launcher.process.background import ask_to_stop

    if all(member.has_ended for member in sweep_status(sweep)):
        sys.stdout.write(f"sweep {sweep.name} is not running\n")
        return 0
    for record in read_arrays(sweep):
        if record.get("cluster") == "slurm":
            try:
                cancel_job(str(record.get("job_id")))
            except QueueCommandError as error:
                raise QueueError(str(error)) from error
            sys.stdout.write(f"array {record['job_id']} is cancelled; its ranks save if SLURM leaves them the time\n")
        elif ask_to_stop(record.get("pid", 0), record.get("started")):
            sys.stdout.write(f"process {record['pid']} is asked to save and stop\n")
    return 0
