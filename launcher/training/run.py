"""The last step of the main path: Lightning trains what the plan says."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from torch.distributed import PrefixStore

from launcher.checkpoint.reader import Trust
from launcher.checkpoint.resume import other_model_told, read_checkpoint, scaler_problem
from launcher.checkpoint.secrets import HideSecrets
from launcher.config.schema import RunConfig
from launcher.core.errors import Interrupted, LauncherError, PlanError, TrainingError
from launcher.core.events import EventLog
from launcher.core.secrets import find_secrets, redact, scrub
from launcher.hardware.topology import Topology
from launcher.loggers.kept_logs import KEY, KeepLogs
from launcher.loggers.selection import logs_to_wandb, make_wandb_logger, own_loggers, run_loggers, wants_no_logger
from launcher.loggers.wandb_callback import BeginWandb
from launcher.loggers.wandb_config import build_wandb_config
from launcher.loggers.wandb_run import QueuedWandbLogger, finish_wandb
from launcher.monitoring.buffers import WatchBuffers
from launcher.monitoring.rank_monitor import WatchRanks
from launcher.planning.changes import PlanChanges
from launcher.planning.deepspeed_facts import check_model
from launcher.planning.oom import device_peak, is_out_of_memory, out_of_memory
from launcher.planning.plan import Plan
from launcher.process.open_resources import leave_open
from launcher.process.rank_status import RankReport
from launcher.runs.directory import LAST_CHECKPOINT, RunDirectory, last_checkpoint
from launcher.runs.oom_record import Exhausted, remember
from launcher.training.callbacks import EventWriter, KeepLast, RecordPlan, StopTogether, as_numbers
from launcher.training.convert import loadable_checkpoint
from launcher.training.data_order import DataOrder
from launcher.training.epoch_hooks import TellBeginnings
from launcher.training.epoch_metrics import EpochMetrics
from launcher.training.graceful_stop import SignalListener, StopAgreement
from launcher.training.heartbeat_callback import signs_of_life
from launcher.training.loops import use_resumable_loops
from launcher.training.memory_reporter import MeasuredMemory, TellMemory
from launcher.training.plateau_callback import StepPlateaus
from launcher.training.quiet_lightning import quiet_lightning
from launcher.training.rng_callback import RandomStates
from launcher.training.run_checkpoint import best_checkpoint
from launcher.training.script_end import end_is_told
from launcher.training.trained_parameters import TrainedParameters
from launcher.training.trainer import build_trainer
from launcher.training.tuned_values import TunedValues
from launcher.user_code.objects import UserObjects, make_user_objects
from strategies.choice import AUTO, StrategyError

if TYPE_CHECKING:
    from launcher.training.fit import FitResult


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
    stays_open: bool = False,
) -> FitResult:
    """Make the model, the data and the Trainer, and fit.

    With `stays_open` the W&B run of a training that ended well is left to `launcher.process.open_resources`.

    Raises:
        TrainingError, Interrupted, DataError, ResumeError: see `launcher.training.fit.fit`.
    """

    def notice(message: str) -> None:
        if topology.rank == 0:
            events.write("notice", message=message)
            console.print(f"notice: {message}", style="yellow", highlight=False, markup=False)

    common = PrefixStore(f"launcher/{attempt}", store)
    stop = StopAgreement(common, topology.rank, topology.world_size)
    # Signals are taken until W&B has ended: torchrun ends the other ranks as soon as the first has left.
    taken = SignalListener(
        stop,
        lambda number: _say_stopping(number, topology),
        has_agent=report.has_agent,
        has_scheduler="SLURM_JOB_ID" in os.environ,
    )
    secrets = find_secrets(config.to_dict()).values()
    with taken as listener:
        # Lightning took its rank from the environment on import; objects made before the Trainer may ask for it.
        vars(rank_zero_only)["rank"] = topology.rank
        values = redact({"config": config.to_dict(), "plan": plan.to_dict()})
        wandb_logger = make_wandb_logger(config.wandb, run, values, notice)
        exit_code = 1
        try:
            with quiet_lightning(), end_is_told(common, topology, secrets):
                trainer = _fit(
                    config, topology, plan, run, common, stop, listener,
                    wandb_logger, events, console, notice, report, given,
                )  # fmt: skip
            exit_code = 0
        except Interrupted as interruption:
            exit_code = interruption.exit_code
            if stays_open:
                interruption.users_handler = listener.users_handler
                _say_stopped(interruption, topology)
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
            text = scrub(f"{type(error).__name__}: {error}", secrets)
            events.write("failed", host=topology.host, error=text)
            report.raised(error)
            # Now, not later: W&B may take its time to end, and the others of this run may end this rank before.
            report.trace(error)
            raise TrainingError(f"rank {topology.rank} ({topology.host}): {text}", rank=topology.rank) from error
        finally:
            stop.close()
            if wandb_logger is not None:
                if stays_open and exit_code == 0:
                    leave_open(partial(finish_wandb, wandb_logger, 0, notice))
                else:
                    finish_wandb(wandb_logger, exit_code, notice)
    result = _result(trainer, plan, run)
    if topology.rank == 0:
        events.write("finished", step=result.steps, metrics=dict(result.metrics), checkpoint=result.checkpoint)
    if stays_open and listener.first is not None:
        # It came when the training ended by itself: the script must hear of it, before it begins another one.
        saved = None if result.checkpoint is None else str(result.checkpoint)
        interruption = Interrupted(listener.first, checkpoint=saved, step=result.steps)
        interruption.users_handler = listener.users_handler
        raise interruption
    return result


def _fit(
    config: RunConfig,
    topology: Topology,
    plan: Plan,
    run: RunDirectory,
    store: Any,
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
    pl.seed_everything(config.seed, workers=True, verbose=False)
    measured = MeasuredMemory(plan.device_kind)
    objects = given or make_user_objects(config, plan.batch.micro_batch_size)
    for text in objects.notices:
        notice(text)
    model, data = objects.model, objects.data
    check_model(model, plan, notice)
    wishes = {} if config.use_amp is None else {"use_amp": config.use_amp}
    # Now: a strategy may divide the parameters that are counted.
    described = build_wandb_config(model, getattr(model, "config", None), wishes, plan)
    resume = run.resume_from
    trust = Trust(run.path, everywhere=config.resume_trust)
    if resume is not None:
        damaged = scaler_problem(resume) if plan.has_loss_scale else None
        if damaged is not None:
            notice(f"cannot restore the checkpoint's loss scale ({damaged}); it starts afresh")
    changes = PlanChanges(plan, run, topology.rank == 0, events, notice)
    order = DataOrder(
        plan.batch,
        rank=topology.rank,
        seed=config.seed,
        fixed_global_batch=config.global_batch_size is not None,
        distribute=config.trainer.use_distributed_sampler is not False,
        notice=notice,
        on_batch=changes.loader_batch,
    )
    checkpoint = run.checkpoints / LAST_CHECKPOINT if config.trainer.enable_checkpointing is not False else None
    own = own_loggers(config, objects.loggers, run)
    loggers = run_loggers(own, wandb_logger, run, is_off=wants_no_logger(config))
    # Lightning itself takes the loggers and the checkpoints away.
    is_trial = bool(config.trainer.barebones or config.trainer.fast_dev_run)
    if checkpoint is None and not is_trial:
        notice("trainer.enable_checkpointing is false: nothing is saved, and this run cannot be resumed")
    writer = wandb_logger.writer if wandb_logger is not None and logs_to_wandb(loggers) and not is_trial else None
    # No more of the checkpoint, as its file would stay open.
    written = None if resume is None else read_checkpoint(resume, outline=True).get(KEY, {})
    kept_logs = KeepLogs([] if is_trial else loggers, run, topology.rank, topology.world_size, store,
                         config.process_group_timeout, written)  # fmt: skip
    watch = WatchRanks(config.watch, plan.precision, events, console, notice, writer)
    writes_events = EventWriter(events)
    tuned = TunedValues(objects.callbacks, resumes=resume is not None, notice=notice)
    callbacks = [
        *tuned.kept,
        tuned,
        *([] if wandb_logger is None else [BeginWandb(wandb_logger.values, described, notice)]),
        watch,
        WatchBuffers(watch.alert, events, notice),
        RecordPlan(plan),
        writes_events,
        *signs_of_life(report),
        RandomStates(notice),
        HideSecrets(notice),
        EpochMetrics(notice),
        TrainedParameters(notice),
        TellBeginnings(notice),
        StepPlateaus(notice),
        TellMemory(plan, measured, events),
        kept_logs,
        StopTogether(stop, listener, checkpoint),
    ]
    if checkpoint is not None:
        callbacks.append(KeepLast(checkpoint))
    trainer = build_trainer(
        config,
        plan,
        topology,
        run,
        callbacks,
        loggers,
        console,
        objects.precision_plugin,
        notice,
        own_plugins=objects.plugins,
        own_profiler=objects.profiler,
        on_unused=changes.unused_parameters if config.strategy == AUTO else None,
    )
    use_resumable_loops(trainer, order)
    stop.start()
    with (
        loadable_checkpoint(resume, plan, run, topology.rank, notice, trust) as loadable,
        other_model_told(resume, model, trainer),
    ):
        trainer.fit(model, datamodule=data, ckpt_path=None if loadable is None else str(loadable), weights_only=True)
    if resume is not None and not writes_events.batches:
        notice(
            f"nothing was left to train after step {trainer.global_step}: raise trainer.max_epochs or trainer.max_steps"
        )
    return trainer


def _result(trainer: pl.Trainer, plan: Plan, run: RunDirectory) -> FitResult:
    from launcher.training.fit import FitResult

    metrics = as_numbers(trainer.callback_metrics)
    last = last_checkpoint(run.checkpoints)
    best, monitor = best_checkpoint(trainer)
    return FitResult(run.path, plan, metrics, trainer.global_step, last, best or last, trainer, monitor)


def _say_stopping(number: int, topology: Topology) -> None:
    if topology.rank == 0:
        text = f"signal {number}: saving at the next step boundary; Ctrl-C again ends at once\n"
        sys.stdout.write(text)
        sys.stdout.flush()


def _say_stopped(interruption: Interrupted, topology: Topology) -> None:
    """A script ends without a traceback then."""
    if topology.rank == 0:
        saved = f"; saved {interruption.checkpoint}" if interruption.checkpoint else ""
        sys.stdout.write(f"{interruption}{saved}\n")
        sys.stdout.flush()
