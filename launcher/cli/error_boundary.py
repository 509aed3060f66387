"""The one place where errors become text and exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from launcher.cli.commands import Command
from launcher.core.errors import Interrupted, LauncherError, StorageError, TopologyError, TrainingError
from launcher.core.wrapping import print_message
from launcher.process.ctrl_c import CtrlC
from launcher.process.rank_status import RankStatusWriter


def run_with_error_boundary(command: Command, run: Callable[[], int], *, debug: bool) -> int:
    """Call `run`; report an error on stderr, and to the agent of this rank if there is one; returns the exit code.

    With `debug`, usage errors are shown with their traceback.
    """
    with CtrlC() as ctrl_c:
        try:
            return _run(command, run, ctrl_c, debug=debug)
        except KeyboardInterrupt:
            return _report_interrupt(command)
        except Exception:  # raised on, unless Ctrl-C has caused it
            # Code that is interrupted may raise any error, such as an import that cannot be repeated.
            if ctrl_c.is_pressed:
                return _report_interrupt(command)
            raise


def _run(command: Command, run: Callable[[], int], ctrl_c: CtrlC, *, debug: bool) -> int:
    try:
        return run()
    except Interrupted as error:
        status = RankStatusWriter.from_env(os.environ)
        status.record_error(error)
        # With an agent, the agent prints it once for all ranks.
        if not status.has_agent and os.environ.get("RANK", "0") == "0":
            from launcher.runs.continuation import Stop, describe_stop

            print_message(describe_stop(Stop.of(error)))
        return error.exit_code
    except EOFError:
        if command.runs_on_ranks:
            raise
        # Ctrl-D at a prompt.
        return _report_interrupt(command)
    except BrokenPipeError:
        if command.runs_on_ranks:
            raise
        # The reader has closed the pipe, as in `launcher logs RUN | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except LauncherError as error:
        if ctrl_c.is_pressed:
            raise
        # The traceback of a training's error is in the rank's log, and rank zero's is on the terminal.
        if debug and not isinstance(error, TrainingError):
            traceback.print_exc()
        if not command.runs_on_ranks or _is_reporter(error):
            print_message(f"error: {error}")
            if isinstance(error, StorageError) and error.run is not None:
                _print_command(Path(error.run))
        if command.runs_on_ranks:
            _report_to_agent(error)
        return error.exit_code


def _report_interrupt(command: Command) -> int:
    status = RankStatusWriter.from_env(os.environ)
    if command.runs_on_ranks and (status.has_agent or os.environ.get("RANK", "0") != "0"):
        return 128 + signal.SIGINT
    if command.on_interrupt:
        print_message(command.on_interrupt)
    elif command.runs_on_ranks:
        from launcher.runs.continuation import Stop, describe_stop

        print_message(describe_stop(Stop(signal.SIGINT)))
    return 128 + signal.SIGINT


def _print_command(run: Path) -> None:
    """Print the command that continues the run, on a line of its own."""
    from launcher.runs.continuation import describe_command

    command = describe_command(run)
    if command is not None:
        print_message(command)


def _is_reporter(error: LauncherError) -> bool:
    """Whether this rank prints the error: an agent prints it for all ranks, otherwise rank zero does."""
    if RankStatusWriter.from_env(os.environ).has_agent:
        return False
    is_of_one_rank = isinstance(error, TrainingError | TopologyError)
    return is_of_one_rank or os.environ.get("RANK", "0") == "0"


def _report_to_agent(error: LauncherError) -> None:
    """Report the error to the launcher's agent, or to torchrun's, which otherwise know only the exit code."""
    status = RankStatusWriter.from_env(os.environ)
    status.record_error(error)
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not status.has_agent and name:
        _report_to_torchrun(error, Path(name))


def _report_to_torchrun(error: LauncherError, file: Path) -> None:
    """Write the error as torch does, but atomically: torchrun ends if it reads a part of it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(temporary)
    try:
        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)
        # It may not exist: torch ignores that it cannot be written.
        with contextlib.suppress(FileNotFoundError):
            temporary.replace(file)
    finally:
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(file)
