"""Scheduler steps that Lightning skips around a resume are made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.training.resume.plateaus import StepPlateaus


class _Resumed:
    """A training that resumes from a checkpoint, with a scheduler that follows `val_loss`."""

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
        """Whether Lightning still skips the scheduler's step."""
        self.trainer.fit_loop.restarting = restarting
        self.callback.on_train_epoch_end(self.trainer, self.module)
        return self.trainer.fit_loop._restarting


@pytest.mark.parametrize(("saved", "known"), [({}, {"val_loss": 1.0}), ({"val_loss": 2.0}, {})])
def test_plateau_scheduler_steps_at_the_end_of_a_resumed_epoch(
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
def test_skipped_step_of_a_saved_epoch_end_is_made(
    saved: dict[str, float], known: dict[str, float], value: float
) -> None:
    resumed = _Resumed(saved, known)
    resumed.trainer.fit_loop.resumed_on_epoch_end = True
    resumed.start()
    assert resumed.steps == [("plateau", value)]


def test_no_extra_step_within_an_epoch_or_between_steps_of_a_lower_frequency() -> None:
    resumed = _Resumed({"val_loss": 2.0})
    resumed.start()
    rare = _Resumed({"val_loss": 2.0}, frequency=2)
    rare.trainer.fit_loop.resumed_on_epoch_end = True
    rare.start()
    assert resumed.steps == rare.steps == []


def test_step_without_its_metric_is_skipped_with_a_notice() -> None:
    resumed = _Resumed({}, {"loss": 1.0})
    assert resumed.end_epoch()
    resumed.trainer.fit_loop.resumed_on_epoch_end = True
    resumed.start()
    assert resumed.steps == []
    assert ["does not follow val_loss" in notice for notice in resumed.notices] == [True, True]


@pytest.mark.parametrize("scheduler", [{"reduce_on_plateau": False}, {"interval": "step"}])
def test_other_schedulers_are_not_stepped(scheduler: dict[str, Any]) -> None:
    resumed = _Resumed({"val_loss": 2.0}, **scheduler)
    resumed.trainer.fit_loop.resumed_on_epoch_end = True
    resumed.start()
    assert resumed.end_epoch()
    assert resumed.steps == []
    assert resumed.notices == []


def test_epoch_resumed_at_its_start_is_left_to_lightning() -> None:
    resumed = _Resumed({}, {})
    assert resumed.end_epoch(restarting=False)
    assert resumed.notices == []
