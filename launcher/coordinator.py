"""`TrainingCoordinator`: trains the model objects of a script or a notebook."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast

from launcher.agent.external_ranks import read_external_rank
from launcher.agreement.script_ranks import in_notebook, is_script_rank, script_rank
from launcher.config.coordinator_arguments import (
    CONSTRUCTOR_VALUES,
    CoordinatorSettings,
    find_unknown_settings,
    find_wrong_values,
    to_group,
    to_tuple,
    with_trainer_options,
)
from launcher.config.schema import CheckpointOptions, FsdpOptions, RunConfig, TrainerOptions, WandbOptions, WatchOptions
from launcher.config.trainer_variables import with_variables
from launcher.core.error_display import show_once
from launcher.core.errors import CallError, LauncherError, MissingLibraryError, Problem, TrainingError, with_cause_type
from launcher.core.python_terms import to_python_error
from launcher.hardware.topology import Topology
from launcher.process.rank_status import RankStatusWriter
from launcher.process.standard_streams import open_missing_streams
from launcher.training.fit import fit
from launcher.training.result import FitResult
from launcher.training.script_end import leave_together, shows_errors
from launcher.user_code.given_objects import find_wrong_objects
from strategies.deepspeed_config import BESIDE_DEEPSPEED
from strategies.precision import AUTO, normalize_precision
from strategies.registry import find_requested

if TYPE_CHECKING:
    from launcher.user_code.objects import UserObjects

_DEFAULTS = RunConfig()


class TrainingCoordinator:
    """Trains models with the launcher's agreement, plan and monitoring, from a script or a notebook.

    Under torchrun, SLURM's srun or MPI the process is one of their ranks. Started alone with several devices, it is
    rank zero and runs the script again for each other rank, as Lightning does. A notebook trains in one process unless
    `notebook_processes` allows forks.

    The Trainer that `train` returns can `test`, `validate`, `predict` and `fit` again: the process group and the W&B
    run stay open until the next training or the end of the script.

    Each argument is an attribute of the same name, with the value that was given.

    Args:
        output_dir: folder of the run directories.
        use_gpu: use a GPU if there is one; False trains on the CPU.
        precision: any spelling, or 'auto'. A rank that cannot compute in it stops the run, unless `use_amp=True` in
            `train` makes it a request.
        gradient_clip_val: largest norm of the gradients; None does not clip.
        strategy: see `RunConfig`.
        devices: ranks on each node; None, -1 and 'auto' use all GPUs, or one process on a CPU.
        num_nodes: number of nodes.
        notebook_processes: whether a notebook may be forked for several ranks, as Lightning's `ddp_notebook` does;
            weights and metrics are copied back into this process.
        callbacks: Lightning's callbacks of every training, one or several.
        loggers: Lightning's loggers in addition to W&B, one or several.
        plugins: one or several of a precision plugin, which then decides the precision, a CheckpointIO, a LayerSync.
        wandb: settings of W&B, as `WandbOptions` or a dict.
        on_precision_change: see `RunConfig`.
        settings: further keys of the config, with its meanings and defaults: see `CoordinatorSettings`. The other keys
            are arguments of `train`, belong to the model, or are used by `launcher submit` only.

    Raises:
        PrecisionError: `precision` is not valid, and nothing else is wrong.
        CallError: lists every argument that does not exist or whose value is not valid, with what to do.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str] = "runs",
        use_gpu: bool = True,
        precision: str | int = AUTO,
        gradient_clip_val: float | None = None,
        strategy: str = "auto",
        devices: int | str | None = None,
        num_nodes: int = 1,
        *,
        notebook_processes: bool = False,
        callbacks: Any = (),
        loggers: Any = (),
        plugins: Any = (),
        wandb: WandbOptions | Mapping[str, Any] | None = None,
        on_precision_change: Literal["notice", "error"] = "notice",
        **settings: Unpack[CoordinatorSettings],
    ) -> None:
        self.precision = precision
        if isinstance(precision, str) and precision.strip().lower() == AUTO:
            precision = AUTO
        self.output_dir, self.use_gpu, self.strategy = output_dir, use_gpu, strategy
        self.gradient_clip_val, self.devices, self.num_nodes = gradient_clip_val, devices, num_nodes
        self.notebook_processes, self.wandb, self.on_precision_change = notebook_processes, wandb, on_precision_change
        self.callbacks, self.loggers, self.plugins = callbacks, loggers, plugins
        # The others have the config's defaults.
        given = {name: settings.get(name, getattr(_DEFAULTS, name)) for name in CoordinatorSettings.__annotations__}
        vars(self).update(given)
        self._callbacks, self._loggers, self._plugins = to_tuple(callbacks), to_tuple(loggers), to_tuple(plugins)
        arguments = {name: getattr(self, name) for name in CONSTRUCTOR_VALUES}
        arguments.update({"precision": precision, "devices": _devices(devices)}, **given)
        problems = [*find_unknown_settings(settings), *find_wrong_values(arguments),
                    *find_wrong_objects(self._callbacks, self._loggers, self._plugins)]  # fmt: skip
        if [problem.path for problem in problems] == ["precision"]:
            normalize_precision(precision)
        if problems:
            raise CallError(problems)
        given["checkpoint"] = to_group(CheckpointOptions, given["checkpoint"])
        given |= {"fsdp": to_group(FsdpOptions, given["fsdp"]), "watch": to_group(WatchOptions, given["watch"])}
        self._config = RunConfig(
            runs_dir=os.fspath(output_dir),
            accelerator="auto" if use_gpu else "cpu",
            devices=_devices(devices),
            # 1 is the default of a script: torchrun and SLURM report how many there are.
            num_nodes="auto" if num_nodes == 1 else num_nodes,
            strategy=strategy,
            precision=precision,
            on_precision_change=on_precision_change,
            trainer=TrainerOptions(gradient_clip_val=gradient_clip_val, max_epochs=1),
            wandb=to_group(WandbOptions, wandb),
            **given,
        )

    def train(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        *,
        datamodule: Any = None,
        max_epochs: int | None = None,
        use_amp: bool | None = None,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
        seed: int = 42,
        name: str | None = None,
        **trainer_options: Any,
    ) -> dict[str, Any]:
        """Train until the end. `PL_TRAINER_*` variables replace arguments that have their default value.

        Args:
            model: a LightningModule, or one compiled by `torch.compile`.
            train_dataloaders: one or several loaders, or a LightningDataModule. None uses the model's own.
            val_dataloaders: loaders of the validation.
            datamodule: a LightningDataModule, instead of the loaders.
            max_epochs: number of epochs. None is one epoch, or no limit where `max_steps` or `max_time` is given; a
                config without a limit trains for 1000 epochs, as Lightning does.
            use_amp: True requests mixed precision, False disables it, None leaves `precision` unchanged.
            resume_from_checkpoint: a checkpoint to resume from.
            seed: of every random generator and of the order of the data.
            name: the run's name; None makes one from the date.
            trainer_options: further arguments of Lightning's Trainer, as in `RunConfig.trainer`. `profiler` may be an
                object; `callbacks` and `logger` are used in addition to those of the coordinator.

        Returns:
            `trainer` (Lightning's), `model`, `best_model_path` (None if no checkpoint was written), `final_metrics`,
            `plan` and `run_directory`.

        Raises:
            MissingLibraryError: Lightning is not installed.
            CallError: lists every argument that is not valid.
            UsageError, Interrupted: see `launcher.training.fit.fit`.
            TrainingError: the model's or the data's code raised. It is also an instance of that exception's class. The
                ranks of a script raise it together, and can begin another training.
        """
        open_missing_streams()
        given = self._given(model, train_dataloaders, val_dataloaders, datamodule)
        given = given.with_options(trainer_options)
        options: dict[str, Any] = {"gradient_clip_val": self._config.trainer.gradient_clip_val}
        if max_epochs is not None or not _has_limit(trainer_options):
            options["max_epochs"] = 1 if max_epochs is None else max_epochs
        requested = dataclasses.replace(
            self._config,
            name=name,
            seed=seed,
            use_amp=use_amp,
            resume="none" if resume_from_checkpoint is None else _path_text(resume_from_checkpoint),
            # For readers of the run's config; the object itself is trained.
            model={"class_path": given.traits()["model"]},
        )
        try:
            requested, options = with_variables(requested, options, TrainingCoordinator()._config, os.environ)
            config = with_trainer_options(requested, {**options, **trainer_options})
            _check_restart(config)
            result = self._fit(config, given)
        except TrainingError as error:
            to_python_error(error)
            raise show_once(with_cause_type(error), shows_errors) from error.__cause__
        except LauncherError as error:
            raise show_once(to_python_error(error), shows_errors) from error.__cause__
        return {
            "trainer": result.trainer,
            "model": model,
            "best_model_path": None if result.best is None else str(result.best),
            "final_metrics": dict(result.metrics),
            "plan": result.plan,
            "run_directory": str(result.run),
        }

    def _given(self, model: Any, train: Any, validation: Any, datamodule: Any) -> UserObjects:
        try:
            import lightning.pytorch as pl
            from lightning.pytorch.plugins import Precision
        except ImportError as error:
            raise MissingLibraryError(
                f"cannot import Lightning, which training needs ({error}); pip install 'lightning>=2.6'"
            ) from error
        from lightning.pytorch.utilities.compile import from_compiled
        from torch._dynamo import OptimizedModule

        from launcher.user_code.imports import foreign_lightning
        from launcher.user_code.objects import Loaders, UserObjects, sort_plugins

        if isinstance(model, OptimizedModule) and isinstance(model._orig_mod, pl.LightningModule):
            model = from_compiled(model)
        problems: list[Problem] = []
        if not isinstance(model, pl.LightningModule):
            other = f"given {model!r}; expected a LightningModule"
            problems.append(Problem("model", foreign_lightning(model) or other))
        if isinstance(train, pl.LightningDataModule) and datamodule is None:
            datamodule, train = train, None
        strategy = find_requested(self._config.strategy)
        if strategy and not strategy.accepts_precision_plugin and any(isinstance(p, Precision) for p in self._plugins):
            problems.append(Problem("plugins", f"{BESIDE_DEEPSPEED}; remove it and set precision, or use ddp"))
        if train is not None and datamodule is not None:
            text = "given together with a datamodule, which has its own; give one of them"
            problems.append(Problem("train_dataloaders", text))
        elif train is None and validation is not None:
            owner = "model" if datamodule is None else "datamodule"
            text = f"given without train_dataloaders, so the {owner}'s loaders are used; give both or none"
            problems.append(Problem("val_dataloaders", text))
        if problems:
            raise CallError(problems)
        data = datamodule if train is None else Loaders(train, validation)
        precision, others = sort_plugins(self._plugins)
        module = cast("pl.LightningModule", model)
        return UserObjects(module, data, self._callbacks, self._loggers, precision, plugins=others)

    def _fit(self, config: RunConfig, given: UserObjects) -> FitResult:
        from launcher.hardware.rank_count import count_requested_ranks

        if is_script_rank():
            return self._fit_script(config, given, 0)
        outside = read_external_rank(config, os.environ)
        if outside is not None:
            return fit(config, env={**os.environ, **outside}, given=given)
        if Topology.from_env(os.environ, os.uname().nodename).source == "torchrun":
            return fit(config, given=given)
        count = count_requested_ranks(config)
        if count == 1:
            return fit(config, given=given)
        if not in_notebook():
            return self._fit_script(config, given, count)
        reason = self._why_not_forked()
        if reason is not None:
            notice = f"this is a notebook, so one process trains instead of {count}: {reason}"
            return fit(dataclasses.replace(config, devices=1), given=dataclasses.replace(given, notices=(notice,)))
        return _fit_in_forks(config, given, count)

    def _fit_script(self, config: RunConfig, given: UserObjects, count: int) -> FitResult:
        # Every rank continues with the script, which may begin another training.
        with leave_together():
            return fit(config, env=script_rank(count), given=given)

    def _why_not_forked(self) -> str | None:
        import torch

        if not self.notebook_processes:
            return "notebook_processes=True allows one process for each device"
        if torch.cuda.is_initialized():
            return "CUDA is initialized already and cannot be forked; restart the kernel and train first"
        return None


def _fit_in_forks(config: RunConfig, given: UserObjects, count: int) -> FitResult:
    """Train on `count` forks of this notebook's kernel."""
    from launcher.agent.notebook_ranks import run_in_forks
    from launcher.training.notebook import read_result, train_rank

    with tempfile.TemporaryDirectory(prefix="launcher-notebook-") as name:
        folder = Path(name)
        run_in_forks(functools.partial(train_rank, config, given, folder), count, folder)
        return read_result(config, given, count, folder)


def _has_limit(options: Mapping[str, Any]) -> bool:
    """Whether these options of Lightning's Trainer end a training without `max_epochs`."""
    return options.get("max_steps", -1) != -1 or options.get("max_time") is not None


def _check_restart(config: RunConfig) -> None:
    """Check that something restarts this process where the arguments request it."""
    if config.on_oom == "next" and not RankStatusWriter.from_env(os.environ).has_agent:
        text = (
            "given 'next', but no agent restarts this script; start it with `launcher run`, or catch OutOfMemoryError "
            "and train with strategy=error.next_strategy"
        )
        raise CallError([Problem("on_oom", text)])


def _path_text(given: Any) -> Any:
    """A path as text; another kind of value is reported with all other problems."""
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def _devices(given: int | str | None) -> Any:
    """In the config's form: Lightning uses all devices for -1, and accepts a count as text."""
    if given is None or (type(given) in (int, str) and str(given) == "-1"):
        return AUTO
    return int(given) if isinstance(given, str) and given.isdecimal() else given
