"""`TrainingCoordinator`: trains the model objects of a script or a notebook."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from launcher.agent.external_ranks import read_external_rank
from launcher.agreement.script_ranks import in_notebook, is_script_rank, script_rank
from launcher.config.schema import RunConfig, TrainerOptions, WandbOptions
from launcher.config.trainer_variables import with_variables
from launcher.core.error_display import show_once
from launcher.core.errors import ConfigError, MissingLibraryError, Problem, TrainingError, with_cause_type
from launcher.hardware.topology import Topology
from launcher.process.standard_streams import open_missing_streams
from launcher.training.fit import fit
from launcher.training.result import FitResult
from launcher.training.script_end import leave_together, shows_errors
from strategies.deepspeed_config import BESIDE_DEEPSPEED
from strategies.precision import AUTO, normalize_precision
from strategies.registry import find_requested

if TYPE_CHECKING:
    from launcher.user_code.objects import UserObjects

_DEFAULT_CLIP = 1.0


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
        gradient_clip_val: largest norm of the gradients; None does not clip. The default does not apply to a model
            with manual optimization.
        strategy: see `RunConfig`.
        devices: ranks on each node; None, -1 and 'auto' use all GPUs, or one process on a CPU.
        num_nodes: number of nodes.
        notebook_processes: whether a notebook may be forked for several ranks, as Lightning's `ddp_notebook` does;
            weights and metrics are copied back into this process.
        callbacks: Lightning's callbacks of every training, one or several.
        loggers: Lightning's loggers in addition to W&B, one or several.
        plugins: one or several of a precision plugin, which then decides the precision, a CheckpointIO, a LayerSync.
        wandb: settings of W&B.
        on_precision_change: see `RunConfig`.

    Raises:
        PrecisionError: `precision` is not valid.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str] = "runs",
        use_gpu: bool = True,
        precision: str | int = "16",
        gradient_clip_val: float | None = _DEFAULT_CLIP,
        strategy: str = "auto",
        devices: int | str | None = None,
        num_nodes: int = 1,
        *,
        notebook_processes: bool = False,
        callbacks: Any = (),
        loggers: Any = (),
        plugins: Any = (),
        wandb: WandbOptions | None = None,
        on_precision_change: Literal["notice", "error"] = "notice",
    ) -> None:
        self.precision = precision
        if isinstance(precision, str) and precision.strip().lower() == AUTO:
            precision = AUTO
        else:
            normalize_precision(precision)
        self.output_dir, self.use_gpu, self.strategy = output_dir, use_gpu, strategy
        self.gradient_clip_val, self.devices, self.num_nodes = gradient_clip_val, devices, num_nodes
        self.notebook_processes, self.wandb, self.on_precision_change = notebook_processes, wandb, on_precision_change
        self.callbacks, self.loggers, self.plugins = callbacks, loggers, plugins
        self._callbacks, self._loggers, self._plugins = _all_of(callbacks), _all_of(loggers), _all_of(plugins)
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
            wandb=wandb or WandbOptions(),
        )

    def train(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        *,
        datamodule: Any = None,
        max_epochs: int = 1,
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
            max_epochs: number of epochs.
            use_amp: True requests mixed precision, False disables it, None leaves `precision` unchanged.
            resume_from_checkpoint: a checkpoint to resume from.
            seed: of every random generator and of the order of the data.
            name: the run's name; None makes one from the date.
            trainer_options: further arguments of Lightning's Trainer, as in `RunConfig.trainer`; `profiler` may be an
                object.

        Returns:
            `trainer` (Lightning's), `model`, `best_model_path` (None if no checkpoint was written), `final_metrics`
            and `plan`.

        Raises:
            MissingLibraryError: Lightning is not installed.
            ConfigError: lists every argument that is not valid.
            UsageError, Interrupted: see `launcher.training.fit.fit`.
            TrainingError: the model's or the data's code raised. It is also an instance of that exception's class. The
                ranks of a script raise it together, and can begin another training.
        """
        open_missing_streams()
        given = self._given(model, train_dataloaders, val_dataloaders, datamodule)
        clip = self._config.trainer.gradient_clip_val
        if clip == _DEFAULT_CLIP and not given.model.automatic_optimization:
            # Lightning refuses to clip for manual optimization, and the default need not be the user's choice.
            clip = None
        profiler = trainer_options.get("profiler")
        if profiler is not None and not isinstance(profiler, str):
            given = dataclasses.replace(given, profiler=trainer_options.pop("profiler"))
        options = {"gradient_clip_val": clip, "max_epochs": max_epochs}
        requested = dataclasses.replace(
            self._config,
            name=name,
            seed=seed,
            use_amp=use_amp,
            resume="none" if resume_from_checkpoint is None else os.fspath(resume_from_checkpoint),
            # For readers of the run's config; the object itself is trained.
            model={"class_path": given.traits()["model"]},
        )
        requested, options = with_variables(requested, options, TrainingCoordinator()._config, os.environ)
        config = _checked(requested, {**options, **trainer_options})
        try:
            result = self._fit(config, given)
        except TrainingError as error:
            raise show_once(with_cause_type(error), shows_errors) from error.__cause__
        return {
            "trainer": result.trainer,
            "model": model,
            "best_model_path": None if result.best is None else str(result.best),
            "final_metrics": dict(result.metrics),
            "plan": result.plan,
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
            raise ConfigError(problems)
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


def _all_of(given: Any) -> tuple[Any, ...]:
    """As a tuple: Lightning also accepts one object in place of a list."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)


def _devices(given: int | str | None) -> Any:
    """In the config's form: Lightning uses all devices for -1, and accepts a count as text."""
    if given in (None, -1, "-1"):
        return AUTO
    return int(given) if isinstance(given, str) and given.isdecimal() else given


# Arguments of Lightning's Trainer that hold objects, and the coordinator's names for them.
_OBJECTS = {"callbacks": "callbacks", "logger": "loggers", "plugins": "plugins"}
# Arguments of a Trainer, or of its `fit`, that `train` does not accept: what to do instead.
_ELSEWHERE = {
    **{name: f"give it to TrainingCoordinator, as {name}"
       for name in ("devices", "num_nodes", "precision", "strategy", "output_dir", "loggers", "wandb")},
    "accelerator": "give use_gpu to TrainingCoordinator: False trains on the CPU",
    "default_root_dir": "give output_dir to TrainingCoordinator: each training has a folder there",
    "ckpt_path": "give it as resume_from_checkpoint",
}  # fmt: skip


def _checked(config: RunConfig, trainer: Mapping[str, Any]) -> RunConfig:
    """The config with these options of Lightning's Trainer; a ConfigError has every setting that is not valid."""
    from launcher.config.validation import find_problems

    trainer = dict(trainer)
    if trainer.get("logger", False) is None:
        trainer.pop("logger")  # None is the default in a config file
    elif trainer.get("logger") is False:
        trainer["logger"] = []
        config = dataclasses.replace(config, wandb=dataclasses.replace(config.wandb, mode="disabled"))
    objects = [name for name in _OBJECTS if trainer.get(name) and trainer[name] is not True]
    elsewhere = [name for name in _ELSEWHERE if name in trainer]
    plain = {name: value for name, value in trainer.items() if name not in (*objects, *elsewhere)}
    # Defaults need no check, and the check of every field takes time.
    defaults = RunConfig().to_dict()
    given = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    problems = find_problems({**given, "trainer": plain})
    problems += [Problem(f"trainer.{n}", f"give {_OBJECTS[n]} to TrainingCoordinator, as objects") for n in objects]
    problems += [Problem(name, _ELSEWHERE[name]) for name in elsewhere]
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(config, trainer=TrainerOptions(**plain))
