"""Ranks of a notebook: forks of the kernel process, which itself initialises neither CUDA nor a process group.

As with Lightning's `ddp_notebook`, every rank has the objects that the cells define.
"""

from __future__ import annotations

import builtins
import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.agent.failure_report import describe_failure, find_first_failure
from launcher.agent.rank_inspector import RankInspector
from launcher.agent.rank_main import set_rank_zero
from launcher.agent.rank_processes import AttemptProcesses
from launcher.agreement.script_ranks import find_free_port, make_rank_variables
from launcher.core.errors import Interrupted, LauncherError, TrainingError, UsageError
from launcher.process import parent_death
from launcher.process.fork_safety import wait_before_forks
from launcher.process.interpreter_exit import close_files, list_open_files
from launcher.process.rank_status import FOLDER_VARIABLE
from launcher.process.titles import claim_process, set_rank_title
from launcher.runs.selection import LAST_CHECKPOINT

# Seconds that the other ranks have to end after one has failed, and after SIGTERM.
_EXIT_TIMEOUT = 10.0
# Seconds to save a checkpoint after the cell was interrupted.
_SAVE_TIMEOUT = 120.0


def run_in_forks(train: Callable[[int], None], count: int, folder: Path) -> None:
    """Run `train(rank)` in one fork of this process for each rank, and wait for all of them.

    The environment of a fork has the rank's variables. `folder` is private and empty; it receives the ranks' reports.

    Raises:
        UsageError: a usage error that is the same on all ranks.
        TrainingError: a rank failed; has the traceback of the first.
        Interrupted: the cell was interrupted; has the saved checkpoint.
    """
    port = find_free_port()
    wait_before_forks()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_run_rank, args=(train, rank, count, port, folder), name=f"rank-{rank}")
        for rank in range(count)
    ]
    attempt = AttemptProcesses(range(count), processes, RankInspector(folder))
    with _end_processes(attempt, processes):
        for process in processes:
            process.start()
        _wait(attempt)
    _raise_failure(attempt)


@contextlib.contextmanager
def _end_processes(attempt: AttemptProcesses, processes: list[Any]) -> Iterator[None]:
    """End all processes at the end of the context; an interrupted cell lets them save first."""
    try:
        yield
    except KeyboardInterrupt:
        attempt.send(signal.SIGTERM)
        attempt.wait_for_all(_SAVE_TIMEOUT)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _wait(attempt: AttemptProcesses) -> None:
    """Wait for all ranks; end the others after a failure, because they may wait for the failed rank in a collective."""
    while True:
        ranks = attempt.ranks().values()
        if any(process.exit_code for process in ranks):
            attempt.wait_for_cause(_EXIT_TIMEOUT)
            attempt.wait_for_all(_EXIT_TIMEOUT)
            attempt.send(signal.SIGTERM)
            attempt.wait_for_all(_EXIT_TIMEOUT)
            return
        if all(process.exit_code == 0 for process in ranks):
            return
        attempt.wait_for_next_exit(1.0)


def _raise_failure(attempt: AttemptProcesses) -> None:
    outcomes = attempt.inspector.collect_outcomes(attempt.ranks(), {})
    first = find_first_failure(outcomes)
    if first is None:
        return
    error = first.error
    if error is not None and error.interrupted:
        run = attempt.inspector.find_run_directory(attempt.ranks())
        saved = None if run is None else run / "checkpoints" / LAST_CHECKPOINT
        checkpoint = str(saved) if saved is not None and saved.exists() else None
        raise Interrupted(signal.SIGINT, checkpoint=checkpoint, step=error.step).for_script()
    if error is not None and error.explained:
        is_before_training = error.repeats and error.step <= 0
        raise UsageError(error.message) if is_before_training else TrainingError(error.message)
    report = describe_failure(first, outcomes)
    raise TrainingError(report, rank=first.rank, report=report)


def _run_rank(train: Callable[[int], None], rank: int, count: int, port: int, folder: Path) -> None:
    files = list_open_files()
    parent_death.die_with_creator()
    claim_process()
    set_rank_title(rank, count)
    os.environ.update({**make_rank_variables(rank, count, port), FOLDER_VARIABLE: str(folder)})
    _use_one_thread()
    _detach_from_notebook()
    set_rank_zero(os.environ)
    code = 1
    try:
        train(rank)
        code = 0
    except (LauncherError, Interrupted) as error:
        # `fit` has reported it already.
        code = error.exit_code
    # The exit functions are the notebook's.
    close_files(files)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _detach_from_notebook() -> None:
    """Make libraries print instead of displaying in the notebook, which a fork cannot do."""
    from lightning.pytorch.trainer.connectors import accelerator_connector

    if hasattr(builtins, "get_ipython"):
        delattr(builtins, "get_ipython")
    setattr(accelerator_connector, "_IS_INTERACTIVE", False)  # noqa: B010 -- private name


def _use_one_thread() -> None:
    """A fork has none of GNU OpenMP's threads, and with several threads it would wait for them without end."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
