"""The one place where errors become text and exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable

from launcher.cli.commands import Command
from launcher.core.errors import Interrupted, LauncherError, TopologyError, TrainingError
from launcher.core.wrapping import wrap_for
from launcher.process.rank_status import RankStatusWriter


def run_with_error_boundary(command: Command, run: Callable[[], int], *, debug: bool) -> int:
    """Call `run`; report an error on stderr, and to the agent of this rank if there is one; returns the exit code.

    With `debug`, usage errors are shown with their traceback.
    """
    try:
        return run()
    except Interrupted as error:
        RankStatusWriter.from_env(os.environ).record_error(error)
        print_line(f"stopped after step {error.step}; saved {error.checkpoint}" if error.checkpoint else str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return _report_interrupt(command)
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
        # The traceback of a training's error is in the rank's log, and rank zero's is on the terminal.
        if debug and not isinstance(error, TrainingError):
            traceback.print_exc()
        if not command.runs_on_ranks or _is_reporter(error):
            print_line(f"error: {error}")
        if command.runs_on_ranks:
            _report_to_agent(error)
        return error.exit_code


def _report_interrupt(command: Command) -> int:
    if command.on_interrupt:
        print_line(command.on_interrupt)
    return 128 + signal.SIGINT


def print_line(text: str) -> None:
    """Print a message to stderr, wrapped on a terminal; a closed terminal does not change the exit code."""
    with contextlib.suppress(OSError):
        sys.stderr.write(wrap_for(sys.stderr, text) + "\n")
        sys.stderr.flush()


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
    if not status.has_agent and os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)
