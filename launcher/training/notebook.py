"""A training in forks of a notebook's kernel, which returns weights, metrics and a Trainer to the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.schema import RunConfig
from launcher.planning.plan import Plan
from launcher.training.fit import fit
from launcher.training.result import FitResult
from strategies.registry import find_strategy

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from launcher.user_code.objects import UserObjects

_RESULT = "result.pt"


def train_rank(config: RunConfig, given: UserObjects, folder: Path, rank: int) -> None:
    """Train as one rank, in a fork of the kernel; rank zero saves the result in the folder for `read_result`."""
    result = fit(config, given=given, stays_open=False)
    if rank == 0:
        _save(result, given, folder / _RESULT)


def _save(result: FitResult, given: UserObjects, path: Path) -> None:
    import torch

    trainer: pl.Trainer = result.trainer
    loops = trainer.fit_loop.state_dict()
    # The state of the loaders is needed by a resume only.
    loops["state_dict"] = {}
    values = {
        "run": result.run,
        "plan": result.plan.to_dict(),
        "metrics": dict(result.metrics),
        "steps": result.steps,
        "checkpoint": result.checkpoint,
        "best": result.best,
        "problem": result.problem,
        "callback_metrics": {name: value.cpu() for name, value in trainer.callback_metrics.items()},
        "loops": loops,
        # A sharded module has only this rank's part; the checkpoint has all of it.
        "weights": None if find_strategy(result.plan.strategy.name).is_sharded else given.model.state_dict(),
    }
    torch.save(values, path)


def read_result(config: RunConfig, given: UserObjects, count: int, folder: Path) -> FitResult:
    """Read rank zero's result from the folder of `train_rank`, and load the trained weights into the given model.

    `count` is the number of ranks. The result has a Trainer for this process.
    """
    import torch

    # A fork of this process wrote it just now in a private folder, so unpickling it is safe.
    values: dict[str, Any] = torch.load(folder / _RESULT, map_location="cpu", weights_only=False)
    weights = values["weights"]
    if weights is None and values["checkpoint"] is not None:
        from launcher.checkpoint.formats import format_of

        weights = format_of(values["checkpoint"]).read_weights(values["checkpoint"])
    if weights is not None:
        # As Lightning does: a rank may have added or removed layers.
        given.model.load_state_dict(weights, strict=False)
    plan = Plan.from_dict(values["plan"])
    trainer = _kernel_trainer(config, plan, given, count, values)
    fields = {name: values[name] for name in ("run", "metrics", "steps", "checkpoint", "best", "problem")}
    return FitResult(plan=plan, trainer=trainer, **fields)


def _kernel_trainer(
    config: RunConfig, plan: Plan, given: UserObjects, count: int, values: Mapping[str, Any]
) -> pl.Trainer:
    """A Trainer for the kernel with the state of rank zero's Trainer; it uses `ddp_notebook`."""
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
