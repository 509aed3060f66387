"""`AmpWandbCallback` driven by hand over plain trainers."""

from __future__ import annotations

from typing import Any

from launcher import AmpWandbCallback
from tests.unit.wandb_stand_in import RecordingWandb

# Seconds that only a fault needs.
LONG = 60.0


def callback(precision: str | int | None = "16", **options: Any) -> AmpWandbCallback:
    return AmpWandbCallback(True, precision, **{"every_n_steps": 1, **options})


def steps(amp: AmpWandbCallback, trainer: Any, *numbers: int) -> None:
    """The end of these optimizer steps, and W&B has what was logged."""
    for number in numbers or (trainer.global_step,):
        trainer.global_step = number
        amp.on_train_batch_end(trainer, None, None, None, 0)
    assert amp.flush(LONG)


def only_row(wandb: RecordingWandb) -> dict[str, Any]:
    ((_, row),) = wandb.rows
    return row
