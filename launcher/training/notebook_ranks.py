"""The ranks of a training that a notebook starts: forks of its kernel, which itself stays free of CUDA and groups.

As with Lightning's `ddp_notebook`, what is defined in cells is there in every rank, and weights and metrics come back.
"""

from __future__ import annotations

import builtins
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.agent.diagnostics import RankEvidence
from launcher.agent.failure import RankEnd, describe, first_failure
from launcher.agent.worker import set_rank_zero
from launcher.agent.workers import Attempt, ask_for_stacks
from launcher.config.schema import RunConfig
from launcher.core.errors import Interrupted, LauncherError, TrainingError, UsageError
from launcher.planning.plan import Plan
from launcher.process import parent_death
from launcher.process.rank_status import FOLDER_VARIABLE
from launcher.process.script_ranks import free_port, rank_variables
from launcher.runs.directory import LAST_CHECKPOINT
from launcher.training.fit import FitResult, fit
from strategies.deepspeed_config import VARIANTS

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from launcher.user_code.objects import UserObjects

_RESULT = "result.pt"
# Seconds that the other ranks have to end by themselves after one has failed, and after SIGTERM.
_GRACE = 10.0
# The same to save a checkpoint after the cell was interrupted.
_GRACE_TO_SAVE = 120.0


def fit_in_forks(config: RunConfig, given: UserObjects, count: int) -> FitResult:
    """Train on `count` forks of this process.

    Args:
        config: what to train.
        given: the objects; the model gets the trained weights.
        count: ranks.

    Returns:
        What came of it on rank zero, with a Trainer for this process; see `_trainer_here`.

    Raises:
        UsageError: the ranks refused, all for one reason.
        TrainingError: has the traceback of the rank that failed first.
        Interrupted: the cell was interrupted; says what was saved.
    """
    with tempfile.TemporaryDirectory(prefix="launcher-notebook-") as name:
        folder = Path(name)
        port = free_port()
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_be_rank, args=(config, given, rank, count, port, folder), name=f"rank-{rank}")
            for rank in range(count)
        ]
        attempt = Attempt(range(count), processes, RankEvidence(folder, ask_for_stacks))
        with _ended(attempt, processes):
            for process in processes:
                process.start()
            _wait(attempt)
        _raise_failure(attempt)
        return _result(folder / _RESULT, config, given, count)


@contextlib.contextmanager
def _ended(attempt: Attempt, processes: list[Any]) -> Iterator[None]:
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


def _wait(attempt: Attempt) -> None:
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


def _raise_failure(attempt: Attempt) -> None:
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


def _be_rank(config: RunConfig, given: UserObjects, rank: int, count: int, port: int, folder: Path) -> None:
    """Train as one rank. `multiprocessing` ends the fork without the exit functions of the kernel."""
    parent_death.die_with_parent()
    os.environ.update({**rank_variables(rank, count, port), FOLDER_VARIABLE: str(folder)})
    _one_thread()
    _leave_notebook()
    set_rank_zero(os.environ)
    code = 1
    try:
        result = fit(config, given=given, stays_open=False)
        if rank == 0:
            _save(result, given, folder / _RESULT)
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


def _save(result: FitResult, given: UserObjects, path: Path) -> None:
    import torch

    trainer: pl.Trainer = result.trainer
    loops = trainer.fit_loop.state_dict()
    # Where the loaders were is for a resume.
    loops["state_dict"] = {}
    values = {
        "run": result.run,
        "plan": result.plan.to_dict(),
        "metrics": dict(result.metrics),
        "steps": result.steps,
        "checkpoint": result.checkpoint,
        "best": result.best,
        "callback_metrics": {name: value.cpu() for name, value in trainer.callback_metrics.items()},
        "loops": loops,
        # ZeRO leaves pieces in the module; the checkpoint has them all.
        "weights": None if result.plan.strategy.name in VARIANTS else given.model.state_dict(),
    }
    torch.save(values, path)


def _result(path: Path, config: RunConfig, given: UserObjects, count: int) -> FitResult:
    """What rank zero has saved, and its weights in the module of this process."""
    import torch

    # Written a moment ago by a fork of this process, in a private folder: objects in it are this process's own.
    values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    weights = values["weights"]
    if weights is None and values["checkpoint"] is not None:
        from launcher.checkpoint.deepspeed import read_whole

        weights = read_whole(values["checkpoint"])["state_dict"]
    if weights is not None:
        # As Lightning does: a rank may have added layers or removed some.
        given.model.load_state_dict(weights, strict=False)
    plan = Plan.from_dict(values["plan"])
    trainer = _trainer_here(config, plan, given, count, values)
    return FitResult(
        values["run"], plan, values["metrics"], values["steps"], values["checkpoint"], values["best"], trainer
    )


def _trainer_here(
    config: RunConfig, plan: Plan, given: UserObjects, count: int, values: Mapping[str, Any]
) -> pl.Trainer:
    """A Trainer for the kernel that stands where rank zero's stood; what it does next it does by `ddp_notebook`."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from launcher.training.trainer import plain_options
    from strategies.build import precision_plugin
    from strategies.precision import Precision

    plugin: Any = given.precision_plugin or precision_plugin(Precision(plan.precision), plan.device_kind)
    precision: dict[str, Any] = {"precision": plan.precision} if plugin is None else {"plugins": [plugin]}
    callbacks = list(given.callbacks)
    if config.trainer.enable_checkpointing is not False and not config.trainer.barebones:
        keeper = ModelCheckpoint(dirpath=values["run"] / "checkpoints", enable_version_counter=False)
        keeper.best_model_path = "" if values["best"] is None else str(values["best"])
        callbacks.append(keeper)
    precision: dict[str, Any] = {"precision": plan.precision} if plugin is None else {"plugins": [plugin]}
    trainer = pl.Trainer(
        **plain_options(config),
        **precision,
        accelerator="gpu" if plan.device_kind == "cuda" else plan.device_kind,
        devices=count,
        strategy="ddp_notebook",
        callbacks=callbacks,
        logger=list(given.loggers) or False,
        default_root_dir=str(values["run"]),
        enable_model_summary=False,
        enable_progress_bar=config.trainer.enable_progress_bar,
    )
    trainer.strategy.connect(given.model)
    trainer.fit_loop.load_state_dict(values["loops"])
    trainer.callback_metrics.update(values["callback_metrics"])
    return trainer
