"""Where a run stops at the end of an epoch, and what a resumed epoch makes up for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

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


class _Resumed:
    """A training that goes on from a checkpoint with a scheduler that follows `val_loss`."""

    def __init__(self, saved: dict[str, float], known: dict[str, float] | None = None, **scheduler: Any) -> None:
        config = {"reduce_on_plateau": True, "interval": "epoch", "monitor": "val_loss", "frequency": 1, **scheduler}
        self.trainer: Any = SimpleNamespace(
            fit_loop=SimpleNamespace(
                restarting=False,
                _restarting=True,
                resumed_on_epoch_end=False,
            ),
            current_epoch=3,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            lr_scheduler_configs=[SimpleNamespace(scheduler="plateau", **config)],
            callback_metrics=known or {},
        )
        self.steps: list[tuple[str, float]] = []
        self.module: Any = SimpleNamespace(lr_scheduler_step=lambda *step: self.steps.append(step))
        self.notices: list[str] = []
        self.callback = StepPlateaus(self.notices.append)
        checkpoint: dict[str, Any] = {}
        self.trainer.callback_metrics, now = saved, self.trainer.callback_metrics
        self.callback.on_save_checkpoint(self.trainer, self.module, checkpoint)
        self.trainer.callback_metrics = now
        self.callback.on_load_checkpoint(self.trainer, self.module, checkpoint)

    def start(self) -> None:
        self.callback.on_train_start(self.trainer, self.module)

    def end_epoch(self, *, restarting: bool = True) -> bool:
        """Whether Lightning still leaves the scheduler's step out."""
        self.trainer.fit_loop.restarting = restarting
        self.callback.on_train_epoch_end(self.trainer, self.module)
        return self.trainer.fit_loop._restarting


@pytest.mark.parametrize(("saved", "known"), [({}, {"val_loss": 1.0}), ({"val_loss": 2.0}, {})])
def test_a_plateau_scheduler_takes_its_step_at_the_end_of_a_resumed_epoch(
    saved: dict[str, float], known: dict[str, float]
) -> None:
    resumed = _Resumed(saved, known)
    resumed.start()
    assert not resumed.end_epoch()
    assert resumed.trainer.callback_metrics == {**saved, **known}
    assert all(isinstance(value, torch.Tensor) for name, value in resumed.trainer.callback_metrics.items()
               if name not in known), "EarlyStopping takes no number"  # fmt: skip
    assert not resumed.notices


@pytest.mark.parametrize(
    ("saved", "known", "value"), [({"val_loss": 2.0}, {}, 2.0), ({"val_loss": 2.0}, {"val_loss": 1.0}, 1.0)]
)
def test_the_step_of_an_epoch_that_was_being_saved_is_made_up_for(
    saved: dict[str, float], known: dict[str, float], value: float
) -> None:
    resumed = _Resumed(saved, known)
    resumed.trainer.fit_loop.resumed_on_epoch_end = True
    resumed.start()
    assert resumed.steps == [("plateau", value)]


def test_nothing_is_made_up_for_in_the_middle_of_an_epoch_or_between_two_steps_of_a_rare_one() -> None:
    resumed = _Resumed({"val_loss": 2.0})
    resumed.start()
    rare = _Resumed({"val_loss": 2.0}, frequency=2)
    rare.trainer.fit_loop.resumed_on_epoch_end = True
    rare.start()
    assert resumed.steps == rare.steps == []


def test_without_its_metric_the_step_is_left_out_and_told() -> None:
    resumed = _Resumed({}, {"loss": 1.0})
    assert resumed.end_epoch()
    resumed.trainer.fit_loop.resumed_on_epoch_end = True
    resumed.start()
    assert resumed.steps == []
    assert ["does not follow val_loss" in notice for notice in resumed.notices] == [True, True]


@pytest.mark.parametrize("scheduler", [{"reduce_on_plateau": False}, {"interval": "step"}])
def test_other_schedulers_are_lightnings_affair(scheduler: dict[str, Any]) -> None:
    resumed = _Resumed({"val_loss": 2.0}, **scheduler)
    resumed.trainer.fit_loop.resumed_on_epoch_end = True
    resumed.start()
    assert resumed.end_epoch()
    assert resumed.steps == []
    assert resumed.notices == []


def test_an_epoch_from_its_begin_is_lightnings_affair() -> None:
    resumed = _Resumed({}, {})
    assert resumed.end_epoch(restarting=False)
    assert resumed.notices == []
