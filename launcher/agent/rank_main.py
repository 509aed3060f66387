"""The main function of a rank that the agent started: prepares the process, then runs the same command as torchrun."""

from __future__ import annotations

import _thread
import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.process import parent_death
from launcher.process.collectives import enable_flight_recorder, keep_process_groups
from launcher.process.fork_safety import wait_before_forks
from launcher.process.interpreter_exit import exit_process, list_open_files
from launcher.process.kept_folder import KEPT_VARIABLE
from launcher.process.rank_status import FOLDER_VARIABLE, FORK_SERVER_DIED, RankStatusWriter, stacks_path
from launcher.process.rank_streams import open_rank_streams
from launcher.process.titles import claim_process, set_rank_title

# Makes a rank write its stacks. A real-time signal, because the user, NCCL or the scheduler may use USR1 and USR2.
STACKS_SIGNAL = signal.SIGRTMAX - 2
# Seconds until an interrupt is repeated that was raised where Python ignores exceptions.
_REPEAT_AFTER = 0.1


@dataclass(frozen=True, slots=True)
class RankCommand:
    """The command of every rank. `main` is a function of a module, because it is pickled by name."""

    main: Callable[[Sequence[str]], int]
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RankTask:
    """The arguments that the agent sends to a rank.

    Attributes:
        folder: the rank writes its reports into it.
        kept: the rank keeps there what the next attempt needs; None if there will be none.
    """

    command: RankCommand
    folder: str
    kept: str | None = None


def run_rank(task: RankTask) -> None:
    """Run one rank and exit with its exit code; never returns."""
    main, files = sys.modules.get("__main__"), list_open_files()
    _attach_to_agent()
    os.environ[FOLDER_VARIABLE] = task.folder
    os.environ[KEPT_VARIABLE] = task.kept or ""
    open_rank_streams(Path(task.folder), int(os.environ["RANK"]))
    set_rank_zero(os.environ)
    keep_process_groups()
    wait_before_forks()
    enable_flight_recorder()
    # Otherwise loader workers would use a new fork server in each rank and import all libraries in every epoch.
    multiprocessing.set_start_method(None, force=True)
    claim_process()
    set_rank_title(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    report = RankStatusWriter.from_env(os.environ)
    _prepare_stacks(Path(task.folder), report)
    _repeat_lost_interrupts()
    code = 1
    try:
        code = task.command.main(task.command.arguments)
    except SystemExit as error:
        # The user's code may call `sys.exit`.
        code = read_exit_code(error)
    except BaseException as error:  # noqa: BLE001 -- the outermost frame of the process: reports the error, then exits
        report.record_error(error)
        report.write_traceback(error)
    if code & 0xFF == FORK_SERVER_DIED:
        # Otherwise the agent takes it for the end of the fork server.
        report.update(exits=True)
    exit_process(code, main=main, before=files)


def read_exit_code(error: SystemExit) -> int:
    """The exit code of `sys.exit`; writes its message to stderr, as Python does."""
    if error.code is None or isinstance(error.code, int):
        return int(error.code or 0)
    sys.stderr.write(f"{error.code}\n")
    return 1


def _attach_to_agent() -> None:
    """End when the agent ends, and receive signals from the agent only, not from the terminal."""
    parent_death.die_with_creator(parent_death.fork_server_pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, parent_death.STOP_SIGNALS)
    with contextlib.suppress(PermissionError):  # the process already leads a session
        os.setpgid(0, parent_death.fork_server_pid or 0)
    # Otherwise the kernel stops a background process that changes the terminal's settings.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)


def set_rank_zero(env: Mapping[str, str]) -> None:
    """Set the rank in Lightning and torchmetrics: they read it on import, in the fork server, where it has no value."""
    for name, variable in (
        ("lightning_utilities.core.rank_zero", "RANK"),
        ("torchmetrics.utilities.prints", "LOCAL_RANK"),
    ):
        module = sys.modules.get(name)
        if module is not None:
            vars(module)["rank_zero_only"].rank = int(env[variable])


def _prepare_stacks(folder: Path, report: RankStatusWriter) -> None:
    # A fatal signal writes the stack into the rank's log.
    faulthandler.enable()
    with contextlib.suppress(OSError):
        # Stays open until the process ends: faulthandler writes to the descriptor.
        path = stacks_path(folder, int(os.environ["RANK"]))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        # Lightning restores this handler when its trainer ends; the default would kill the process.
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)
        faulthandler.register(STACKS_SIGNAL, descriptor, all_threads=True, chain=False)
        report.announce_stack_dumps()


def _repeat_lost_interrupts() -> None:
    """Repeat a Ctrl-C that was raised where Python ignores exceptions: in a finaliser, or around a fork.

    A rank that forks loader workers would train on to its end.
    """
    hook, own, main = sys.unraisablehook, os.getpid(), threading.main_thread().ident or 0

    def repeat() -> None:
        time.sleep(_REPEAT_AFTER)
        signal.pthread_kill(main, signal.SIGINT)

    def on_ignored(ignored: Any) -> None:
        if os.getpid() == own and issubclass(ignored.exc_type, KeyboardInterrupt):
            # Without `threading`, whose locks the main thread may hold here.
            _thread.start_new_thread(repeat, ())
        else:
            hook(ignored)

    sys.unraisablehook = on_ignored
