"""Where a run stops at the end of an epoch, and what a resumed epoch makes up for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launcher.errors import Interrupted
from launcher.plateau_steps import StepPlateaus
from launcher.run_callbacks import StopTogether


class _Asked:
    """An agreement that says at every gate: stop here."""

    signal_number = 15

    def gate(self) -> bool:
        return True


def _steps_until_stop(val_every: float | None, batches: int, first: int) -> tuple[list[int], int]:
    """After which steps a checkpoint is written, and after which the run leaves, if it is asked to in step `first`."""
    saved: list[int] = []
    trainer: Any = SimpleNamespace(global_step=0, is_last_batch=False, val_check_batch=val_every)
    trainer.save_checkpoint = lambda path, weights_only: saved.append(trainer.global_step)
    stop = StopTogether(cast(Any, _Asked()), cast(Any, SimpleNamespace(install=list)), Path("last.ckpt"))
    stop.on_train_start(trainer, cast(Any, None))
    for step in range(first, first + 5):
        trainer.global_step, trainer.is_last_batch = step + 1, step % batches == batches - 1
        try:
            stop.on_train_batch_end(trainer, cast(Any, None), None, None, step % batches)
        except Interrupted as interruption:
            return saved, interruption.step
    raise AssertionError("it never stopped")


@pytest.mark.parametrize(
    ("val_every", "batches", "first", "saved", "left"),
    [
        (8, 8, 3, [4], 4),
        (8, 8, 7, [8, 9], 9),
        (2, 8, 3, [4, 5], 5),
        (None, 8, 7, [8, 9], 9),
        (float("inf"), 8, 3, [4], 4),
        # Every step is one that a validation follows.
        (1, 8, 3, [4, 5], 5),
        (1, 1, 3, [4, 5], 5),
    ],
)
def test_before_a_validation_it_saves_at_once_and_leaves_after_the_next_step(
    val_every: float | None, batches: int, first: int, saved: list[int], left: int
) -> None:
    assert _steps_until_stop(val_every, batches, first) == (saved, left)


def _resumed_epoch_ends(
    metrics: dict[str, float], *, restarting: bool = True, **scheduler: Any
) -> tuple[bool, list[str]]:
    """Whether Lightning still leaves the scheduler's step out, and the notices."""
    loop = SimpleNamespace(restarting=restarting, _restarting=restarting)
    config = {"reduce_on_plateau": True, "interval": "epoch", "monitor": "val_loss", **scheduler}
    trainer: Any = SimpleNamespace(
        fit_loop=loop, lr_scheduler_configs=[SimpleNamespace(**config)], callback_metrics=metrics
    )
    notices: list[str] = []
    StepPlateaus(notices.append).on_train_epoch_end(trainer, cast(Any, None))
    return vars(loop)["_restarting"], notices


def test_a_plateau_scheduler_takes_its_step_at_the_end_of_a_resumed_epoch() -> None:
    assert _resumed_epoch_ends({"val_loss": 1.0}) == (False, [])


def test_without_its_metric_the_step_is_left_out_and_told() -> None:
    left_out, (notice,) = _resumed_epoch_ends({"loss": 1.0})
    assert left_out
    assert "does not follow val_loss" in notice


@pytest.mark.parametrize("scheduler", [{"reduce_on_plateau": False}, {"interval": "step"}])
def test_other_schedulers_are_lightnings_affair(scheduler: dict[str, Any]) -> None:
    assert _resumed_epoch_ends({}, **scheduler) == (True, [])
