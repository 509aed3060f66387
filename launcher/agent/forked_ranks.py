"""Ranks as forks of this process, for a notebook: the kernel itself stays free of CUDA and process groups.

As with Lightning's `ddp_notebook`, what is defined in cells is there in every rank.
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

from launcher.agent.diagnostics import RankEvidence
from launcher.agent.failure import RankEnd, describe, first_failure
from launcher.agent.worker import set_rank_zero
from launcher.agent.workers import AttemptProcesses, ask_for_stacks
from launcher.agreement.script_ranks import free_port, rank_variables
from launcher.core.errors import Interrupted, LauncherError, TrainingError, UsageError
from launcher.process import parent_death
from launcher.process.rank_status import FOLDER_VARIABLE
from launcher.runs.selection import LAST_CHECKPOINT

# Seconds that the other ranks have to end by themselves after one has failed, and after SIGTERM.
_GRACE = 10.0
# The same to save a checkpoint after the cell was interrupted.
_GRACE_TO_SAVE = 120.0


def run_in_forks(train: Callable[[int], None], count: int, folder: Path) -> None:
    """Run `train` with each rank's number in forks of this process, and wait for all.

    Args:
        train: trains as one rank, whose variables are in the environment.
        count: ranks.
        folder: private and empty; the ranks report their state there.

    Raises:
        UsageError: the ranks refused, all for one reason.
        TrainingError: has the traceback of the rank that failed first.
        Interrupted: the cell was interrupted; says what was saved.
    """
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_be_rank, args=(train, rank, count, port, folder), name=f"rank-{rank}")
        for rank in range(count)
    ]
    attempt = AttemptProcesses(range(count), processes, RankEvidence(folder, ask_for_stacks))
    with _ended(attempt, processes):
        for process in processes:
            process.start()
        _wait(attempt)
    _raise_failure(attempt)


@contextlib.contextmanager
def _ended(attempt: AttemptProcesses, processes: list[Any]) -> Iterator[None]:
    """None of the processes is left, whatever happens; an interrupted cell has them save first."""
    started = list(processes)
    try:
        yield
    except KeyboardInterrupt:
        attempt.send(signal.SIGTERM)
        attempt.await_end(_GRACE_TO_SAVE)
    finally:
        for process in started:
            if process.pid is not None:
                process.kill()
                process.join()


def _wait(attempt: AttemptProcesses) -> None:
    """Wait for all; once one has failed the others may be in a collective that it never joins."""
    while True:
        ranks = attempt.ranks().values()
        if any(process.exit_code for process in ranks):
            attempt.await_cause(_GRACE)
            attempt.await_end(_GRACE)
            attempt.send(signal.SIGTERM)
            attempt.await_end(_GRACE)
            return
        if all(process.exit_code == 0 for process in ranks):
            return
        attempt.await_one(1.0)


def _raise_failure(attempt: AttemptProcesses) -> None:
    ends = attempt.evidence.ends(attempt.ranks(), {})
    first = first_failure(ends)
    if first is None:
        return
    error = first.error
    if error is not None and error.interrupted:
        run = attempt.evidence.run_directory(attempt.ranks())
        saved = None if run is None else run / "checkpoints" / LAST_CHECKPOINT
        checkpoint = str(saved) if saved is not None and saved.exists() else None
        raise Interrupted(signal.SIGINT, checkpoint=checkpoint, step=error.step).for_script()
    if error is not None and error.explained:
        raise UsageError(error.message) if error.repeats else TrainingError(error.message)
    raise TrainingError(_account(first), rank=first.rank)


def _account(first: RankEnd) -> str:
    """How the rank ended, with its own traceback or its last lines."""
    told = first.last_lines if first.error is None else first.error.traceback
    return "\n".join([f"rank {first.rank} ({first.host}): {describe(first)}", *told])


def _be_rank(train: Callable[[int], None], rank: int, count: int, port: int, folder: Path) -> None:
    """Train as one rank. `multiprocessing` ends the fork without the exit functions of the kernel."""
    parent_death.die_with_parent()
    os.environ.update({**rank_variables(rank, count, port), FOLDER_VARIABLE: str(folder)})
    _one_thread()
    _leave_notebook()
    set_rank_zero(os.environ)
    code = 1
    try:
        train(rank)
        code = 0
    except (LauncherError, Interrupted) as error:
        # `fit` has reported it already.
        code = error.exit_code
    # What `multiprocessing` would print of another error is in the report.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _leave_notebook() -> None:
    """Let the libraries know that a rank is no prompt: a fork cannot display in the notebook, only print."""
    from lightning.pytorch.trainer.connectors import accelerator_connector

    if hasattr(builtins, "get_ipython"):
        delattr(builtins, "get_ipython")
    setattr(accelerator_connector, "_IS_INTERACTIVE", False)  # noqa: B010 -- not for type checkers


def _one_thread() -> None:
    """GNU OpenMP's threads are not forked, and a fork that wants several waits for them for ever."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
