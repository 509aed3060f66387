"""The last step of the main path: Lightning trains what the plan says."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from rich.console import Console
from torch.distributed import PrefixStore

from launcher.buffer_watch import WatchBuffers
from launcher.config import RunConfig
from launcher.convert import loadable_checkpoint
from launcher.data_order import order_training_data
from launcher.deepspeed_ready import check_model
from launcher.errors import Interrupted, LauncherError, PlanError, TrainingError
from launcher.events import EventLog
from launcher.measured_memory import MeasuredMemory, TellMemory
from launcher.memory_record import Exhausted, remember
from launcher.missed_validation import MakeUpForValidation
from launcher.out_of_memory import device_peak, is_out_of_memory, out_of_memory
from launcher.plan import Plan
from launcher.plateau_steps import StepPlateaus
from launcher.random_states import RandomStates
from launcher.rank_report import RankReport
from launcher.rank_watch import WatchRanks
from launcher.resume import check_fits_model, loader_states, read_checkpoint, scaler_problem
from launcher.run_callbacks import EventWriter, KeepLast, KeepStepBorders, RecordPlan, StopTogether, as_numbers
from launcher.run_directory import LAST_CHECKPOINT, RunDirectory, last_checkpoint, write_plan
from launcher.signs_of_life import signs_of_life
from launcher.stop import SignalListener, StopAgreement
from launcher.topology import Topology
from launcher.trainer import build_trainer
from launcher.user_objects import UserObjects, make_user_objects
from launcher.wandb_config import build_wandb_config
from launcher.wandb_run import QueuedWandbLogger, describe_run, finish_wandb, start_wandb
from strategies.choice import AUTO, StrategyError

if TYPE_CHECKING:
    from launcher.main_path import FitResult


def train(
    config: RunConfig,
    topology: Topology,
    plan: Plan,
    run: RunDirectory,
    store: Any,
    attempt: str,
    events: EventLog,
    console: Console,
    report: RankReport,
    given: UserObjects | None = None,
) -> FitResult:
    """Make the model, the data and the Trainer, and fit.

    Raises:
        TrainingError, Interrupted, DataError, ResumeError: see `launcher.main_path.fit`.
    """

    def notice(message: str) -> None:
        if topology.rank == 0:
            events.write("notice", message=message)
            console.print(f"notice: {message}", style="yellow", highlight=False, markup=False)

    stop = StopAgreement(PrefixStore(f"launcher/{attempt}", store), topology.rank, topology.world_size)
    # Signals are taken until W&B has ended: torchrun ends the other ranks as soon as the first has left.
    taken = SignalListener(stop, lambda number: _say_stopping(number, topology), has_agent=report.has_agent)
    with taken as listener:
        wandb_logger = None
        if topology.rank == 0:
            values = {"config": config.to_dict(), "plan": plan.to_dict()}
            wandb_logger = start_wandb(config.wandb, run, values, notice)
        exit_code = 1
        try:
            trainer = _fit(
                config, topology, plan, run, stop, listener, wandb_logger, events, console, notice, report, given
            )
            exit_code = 0
        except Interrupted as interruption:
            exit_code = interruption.exit_code
            events.write("interrupted", signal=interruption.signal_number, step=interruption.step,
                         checkpoint=interruption.checkpoint)  # fmt: skip
            raise
        except LauncherError as error:
            exit_code = error.exit_code
            events.write("failed", host=topology.host, error=str(error))
            raise
        except StrategyError as error:
            # What only the optimizer could show, which Lightning makes late.
            exit_code = PlanError.exit_code
            events.write("failed", host=topology.host, error=str(error))
            raise PlanError(str(error)) from error
        except Exception as error:
            if is_out_of_memory(error):
                told = out_of_memory(error, plan, rank=topology.rank, host=topology.host,
                                     allocated_bytes=device_peak(plan.device_kind), on_oom=config.on_oom)  # fmt: skip
                events.write("out_of_memory", host=topology.host, strategy=plan.strategy.name, next=told.next_strategy,
                             expected_bytes=told.expected_bytes, allocated_bytes=told.allocated_bytes,
                             go_on=told.go_on)  # fmt: skip
                remember(run.path, Exhausted.of(config.to_dict(), plan.to_dict()))
                report.trace(error)
                raise told from error
            # The user's code may raise anything; it is told with this rank's name and handed on whole.
            events.write("failed", host=topology.host, error=f"{type(error).__name__}: {error}")
            report.raised(error)
            # Now, not later: W&B may take its time to end, and the others of this run may end this rank before.
            report.trace(error)
            raise TrainingError(f"rank {topology.rank} ({topology.host}): {type(error).__name__}: {error}") from error
        finally:
            stop.close()
            if wandb_logger is not None:
                finish_wandb(wandb_logger, exit_code, notice)
    result = _result(trainer, plan, run)
    if topology.rank == 0:
        events.write("finished", step=result.steps, metrics=dict(result.metrics), checkpoint=result.checkpoint)
    return result


def _fit(
    config: RunConfig,
    topology: Topology,
    plan: Plan,
    run: RunDirectory,
    stop: StopAgreement,
    listener: SignalListener,
    wandb_logger: QueuedWandbLogger | None,
    events: EventLog,
    console: Console,
    notice: Callable[[str], None],
    report: RankReport,
    given: UserObjects | None,
) -> pl.Trainer:
    """Make the objects and train; whatever they raise comes out as it is."""
    _quieten()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    measured = MeasuredMemory(plan.device_kind)
    objects = given or make_user_objects(config, plan.batch.micro_batch_size)
    for text in objects.notices:
        notice(text)
    model, data = objects.model, objects.data
    check_model(model, plan, notice)
    if wandb_logger is not None:
        wishes = {} if config.use_amp is None else {"use_amp": config.use_amp}
        describe_run(wandb_logger, build_wandb_config(model, getattr(model, "config", None), wishes, plan), notice)
    resume = run.resume_from
    if resume is not None:
        check_fits_model(resume, model)
        damaged = scaler_problem(resume) if plan.has_loss_scale else None
        if damaged is not None:
            notice(f"the checkpoint's loss scale cannot be gone on with ({damaged}); it starts afresh")
    order_training_data(
        data if data is not None else model,
        plan.batch,
        rank=topology.rank,
        seed=config.seed,
        fixed_global_batch=config.global_batch_size is not None,
        resume_states=() if resume is None else loader_states(resume),
        notice=notice,
    )
    checkpoint = run.checkpoints / LAST_CHECKPOINT if config.trainer.enable_checkpointing is not False else None
    writer = None if wandb_logger is None else wandb_logger.writer
    watch = WatchRanks(config.watch, plan.precision, events, console, notice, writer)
    callbacks = [
        *objects.callbacks,
        watch,
        WatchBuffers(watch.alert, events, notice),
        RecordPlan(plan),
        KeepStepBorders(),
        EventWriter(events),
        *signs_of_life(report),
        RandomStates(notice),
        # In this order: a validation draws from the generators, and the schedulers follow its metrics.
        MakeUpForValidation(),
        StepPlateaus(notice),
        TellMemory(plan, measured, events),
        StopTogether(stop, listener, checkpoint),
    ]
    if checkpoint is not None:
        callbacks.append(KeepLast(checkpoint))
    loggers: list[Logger] = [*([wandb_logger] if wandb_logger else []), *objects.loggers]

    def look_for_unused(names: tuple[str, ...]) -> None:
        if topology.rank != 0:
            return
        changed = plan.looking_for_unused(names)
        write_plan(run, changed.to_dict())
        events.write("unused_parameters", names=names)
        notice(
            f"{changed.strategy.reasons[-1]}: DDP looks for such parameters in every step, which takes a little time"
        )

    trainer = build_trainer(
        config,
        plan,
        topology,
        run,
        callbacks,
        loggers,
        console,
        objects.precision_plugin,
        on_unused=look_for_unused if config.strategy == AUTO else None,
    )
    resumed_at = None if resume is None else read_checkpoint(resume)["global_step"]
    stop.start()
    with loadable_checkpoint(resume, plan, run, topology.rank, notice) as loadable:
        trainer.fit(model, datamodule=data, ckpt_path=None if loadable is None else str(loadable), weights_only=True)
    if resume is not None and trainer.global_step == resumed_at:
        notice(f"nothing was left to train after step {resumed_at}: raise trainer.max_epochs or trainer.max_steps")
    return trainer


def _result(trainer: pl.Trainer, plan: Plan, run: RunDirectory) -> FitResult:
    from launcher.main_path import FitResult

    metrics = as_numbers(trainer.callback_metrics)
    last = last_checkpoint(run.checkpoints)
    keeper = trainer.checkpoint_callback
    best = Path(keeper.best_model_path) if isinstance(keeper, ModelCheckpoint) and keeper.best_model_path else last
    return FitResult(run.path, plan, metrics, trainer.global_step, last, best, trainer)


def _say_stopping(number: int, topology: Topology) -> None:
    if topology.rank == 0:
        text = f"signal {number}: saving at the next step boundary; Ctrl-C again ends at once\n"
        sys.stdout.write(text)
        sys.stdout.flush()


def _quieten() -> None:
    """Leave out what Lightning says of things that the plan has said already."""
    # Lightning's advice to use more loader workers is for the user's data, and shown once is enough: it stays.
    for message in (
        ".*Checkpoint directory .* exists and is not empty.*",
        # The ranks are made by the launcher's agent, on SLURM too.
        ".*`srun` command is available.*",
        # torchdata's and Lightning's own affair with torch 2.13.
        ".*set_vital.*",
        # The summary counts parameters; their size in half precision is the plan's to say.
        ".*is not supported by the model summary.*",
        ".*LeafSpec.*",
        # DeepSpeed's own affair with torch 2.13.
        ".*(all_gather_into|reduce_scatter)_tensor` is deprecated.*",
        # The loader's position is saved: it is a StatefulDataLoader.
        ".*resumed from a checkpoint that ended before the epoch ended.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.strategies.deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
