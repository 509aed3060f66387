"""Starts the ranks of a plain script: its run directory, its events, and the request for the start."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.agent.failure_report import RankOutcome, format_failure_report
from launcher.agent.preload_modules import list_script_modules
from launcher.agent.rank_main import RankCommand
from launcher.agent.rank_output import RankOutput
from launcher.agent.restart_policy import RestartDecision
from launcher.agent.script_main import ScriptTask, run_script
from launcher.agent.start import start_ranks
from launcher.agent.start_request import StartRequest
from launcher.config.launch_options import LaunchOptions
from launcher.config.schema import RunConfig
from launcher.core.atomic_write import write_file
from launcher.core.errors import RunDirectoryError, TopologyError
from launcher.core.event_text import name_stop_reason, signal_name
from launcher.core.events import FILE_NAME, EventLog
from launcher.core.secrets import hide_in_arguments
from launcher.hardware.cpus import count_usable_cpus
from launcher.hardware.devices import available_kind, device_count
from launcher.hardware.rank_count import estimate_ranks
from launcher.monitoring.health import format_ranks
from launcher.runs.lock import DirectoryOwnedError, RunLock, acquire_lock
from launcher.runs.script_record import FILE_NAME as RECORD
from launcher.runs.selection import make_directory_error
from launcher.runs.trust import check_run_folder

# A signal that makes the agent stop; the others are not 128 + N.
_FIRST_SIGNAL_CODE = 129


@dataclass(frozen=True, slots=True)
class ScriptStart:
    """A script to start.

    Attributes:
        runs_dir: folder of the run directories.
        name: of the run; one that exists gets another attempt, and its earlier logs stay.
        is_shown: whether the output of a rank is shown on the terminal, by its global and its local rank.
        preload: modules that the fork server imports; None for those that the script imports from installed packages.
    """

    task: ScriptTask
    options: LaunchOptions
    runs_dir: Path
    name: str
    is_shown: Callable[[int, int], bool] = lambda rank, local: True
    preload: tuple[str, ...] | None = None


def start_script(start: ScriptStart) -> int:
    """Start the script's ranks on this node and wait for them; returns the exit code.

    Raises:
        RunDirectoryError: the run is running already, belongs to `launcher fit`, or its directory cannot be written.
        TopologyError: there are no GPUs, or the rendezvous failed.
    """
    with _run_directory(start) as (run, is_owner):
        task = dataclasses.replace(start.task, run=str(run))
        failures: list[tuple[RankOutcome, int]] = []
        stopped: list[RankOutcome] = []

        def report(first: RankOutcome, outcomes: Sequence[RankOutcome], decision: RestartDecision) -> None:
            failures[:] = [(first, len(outcomes))]
            _print(describe_script_failure(first, outcomes, decision))

        request = StartRequest(
            RankCommand(run_script, (task.to_json(),)),
            start.options,
            estimated_ranks=estimate_ranks(RunConfig(), start.options),
            count_ranks=lambda: count_script_ranks(start.options.nproc_per_node),
            list_modules=lambda: list_script_modules(task, start.preload),
            make_variables=make_script_variables,
            always_has_agent=True,
            output=RankOutput(run / "logs", start.is_shown),
            is_plain=True,
            record_directory=run,
            report_stop_begin=lambda number, seconds: _print(describe_stop_begin(number, seconds)),
            report_stop=stopped.extend,
            report_failure=report,
        )
        code = start_ranks(request)
        assert code is not None  # noqa: S101 -- `always_has_agent`
        failure = failures[0][0] if failures else None
        if failure is None and code >= _FIRST_SIGNAL_CODE:
            how = describe_script_stop(code - 128, stopped)
            _print(f"{how}; the output of all ranks is in {_relative(str(run / 'logs'))}")
        if is_owner:
            _write_end(run, code, failure, stopped)
        return code


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # a closed terminal
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def count_script_ranks(asked: int | str | None, option: str = "--nproc-per-node") -> int:
    """Ranks on this node, as in torchrun: one by default; `auto` is one for each GPU, or for each core without GPUs.

    Raises:
        TopologyError: `gpu` was given, but there is none.
    """
    if asked is None or isinstance(asked, int):
        return asked or 1
    kind = "cpu" if asked == "cpu" else available_kind("auto")
    count = count_usable_cpus() if kind == "cpu" else device_count(kind)
    if asked == "gpu" and (kind == "cpu" or not count):
        raise TopologyError(f"given {option} gpu, but this machine has no GPU; give a number, cpu or auto")
    return count


def make_script_variables(ranks: int) -> dict[str, str]:
    """As torchrun by default: its signals, and one thread for each of several ranks."""
    threads = {"OMP_NUM_THREADS": "1"} if ranks > 1 else {}
    return {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT", **threads}


def describe_script_failure(first: RankOutcome, outcomes: Sequence[RankOutcome], decision: RestartDecision) -> str:
    """The error report; what the terminal has shown already is not repeated."""
    same: list[RankOutcome] = []
    if first.error is None and (first.exit_code or 0) > 0 and not first.hung:
        # Of several ranks that have exited with the same code, the lowest one.
        same = [each for each in outcomes if each.error is None and each.exit_code == first.exit_code]
        first = min(same, key=lambda each: each.rank)
    first = dataclasses.replace(first, log=None if first.log is None else _relative(first.log))
    if first.error is not None:
        # The log may end with other text; the traceback was not shown.
        first = dataclasses.replace(first, last_lines=first.error.traceback)
    elif same and first.rank == 0:
        who = f"all {len(same)} ranks" if len(same) == len(outcomes) > 1 else f"rank 0 ({first.host})"
        log = "" if first.log is None else f"; the output is in {first.log}"
        return f"error: {who} exited with code {first.exit_code}{log}\n  {decision.reason}"
    return format_failure_report(first, outcomes, decision.reason)


def describe_stop_begin(number: int, seconds: float) -> str:
    """The line that shows at once that a signal was received."""
    name = _name_signal(number)
    again = "; Ctrl-C again kills them" if number == signal.SIGINT else ""
    # The terminal shows ^C without a line end.
    start = "\n" if number in (signal.SIGINT, signal.SIGQUIT) and sys.stderr.isatty() else ""
    return f"{start}{name}: waiting for the ranks to end, at most {seconds:.0f} s{again}"


def describe_script_stop(number: int, outcomes: Sequence[RankOutcome]) -> str:
    """How the ranks ended after a signal."""
    killed = [each.rank for each in outcomes if each.exit_code == -signal.SIGKILL]
    end = "; all ranks ended with exit code 0" if _have_all_ended_well(outcomes) else ""
    return f"stopped by {_name_signal(number)}" + (f"; killed {format_ranks(killed, len(killed))}" if killed else end)


def _have_all_ended_well(outcomes: Sequence[RankOutcome]) -> bool:
    return bool(outcomes) and all(each.exit_code == 0 for each in outcomes)


def _name_signal(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal_name(number)


def _relative(path: str) -> str:
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def _may_own_run(options: LaunchOptions) -> bool:
    """Whether this node is the one that serves the rendezvous, as far as the options state it."""
    if not options.several_nodes:
        return True
    if options.node_rank is not None:
        return options.node_rank == 0
    from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

    return _matches_machine_hostname(options.endpoint_host)


@contextlib.contextmanager
def _run_directory(start: ScriptStart) -> Iterator[tuple[Path, bool]]:
    """Create the directory; yields its absolute path, and whether this node owns it: it writes the run's end."""
    path = start.runs_dir.absolute() / start.name
    try:
        check_run_folder(path)
        if (path / "config.yaml").exists():
            raise RunDirectoryError(
                f"run {start.name!r} at {path} was started by `launcher fit`; choose another --name"
            )
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        (path / "logs").mkdir(mode=0o700, exist_ok=True)
        lock = _lock(path, start) if _may_own_run(start.options) else None
    except OSError as error:
        raise make_directory_error(path, error) from error
    try:
        yield path, lock is not None
    finally:
        if lock is not None:
            lock.release()


def _lock(path: Path, start: ScriptStart) -> RunLock | None:
    """The lock of the run; None if another agent of this run on the same machine holds it."""
    try:
        lock = acquire_lock(path, os.environ)
    except DirectoryOwnedError as error:
        if start.options.several_nodes and start.options.node_rank is None:
            return None
        raise RunDirectoryError(
            f"run {start.name!r} is running already ({error.owner or 'another process starts it'}); choose another "
            "--name, or stop that process first"
        ) from error
    write_file(path / RECORD, json.dumps(_record(start)) + "\n")
    return lock


def _record(start: ScriptStart) -> dict[str, Any]:
    task = start.task
    return {
        "kind": task.kind,
        "target": task.target,
        "arguments": hide_in_arguments(task.arguments),
        "cwd": str(Path.cwd()),
        "nproc_per_node": start.options.nproc_per_node or 1,
        "started": round(time.time(), 3),
    }


def _write_end(run: Path, code: int, failure: RankOutcome | None, stopped: Sequence[RankOutcome]) -> None:
    events = EventLog(run / FILE_NAME, rank=0)
    if code == 0:
        events.write("finished", step=None, metrics={}, checkpoint=None)
    elif failure is None and code >= _FIRST_SIGNAL_CODE:
        reason = name_stop_reason(code - 128)
        events.write("interrupted", signal=code - 128, step=None, checkpoint=None, reason=reason,
                     exit_code=0 if _have_all_ended_well(stopped) else None)  # fmt: skip
    elif failure is None:
        events.write("failed", host=os.uname().nodename, error=f"exit code {code}")
    # Otherwise the agent has written `rank_failed`.
