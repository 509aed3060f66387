"""The record of a program, written by its callback on each rank, under Lightning and the launcher."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

# Hooks with an order and number that users rely on.
_HOOKS = ("setup", "on_fit_start", "on_sanity_check_start", "on_sanity_check_end", "on_train_start",
          "on_train_epoch_start", "on_train_epoch_end", "on_validation_start", "on_validation_epoch_start",
          "on_validation_epoch_end", "on_validation_end", "on_train_end", "on_fit_end", "on_before_optimizer_step",
          "on_before_zero_grad", "on_exception")  # fmt: skip


def total(value: Any) -> float:
    """The sum of all numbers in a batch, however it is nested."""
    if isinstance(value, Tensor):
        return float(value.double().sum()) if not value.is_sparse else float(value.to_dense().double().sum())
    if isinstance(value, dict):
        return sum(map(total, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(total, value))
    if isinstance(value, int | float):
        return float(value)
    return total(vars(value)) if hasattr(value, "__dict__") else 0.0


class Record(pl.Callback):
    """Writes `$RECORD/rank-<r>.json` when the fit ends."""

    def __init__(self) -> None:
        self.hooks: list[str] = []
        self.batches: list[list[float]] = []
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append([trainer.current_epoch, batch_idx, total(batch)])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append([group["lr"] for each in trainer.optimizers for group in each.param_groups])

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        state = {name: value for name, value in pl_module.state_dict().items() if isinstance(value, Tensor)}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        seen = {
            "steps": trainer.global_step,
            "epoch": trainer.current_epoch,
            "stopped": bool(trainer.should_stop),
            "hooks": self.hooks,
            "batches": self.batches,
            "rates": self.rates,
            "metrics": metrics,
            "weights": {name: value.double().flatten().tolist() for name, value in state.items()},
            "loggers": sorted(type(each).__name__ for each in trainer.loggers),
            "world_size": trainer.world_size,
            "precision": trainer.precision,
        }
        folder = Path(os.environ["RECORD"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(seen))


def _noted(name: str) -> Any:
    def hook(self: Record, *_: Any, **__: Any) -> None:
        if not self.hooks or self.hooks[-1] != name:
            self.hooks.append(name)

    return hook


for _name in _HOOKS:
    setattr(Record, _name, _noted(_name))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of all ranks, in their order."""
    files = sorted(folder.glob("rank-*.json"), key=lambda file: int(file.stem.split("-")[1]))
    return [json.loads(file.read_text()) for file in files]


def same_number(one: float, other: float, tolerance: float) -> bool:
    """Whether two numbers are equal, or both are not finite, or differ by less than a share of them."""
    one_tensor, other_tensor = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return bool(torch.isclose(one_tensor, other_tensor, rtol=tolerance, atol=tolerance, equal_nan=True))
