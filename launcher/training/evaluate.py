"""`launcher validate`, `test` and `predict`: evaluate a checkpoint of a run that is there already."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from launcher.agreement.facts import RankFacts, agree_on
from launcher.agreement.process_group import GroupSettings, open_store, process_group
from launcher.checkpoint.resume import read_checkpoint
from launcher.config.schema import RunConfig
from launcher.core.errors import LauncherError, TrainingError, UsageError
from launcher.core.events import FILE_NAME, EventLog
from launcher.core.output import RunOutput
from launcher.core.secrets import find_secrets, scrub
from launcher.core.terminal import make_console
from launcher.hardware.topology import Topology
from launcher.loggers.selection import make_wandb_logger, own_loggers, run_loggers
from launcher.loggers.wandb_run import QueuedWandbLogger, finish_wandb
from launcher.planning.plan import Plan, make_plan
from launcher.process.rank_log import RankLog
from launcher.process.rank_status import RankStatusWriter
from launcher.runs.directory import RunDirectory
from launcher.training.context import RunContext
from launcher.training.convert import loadable_checkpoint, save_private
from launcher.training.evaluated_run import find_evaluated_run
from launcher.training.evaluation_data import share_evaluation_data
from launcher.training.fit import ask_rank_zero, attach_log, gather_facts
from launcher.training.heartbeat_callback import heartbeat_callbacks
from launcher.training.quiet_lightning import quiet_lightning
from launcher.training.trainer import build_trainer
from launcher.user_code.objects import UserObjects, make_user_objects

# The step that a LightningModule needs, and the loaders that may be divided; predictions Lightning divides well itself.
_STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
_LOADERS = {"validate": "val_dataloader", "test": "test_dataloader"}


def evaluate(
    config: RunConfig,
    command: str,
    checkpoint: str,
    *,
    env: Mapping[str, str] | None = None,
    terminal_ranks: Collection[int] | None = (0,),
) -> Sequence[Mapping[str, float]]:
    """Evaluate as one rank; the other ranks, if there are any, do the same. Lightning prints the metrics.

    Whatever the run was trained with, the evaluation has the whole module on every rank: DDP, or one device.

    Args:
        config: the run's.
        command: `validate`, `test` or `predict`.
        checkpoint: `best`, `last` or a path.
        env: says which rank this is; `os.environ` if not given.
        terminal_ranks: the ranks whose output goes to the terminal too; None means all.

    Returns:
        The metrics of each loader; nothing for `predict`, which writes to the run's `predictions/rank-<r>.pt`.

    Raises:
        UsageError: there is no such run or checkpoint, or the ranks cannot do it.
        TrainingError: the model's or the data's own code raised.
    """
    env = os.environ if env is None else env
    topology = Topology.from_env(env, socket.gethostname())
    report = RankStatusWriter.from_env(env)
    secrets = tuple(find_secrets(config.to_dict()).values())
    report.hide_values(secrets)
    log = RankLog(Path(config.runs_dir).absolute(), topology.rank, terminal_ranks)
    try:
        attach_log(log)
        report.update(log=log.path)
        # Strategy and batches of the training are not the evaluation's.
        asked = dataclasses.replace(config, strategy="auto", deepspeed_config=None, global_batch_size=None)
        facts = gather_facts(asked, topology)
        store = open_store(topology, config.agreement_timeout)

        def decide(everybody: Sequence[RankFacts]) -> Mapping[str, Any]:
            plan = make_plan(asked, agree_on(everybody))
            run, notices = find_evaluated_run(config, checkpoint)
            plan = dataclasses.replace(plan, notices=(*notices, *plan.notices))
            return {"plan": plan.to_dict(), "run": run.to_dict()}

        decision = ask_rank_zero(asked, topology, facts, store, decide)
        plan, run = Plan.from_dict(decision.values["plan"]), RunDirectory.from_dict(decision.values["run"])
        log.move_to(run.path / "logs" / f"{command}-rank-{topology.rank}.log")
        report.update(log=log.path)
        events = EventLog(run.path / FILE_NAME, topology.rank)
        output = RunOutput(events, make_console(), topology.rank == 0, records_notices=False)
        ctx = RunContext(asked, topology, plan, run, store, decision.attempt, output, report)
        group = GroupSettings(plan.strategy.backend, decision.attempt, config.process_group_timeout)
        with (
            process_group(store, topology, group),
            # The callbacks of a training have nothing to do here.
            quiet_lightning(".*callbacks used to create the checkpoint need to be provided.*"),
        ):
            return _evaluate(ctx, command)
    except LauncherError as error:
        report.record_error(error)
        raise
    except Exception as error:
        # The user's code may raise anything; it is told with this rank's name and handed on whole.
        report.record_error(error)
        report.write_traceback(error)
        text = scrub(f"{type(error).__name__}: {error}", secrets)
        raise TrainingError(f"rank {topology.rank} ({topology.host}): {text}", rank=topology.rank) from error
    finally:
        log.detach()
        log.discard_pending()


def _evaluate(ctx: RunContext, command: str) -> Sequence[Mapping[str, float]]:
    """Make the objects and let Lightning evaluate."""
    config, topology, plan, run = ctx.config, ctx.topology, ctx.plan, ctx.run
    console, notice, checkpoint = ctx.output.console, ctx.output.notice, run.resume_from
    assert checkpoint is not None  # noqa: S101 -- rank zero has chosen one

    for text in plan.notices:
        notice(text)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    objects = make_user_objects(config, _micro_batch_size(run))
    step = _STEPS[command]
    if not is_overridden(step, objects.model) and command != "predict":
        raise UsageError(f"{type(objects.model).__name__} has no {step}, which `launcher {command}` needs; add it")
    owner = objects.model if objects.data is None else objects.data
    if command in _LOADERS and topology.world_size > 1 and config.trainer.use_distributed_sampler:
        share_evaluation_data(owner, _LOADERS[command], topology.world_size, topology.rank)
    ours = None if command == "predict" else _wandb(config, run, notice)
    own = objects.loggers if command == "predict" else own_loggers(config, objects.loggers, run)
    loggers: list[Logger] = run_loggers(own, ours, run, is_off=command == "predict")
    callbacks = [*objects.callbacks, *heartbeat_callbacks(ctx.status), *_writers(command, objects, run)]
    trainer = build_trainer(ctx, objects, callbacks, loggers)
    content = read_checkpoint(checkpoint, ctx.trust, outline=True)
    if "loops" in content:
        # The metrics belong to the step of the checkpoint; where the loaders were is for a resume.
        trainer.fit_loop.load_state_dict({**content["loops"]["fit_loop"], "state_dict": {}})
    if topology.rank == 0:
        console.print(f"{command}: {checkpoint}", highlight=False, markup=False, soft_wrap=True)
    code = 1
    try:
        with loadable_checkpoint(checkpoint, plan, run, topology.rank, notice, ctx.trust) as loadable:
            found = _run(trainer, command, objects, str(loadable))
        code = 0
    finally:
        if ours is not None:
            finish_wandb(ours, code, notice)
    if topology.rank == 0:
        ctx.output.events.write(
            "evaluated", command=command, checkpoint=str(checkpoint), metrics=[dict(each) for each in found]
        )
    return found


def _run(trainer: pl.Trainer, command: str, objects: UserObjects, checkpoint: str) -> Sequence[Mapping[str, float]]:
    options: dict[str, Any] = {"datamodule": objects.data, "ckpt_path": checkpoint, "weights_only": True}
    if command == "predict":
        trainer.predict(objects.model, return_predictions=False, **options)
        return []
    return (
        trainer.validate(objects.model, **options) if command == "validate" else trainer.test(objects.model, **options)
    )


class PredictionFiles(BasePredictionWriter):
    """Writes a rank's predictions to a file of mode 0600, with the numbers of the samples in each batch.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("epoch")
        self._folder = folder

    @override
    def write_on_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path = self._folder / f"rank-{trainer.global_rank}.pt"
        if trainer.is_global_zero:
            # Of an earlier evaluation on more ranks.
            for rank in itertools.count(trainer.world_size):
                stale = self._folder / f"rank-{rank}.pt"
                if not stale.exists():
                    break
                stale.unlink()
        save_private({"predictions": predictions, "batch_indices": batch_indices}, path)


def _writers(command: str, objects: UserObjects, run: RunDirectory) -> list[pl.Callback]:
    """Ours, unless the user has one."""
    if command != "predict" or any(isinstance(callback, BasePredictionWriter) for callback in objects.callbacks):
        return []
    return [PredictionFiles(run.path / "predictions")]


def _wandb(config: RunConfig, run: RunDirectory, notice: Callable[[str], None]) -> QueuedWandbLogger | None:
    """The run's own W&B run goes on, if it has one."""
    return make_wandb_logger(config.wandb, run, {}, notice) if run.wandb_id else None


def _micro_batch_size(run: RunDirectory) -> int | None:
    """What a rank of the training took at once where the config fixed the global batch; None for what the data has."""
    try:
        return json.loads((run.path / "plan.json").read_text(encoding="utf-8"))["batch"]["micro_batch_size"]
    except (OSError, ValueError, KeyError):
        return None
