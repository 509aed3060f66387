"""`launcher validate`, `test` and `predict`: evaluate a checkpoint of an existing run."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from typing_extensions import override

from launcher.agreement.facts import RankFacts, agree_on
from launcher.agreement.process_group import GroupSettings, open_store, process_group
from launcher.checkpoint.export import save_private
from launcher.checkpoint.resume import read_checkpoint
from launcher.config.schema import RunConfig
from launcher.core.errors import UsageError
from launcher.core.events import FILE_NAME, EventLog
from launcher.core.output import RunOutput
from launcher.core.terminal import make_console
from launcher.core.wrapping import escape_controls
from launcher.loggers.selection import choose_loggers, list_own_loggers
from launcher.loggers.wandb_run import QueuedWandbLogger
from launcher.planning.plan import Plan, make_plan
from launcher.process.titles import set_rank_title
from launcher.runs.continuation import shorten
from launcher.runs.directory import RunDirectory
from launcher.training.callbacks.heartbeat import heartbeat_callbacks
from launcher.training.context import RunContext
from launcher.training.data.evaluation import share_evaluation_data
from launcher.training.data.undivided import notify_undivided_data
from launcher.training.decision import ask_rank_zero, gather_facts
from launcher.training.evaluated_run import find_evaluated_run
from launcher.training.failures import error_boundary, explain_error
from launcher.training.quiet_lightning import EVALUATION_WARNINGS, quiet_lightning
from launcher.training.resume.convert import loadable_checkpoint
from launcher.training.session import rank_session
from launcher.training.trainer import build_trainer
from launcher.training.wandb_session import wandb_session
from launcher.user_code.objects import UserObjects, make_user_objects

# The method that the LightningModule needs, and the loader of the data.
_STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
_LOADERS = {"validate": "val_dataloader", "test": "test_dataloader", "predict": "predict_dataloader"}


def evaluate(
    config: RunConfig,
    command: str,
    checkpoint: str,
    *,
    env: Mapping[str, str] | None = None,
    terminal_ranks: Collection[int] | None = (0,),
) -> Sequence[Mapping[str, float]]:
    """Evaluate as one rank; all other ranks call this too. Lightning prints the metrics.

    The evaluation uses DDP or one device, also if the run was trained with another strategy.

    Args:
        config: the run's.
        command: `validate`, `test` or `predict`.
        checkpoint: `best`, `last` or a path.
        env: defines which rank this is; `os.environ` if not given.
        terminal_ranks: ranks whose output goes to the terminal too; None means all.

    Returns:
        The metrics of each loader; empty for `predict`, which writes to the run's `predictions/rank-<r>.pt`.

    Raises:
        UsageError: there is no such run or checkpoint, or the ranks cannot evaluate it.
        TrainingError: the code of the model or the data raised an error.
    """
    # The training's strategy and batch do not apply to an evaluation.
    config = dataclasses.replace(config, strategy="auto", deepspeed_config=None, global_batch_size=None)

    def decide(all_facts: Sequence[RankFacts]) -> Mapping[str, Any]:
        plan = make_plan(config, agree_on(all_facts))
        run, notices = find_evaluated_run(config, checkpoint)
        plan = dataclasses.replace(plan, notices=(*notices, *plan.notices))
        return {"plan": plan.to_dict(), "run": run.to_dict()}

    with rank_session(config, os.environ if env is None else env, terminal_ranks) as session:
        topology = session.topology
        facts = gather_facts(config, topology, loader=_LOADERS[command])
        store = open_store(topology, config.agreement_timeout)
        decision = ask_rank_zero(config, topology, facts, store, decide)
        plan, run = Plan.from_dict(decision.values["plan"]), RunDirectory.from_dict(decision.values["run"])
        set_rank_title(topology.rank, topology.world_size, run.name)
        session.move_log(run.path / "logs" / f"{command}-rank-{topology.rank}.log")
        events = EventLog(run.path / FILE_NAME, topology.rank)
        output = RunOutput(events, make_console(), topology.rank == 0, records_notices=False)
        ctx = RunContext(config, topology, plan, run, store, decision.attempt, output, session.status)
        group = GroupSettings(plan.strategy.backend, ctx.attempt, config.process_group_timeout)
        with (
            process_group(store, topology, group),
            # The callbacks of the training are not needed here.
            quiet_lightning(*EVALUATION_WARNINGS, notice=output.notice if output.is_rank_zero else None),
            error_boundary(ctx, explain_error),
        ):
            return _evaluate(ctx, command)


def _evaluate(ctx: RunContext, command: str) -> Sequence[Mapping[str, float]]:
    """Create the objects and let Lightning evaluate."""
    checkpoint = ctx.run.resume_from
    assert checkpoint is not None  # noqa: S101 -- rank zero has chosen one
    for text in ctx.plan.notices:
        ctx.output.notice(text)
    pl.seed_everything(ctx.config.seed, workers=True, verbose=False)
    objects = make_user_objects(ctx.config, _micro_batch_size(ctx.run))
    _check_step(objects.model, command)
    _share_data(ctx, objects, command)
    # Predictions log nothing.
    has_wandb = command != "predict" and bool(ctx.run.wandb_id)
    with wandb_session(ctx, {}) if has_wandb else contextlib.nullcontext() as wandb_logger:
        trainer = _evaluation_trainer(ctx, objects, command, wandb_logger)
        _restore_counters(trainer, ctx, checkpoint)
        if ctx.topology.rank == 0:
            ctx.output.console.print(f"{command}: {checkpoint}", highlight=False, markup=False, soft_wrap=True)
        with loadable_checkpoint(ctx) as loadable:
            metrics = _run(trainer, command, objects, str(loadable))
    if ctx.topology.rank == 0:
        found = [dict(each) for each in metrics]
        _print_metrics(command, found, ctx.output.console)
        ctx.output.events.write("evaluated", command=command, checkpoint=str(checkpoint), metrics=found)
    return metrics


def _check_step(model: pl.LightningModule, command: str) -> None:
    step = _STEPS[command]
    if not is_overridden(step, model) and command != "predict":
        raise UsageError(f"{type(model).__name__} has no {step}, which `launcher {command}` needs; add it")


def _share_data(ctx: RunContext, objects: UserObjects, command: str) -> None:
    world_size = ctx.topology.world_size
    # With `use_distributed_sampler: false`, the user wants all ranks to read all samples of a loader.
    if world_size == 1 or not ctx.config.trainer.use_distributed_sampler:
        return
    owner = objects.model if objects.data is None else objects.data
    notify_undivided_data(owner, _LOADERS[command], world_size, ctx.output.notice)
    # Lightning distributes predictions well.
    if command != "predict":
        share_evaluation_data(owner, _LOADERS[command], world_size, ctx.topology.rank)


def _evaluation_trainer(
    ctx: RunContext, objects: UserObjects, command: str, wandb_logger: QueuedWandbLogger | None
) -> pl.Trainer:
    is_predict = command == "predict"
    own = objects.loggers if is_predict else list_own_loggers(ctx.config, objects.loggers, ctx.run)
    loggers = choose_loggers(own, wandb_logger, ctx.run, is_off=is_predict)
    callbacks = [*heartbeat_callbacks(ctx.status), *objects.callbacks]
    if is_predict and not any(isinstance(each, BasePredictionWriter) for each in objects.callbacks):
        callbacks.append(PredictionFiles(ctx.run.path / "predictions", ctx.output.console))
    return build_trainer(ctx, objects, callbacks, loggers)


def _restore_counters(trainer: pl.Trainer, ctx: RunContext, checkpoint: Path) -> None:
    """Set the Trainer's step, at which the metrics are logged, to the checkpoint's."""
    content = read_checkpoint(checkpoint, ctx.trust, outline=True)
    if "loops" in content:
        # Without the state of the loaders, which only a resume needs.
        trainer.fit_loop.load_state_dict({**content["loops"]["fit_loop"], "state_dict": {}})


def _run(trainer: pl.Trainer, command: str, objects: UserObjects, checkpoint: str) -> Sequence[Mapping[str, float]]:
    options: dict[str, Any] = {"datamodule": objects.data, "ckpt_path": checkpoint, "weights_only": True}
    if command == "predict":
        trainer.predict(objects.model, return_predictions=False, **options)
        return []
    # Lightning's table, which `verbose` prints, cuts long names.
    return (trainer.validate if command == "validate" else trainer.test)(objects.model, **options, verbose=False)


def _print_metrics(command: str, metrics: Sequence[Mapping[str, float]], console: Console) -> None:
    """One line for each metric of each loader."""
    values = {escape_controls(name): f"{value:.6g}" for each in metrics for name, value in each.items()}
    if not values:
        return
    title = f"{command.capitalize()} metric"
    longest = max(map(len, (title, *values)))
    for name, value in {title: "value", **values}.items():
        console.print(f"{name:{longest}}  {value}", highlight=False, markup=False, soft_wrap=True)


class PredictionFiles(BasePredictionWriter):
    """Writes a rank's predictions to a file of mode 0600, with the indices of the samples in each batch.

    Rank zero prints the files and the number of predictions of all ranks.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        super().__init__("epoch")
        self._folder, self._console = folder, console

    @override
    def write_on_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path = self._folder / f"rank-{trainer.global_rank}.pt"
        if trainer.is_global_zero:
            # Remove files of an earlier evaluation on more ranks.
            stale = (self._folder / f"rank-{rank}.pt" for rank in itertools.count(trainer.world_size))
            for file in itertools.takewhile(Path.exists, stale):
                file.unlink()
        save_private({"predictions": predictions, "batch_indices": batch_indices}, path)
        results = itertools.chain(*predictions) if trainer.predict_loop.num_dataloaders > 1 else predictions
        counts = torch.tensor(count_predictions(results), device=trainer.strategy.root_device)
        batches, samples, unknown = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if trainer.is_global_zero:
            text = describe_predictions(
                batches, None if unknown else samples, shorten(self._folder), trainer.world_size
            )
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def count_predictions(results: Iterable[Any]) -> tuple[int, int, int]:
    """From the result of each batch, the number of batches, of samples, and of batches whose samples are unknown."""
    sizes = [len(each) if isinstance(each, torch.Tensor) and each.ndim else None for each in results]
    return len(sizes), sum(size or 0 for size in sizes), sizes.count(None)


def describe_predictions(batches: int, samples: int | None, folder: str, world_size: int) -> str:
    """As in 'predictions: 16 samples in 4 batches: runs/it/predictions/rank-0.pt and rank-1.pt'."""
    count = f"{batches} batch{'' if batches == 1 else 'es'}"
    if samples is not None:
        count = f"{samples} sample{'' if samples == 1 else 's'} in {count}"
    more = "" if world_size == 1 else f" {'and' if world_size == 2 else 'to'} rank-{world_size - 1}.pt"
    return f"predictions: {count}: {folder}/rank-0.pt{more}"


def _micro_batch_size(run: RunDirectory) -> int | None:
    """The planned micro batch size if the training's config fixed the global batch, otherwise None."""
    try:
        return json.loads((run.path / "plan.json").read_text(encoding="utf-8"))["batch"]["micro_batch_size"]
    except (OSError, ValueError, KeyError):
        return None
