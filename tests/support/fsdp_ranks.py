"""One of several gloo ranks that trains modules under FSDP2 and DDP: `python -m tests.support.fsdp_ranks FOLDER CASES`.

CASES are the names of a JSON list of `Case`s. Writes their results to FOLDER as `rank-<r>.json`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from launcher.training.callbacks.activation_checkpointing import ActivationCheckpointing
from strategies.base import BuildOptions, RankLocation
from strategies.build import build_strategy, precision_plugin
from strategies.choice import choose_strategy
from strategies.loss_scale import read_loss_scale
from strategies.precision import Precision
from strategies.sharding import ShardOptions
from tests.support.fsdp_models import MODELS, data
from tests.support.program_ranks import results_of_rank

_QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def build(strategy: str, precision: str = "32-true", options: dict[str, Any] | None = None) -> dict[str, Any]:
    """The Trainer's arguments for a strategy."""
    rank, size = dist.get_rank(), dist.get_world_size()
    choice = choose_strategy(strategy, world_size=size, device_kind="cpu", accumulate=1, model_has_static_graph=False)
    location = RankLocation(rank, size, rank, size, 0, "127.0.0.1", 0)
    sharding = ShardOptions(**(options or {}))
    found: list[Any] = []
    built = build_strategy(choice, BuildOptions("cpu", location, 60, on_unused=found.append, sharding=sharding))
    plugin = precision_plugin(Precision(precision), "cpu", strategy=strategy)
    given = {"precision": precision} if plugin is None else {"plugins": [plugin]}
    return {"strategy": built, **given}


def _fused(state: dict[str, Any], optimizer: Any) -> list[list[bool | None]]:
    """For each group, as it steps and as a checkpoint has it."""
    pairs = zip(optimizer.param_groups, state.get("param_groups", ()), strict=False)
    return [[group.get("fused"), saved.get("fused")] for group, saved in pairs]


def fit(model: str, strategy: str, trainer: dict[str, Any], precision: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train one case; its losses, or its error. `options` are the fields of `ShardOptions`."""
    pl.seed_everything(0, verbose=False)
    module = MODELS[model]()
    settings = {"max_epochs": 2, "limit_val_batches": 1, "num_sanity_val_steps": 1, **trainer}
    callbacks: list[pl.Callback] = (
        [ActivationCheckpointing(options.get("wrap", ()))] if options.get("checkpoint_activations") else []
    )
    try:
        fitted = pl.Trainer(
            **build(strategy, precision, options),
            accelerator="cpu",
            devices=dist.get_world_size(),
            **_QUIET,
            callbacks=callbacks,
            **settings,
        )
        fitted.fit(module, data(40 * dist.get_world_size()), data(16))
    except Exception as error:  # noqa: BLE001 -- the test expects it
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    scale = read_loss_scale(fitted)
    return {
        "losses": module.losses,
        "steps": fitted.global_step,
        "fused": [_fused(fitted.strategy.optimizer_state(each), each) for each in fitted.optimizers],
        "warnings": getattr(module, "warnings", []),
        "name": type(module).__name__,
        "skipped": None if scale is None else scale.skipped_steps,
    }


def evaluate(strategy: str) -> list[float]:
    """Fit, validate, test and predict with one Trainer, then validate with another one."""
    pl.seed_everything(0, verbose=False)
    module = MODELS["Scalars"]()
    options: dict[str, Any] = {"accelerator": "cpu", "devices": dist.get_world_size(), "max_steps": 4, **_QUIET}
    trainer = pl.Trainer(**build(strategy), **options)
    trainer.fit(module, data(64), data(16))
    trainer.validate(module, data(16), verbose=False)
    trainer.test(module, data(16), verbose=False)
    predicted: list[Any] = trainer.predict(module, data(16)) or []
    other = pl.Trainer(**build(strategy), **options)
    other.validate(module, data(16), verbose=False)
    fresh = MODELS["Scalars"]()
    other.test(fresh, data(16), verbose=False)
    return [*module.losses, *fresh.losses, *(each.sum().item() for each in predicted)]


def main(folder: Path) -> None:
    cases = json.loads(Path(folder, "cases.json").read_text())
    with results_of_rank(folder) as seen:
        for name, case in cases.items():
            seen[name] = fit(**case)
        seen["evaluated"] = {strategy: evaluate(strategy) for strategy in ("ddp", "fsdp2", "hsdp")}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
