"""What a process does that the agent made to be a rank: the same as one of torchrun's, after a few preparations."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.process import parent_death
from launcher.process.rank_status import FOLDER_VARIABLE, RankStatusWriter, stacks_path

# Asks a rank for its stacks: a real-time signal, as USR1 and USR2 may be the user's, NCCL's or the scheduler's.
STACKS_SIGNAL = signal.SIGRTMAX - 2


@dataclass(frozen=True, slots=True)
class RankCommand:
    """What every rank runs.

    Attributes:
        main: takes the arguments, returns the exit code. A function of a module, as it is pickled by its name.
        arguments: the command line.
    """

    main: Callable[[Sequence[str]], int]
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RankTask:
    """What crosses from the agent to a rank.

    Attributes:
        command: what the rank runs.
        folder: where the rank reports its state to the agent.
    """

    command: RankCommand
    folder: str


def run_rank(task: RankTask) -> None:
    """Be one rank, from its environment to its exit code; never returns."""
    _tie_to_agent()
    os.environ[FOLDER_VARIABLE] = task.folder
    set_rank_zero(os.environ)
    # Else loader workers would come from a fork server of each rank's own, and import everything at every epoch.
    multiprocessing.set_start_method(None, force=True)
    report = RankStatusWriter.from_env(os.environ)
    _prepare_stacks(Path(task.folder), report)
    code = 1
    try:
        code = task.command.main(task.command.arguments)
    except SystemExit as ending:
        # The user's code may end the process as it likes.
        code = ending.code if isinstance(ending.code, int) else 1 if ending.code else 0
    except BaseException as error:  # noqa: BLE001 -- the last frame of this process: told, then ended
        report.record_error(error)
        report.write_traceback(error)
    _leave(code)


def _tie_to_agent() -> None:
    """Die with the agent, and have signals from it alone, not from the terminal."""
    parent = multiprocessing.parent_process()
    parent_death.die_with_parent(parent_death.fork_server_pid or (parent.pid if parent else None))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, parent_death.FOR_RANKS)
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setpgid(0, parent_death.fork_server_pid or 0)
    # In the background a change of the terminal's settings would stop the process.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)


def set_rank_zero(env: Mapping[str, str]) -> None:
    """Lightning and torchmetrics took their rank from the environment on import: in the fork server there was none."""
    for name, variable in (
        ("lightning_utilities.core.rank_zero", "RANK"),
        ("torchmetrics.utilities.prints", "LOCAL_RANK"),
    ):
        module = sys.modules.get(name)
        if module is not None:
            vars(module)["rank_zero_only"].rank = int(env[variable])


def _prepare_stacks(folder: Path, report: RankStatusWriter) -> None:
    # Where a rank dies of a signal is in its log.
    faulthandler.enable()
    with contextlib.suppress(OSError):
        # Open as long as this process lives: faulthandler writes to its descriptor.
        path = stacks_path(folder, int(os.environ["RANK"]))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        # Lightning puts back what Python knew of when its trainer ends: that must not be the default, which kills.
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)
        faulthandler.register(STACKS_SIGNAL, descriptor, all_threads=True, chain=False)
        report.announce_stack_dumps()


def _leave(code: int) -> None:
    """End as an interpreter does: `multiprocessing` would skip what waits for the end of the process."""
    shutdown: Callable[[], Any] = vars(threading)["_shutdown"]
    run_exit_functions: Callable[[], Any] = vars(atexit)["_run_exitfuncs"]
    try:
        shutdown()
        run_exit_functions()
    except BaseException:  # noqa: BLE001 -- whatever an exit function raises, the exit code stays
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
