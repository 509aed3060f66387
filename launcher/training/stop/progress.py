"""What a training is doing, for the texts after a signal. Other threads read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(slots=True)
class StopProgress:
    """Where the training is.

    Attributes:
        saves: whether a stop writes a checkpoint.
        trainer: None until it trains.
    """

    saves: bool = True
    trainer: pl.Trainer | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return 0 if self.trainer is None else self.trainer.global_step

    @property
    def trained_step(self) -> int | None:
        """Optimizer steps done; None before the training."""
        return None if self.trainer is None else self.trainer.global_step

    def describe_stop(self) -> str:
        """When the run stops after a signal."""
        verb = "saving" if self.saves else "stopping"
        trainer = self.trainer
        if trainer is None or trainer.sanity_checking:
            return f"{verb} after the first step"
        if trainer.validating:
            return f"{verb} after the validation and a step"
        return f"{verb} at the next step boundary"
