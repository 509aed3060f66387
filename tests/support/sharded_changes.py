"""Resumes in other precisions, of loss scales, and of plain Lightning, on ranks of `tests.support.sharded_ranks`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from strategies.base import RankLocation
from strategies.environment import FixedClusterEnvironment
from tests.support.sharded_programs import Model, data, fit, saved

# Each to itself and to another.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")
CHANGES = [(one, PRECISIONS[(n + step) % 5]) for n, one in enumerate(PRECISIONS) for step in (0, 2)]


def precisions(folder: Path) -> dict[str, Any]:
    """Resumes in another precision; the same one equals the uninterrupted training."""
    found: dict[str, Any] = {}
    wholes: dict[str, Model] = {}
    for one in PRECISIONS:
        wholes[one] = Model("momentum")
        fit(wholes[one], "fsdp2", folder / one, precision=one)
    for one, other in CHANGES:
        model = Model("momentum")
        strategy = "fsdp2" if one == other else "hsdp"
        fit(model, strategy, folder / f"{one}-{other}", saved(folder / one), precision=other)
        distance = max(abs(wholes[one].losses[n] - loss) for n, loss in model.losses.items())
        found[f"{one} {other}"] = [sorted(model.losses), distance, str(model.embed.weight.dtype)]
    return found


class Scale(pl.Callback):
    """Keeps the loss scale with which a training starts, and the steps since its last change."""

    start: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = scale_of(trainer)


def scale_of(trainer: Any) -> Any:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        state = scaler.state_dict()
        return [state["scale"], state["_growth_tracker"]]
    own = trainer.strategy.deepspeed_engine.optimizer.loss_scaler
    return [own.cur_scale, own.cur_iter - own.last_overflow_iter - 1]


def scales(folder: Path) -> dict[str, Any]:
    """The loss scale is restored from one strategy by another one."""
    found: dict[str, Any] = {}
    zero = (("deepspeed_stage_2", "fsdp2"), ("fsdp2", "deepspeed_stage_3"))
    for one, other in (("ddp", "fsdp2"), ("fsdp2", "ddp"), *zero):
        here, scale = folder / f"{one}-{other}", Scale()
        trainer = fit(Model(), one, here, precision="16-mixed", steps=3)
        saved_scale = scale_of(trainer)
        fit(Model(), other, here / "again", saved(here), precision="16-mixed", callbacks=[scale])
        found[f"{one} {other}"] = [scale.start, saved_scale]
    return found


class Wrapped(Model):
    """Shards itself, as plain Lightning's strategy needs."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)


def plainly(folder: Path, kind: type[Model], resume: Path | None, steps: int, **options: Any) -> Model:
    """Train with plain Lightning's strategy, without the launcher."""
    pl.seed_everything(7, workers=True, verbose=False)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    strategy = ModelParallelStrategy(ranks, 1, **options)
    strategy.cluster_environment = FixedClusterEnvironment(RankLocation(rank, ranks, rank, ranks, 0, "127.0.0.1", 0))
    model = kind("adamw")
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, "saved-{step}", save_top_k=-1, every_n_train_steps=3)], max_steps=steps,
        strategy=strategy, use_distributed_sampler=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, data(4 // ranks, is_same=True), ckpt_path=None if resume is None else str(resume))
    return model


def lightning(folder: Path) -> dict[str, Any]:
    """Plain Lightning resumes from our folder, and we from its folder and its file."""
    found: dict[str, Any] = {}
    whole = plainly(folder / "whole", Wrapped, None, 6)
    again = Model("adamw")
    fit(again, "fsdp2", folder / "ours", saved(folder / "whole"), is_same=True)
    found["ours from its folder"] = [list(again.losses.items()), list(whole.losses.items())]
    plainly(folder / "file", Wrapped, None, 3, save_distributed_checkpoint=False)
    again = Model("adamw")
    fit(again, "fsdp2", folder / "ours from file", saved(folder / "file"), is_same=True)
    found["ours from its file"] = [list(again.losses.items()), list(whole.losses.items())]
    first = Model("adamw")
    fit(first, "fsdp2", folder / "first", is_same=True)
    again = plainly(folder / "plain", Wrapped, saved(folder / "first"), 6)
    found["plain from ours"] = [list(again.losses.items()), list(first.losses.items())]
    return found
