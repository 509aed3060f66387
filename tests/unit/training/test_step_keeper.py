"""One rank that keeps its last step: when it saves it, when it does not, and that the training never depends on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from launcher.core.errors import Interrupted
from launcher.process.rank_status import RankStatusWriter
from launcher.runs.kept_state import find_kept_state, record_path
from launcher.training.resume.epoch_metrics import EpochMetrics
from launcher.training.resume.random_states import RandomStates
from launcher.training.survivors.keeper import StepKeeper
from launcher.training.survivors.record import read_records
from launcher.training.survivors.saving import KeptFolders
from tests.support.resume_programs import Program, Trace, fit_program

pytestmark = pytest.mark.filterwarnings("ignore")


_LOST = RuntimeError("Connection closed by peer")


class _Fails(pl.Callback):
    def __init__(self, hook: str, error: BaseException, at: int = 4) -> None:
        self.error, self.at = error, at
        setattr(self, hook, self._fail)

    def _fail(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step >= self.at and not trainer.sanity_checking:
            raise self.error


def _fit(
    folder: Path, *callbacks: pl.Callback, states: Path | None = None, **program: Any
) -> tuple[Trace, dict[str, Any]]:
    memory = folder / "memory"
    memory.mkdir(exist_ok=True)
    status, trace = RankStatusWriter(None, 0), Trace()
    folders = KeptFolders(memory, states or memory, folder / "disk")

    def more(metrics: EpochMetrics) -> list[pl.Callback]:
        return [StepKeeper(folders, metrics, status, (RandomStates,)), *callbacks]

    try:
        fit_program(Program("none", 0, **program), folder, trace, None, breaks=False, whole_steps=0, more=more)
    finally:
        trace.end["status"] = vars(status)["_values"]
    return trace, trace.end["status"]


def _failed(folder: Path, error: type[BaseException], *callbacks: pl.Callback, **options: Any) -> Path | None:
    with pytest.raises(error):
        _fit(folder, *callbacks, **options)
    return find_kept_state([folder / "memory", folder / "disk"])[0]


def test_a_training_that_ends_leaves_nothing(tmp_path: Path) -> None:
    _, status = _fit(tmp_path)
    assert list((tmp_path / "memory").iterdir()) == []
    assert status == {}


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_validation_start"])
def test_the_state_of_the_last_step_is_saved_after_a_failure(tmp_path: Path, hook: str) -> None:
    state = _failed(tmp_path, RuntimeError, _Fails(hook, _LOST))
    assert state is not None
    content = torch.load(state, weights_only=True)
    assert content["global_step"] >= 4
    assert state.stat().st_mode & 0o777 == 0o600
    second = _failed(tmp_path, RuntimeError, _Fails(hook, _LOST))
    assert second == state


@pytest.mark.parametrize(
    "error",
    [ValueError("mine"), OSError(28, "full"), torch.OutOfMemoryError("no"), Interrupted(15, checkpoint=None, step=4)],
)
def test_a_rank_with_an_error_of_its_own_saves_nothing(tmp_path: Path, error: BaseException) -> None:
    assert _failed(tmp_path, BaseException, _Fails("on_before_backward", error)) is None


@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_train_batch_end", "on_before_zero_grad"])
def test_a_failure_within_the_end_of_a_step_saves_nothing(tmp_path: Path, hook: str) -> None:
    failing = _Fails(hook, _LOST)
    state = _failed(tmp_path, RuntimeError, failing)
    assert (state is None) == (hook != "on_before_zero_grad")


class _Swaps(pl.Callback):
    """Replaces the parameters for a validation, as an average does."""

    def __init__(self, through_data: bool) -> None:
        self.through_data = through_data

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        for parameter in pl_module.parameters():
            with torch.no_grad():
                (parameter.data if self.through_data else parameter).mul_(0.5)


@pytest.mark.parametrize("through_data", [False, True])
def test_replaced_parameters_are_not_saved(tmp_path: Path, through_data: bool) -> None:
    failing = _Fails("on_validation_batch_end", _LOST)
    assert _failed(tmp_path, RuntimeError, _Swaps(through_data), failing) is None


class _Changes(pl.Callback):
    """Has a state that changes before a step's gradients; `state` returns it."""

    def __init__(self, state: Callable[[], dict[str, Any]]) -> None:
        self.state = state

    def on_train_batch_start(self, *_: Any) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return self.state()


def _broken_once() -> Callable[[], dict[str, Any]]:
    answers = iter([ValueError("not now")])

    def state() -> dict[str, Any]:
        for error in answers:
            raise error
        return {}

    return state


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (lambda: {"average": torch.zeros(1 << 20)}, "_Changes changes a large state between two steps"),
        (_broken_once(), "ValueError: not now"),
    ],
)
def test_a_callback_that_cannot_be_copied_stops_the_keeping_and_not_the_training(
    tmp_path: Path, state: Callable[[], dict[str, Any]], reason: str
) -> None:
    trace, status = _fit(tmp_path, _Changes(state), every=1000, validate=None)
    assert trace.end["epochs"] == 3
    assert status["not_kept"] == reason


def test_memory_without_space_stops_the_keeping_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    trace, status = _fit(tmp_path)
    assert trace.end["epochs"] == 3
    assert "No space left on device" in status["not_kept"]


def test_a_state_that_does_not_fit_into_memory_is_saved_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: real(path)._replace(free=1000) if "memory" in str(path) else real(path)
    )
    state = _failed(tmp_path, RuntimeError, _Fails("on_before_backward", _LOST))
    assert state is not None
    assert state.parent == tmp_path / "disk"


def test_the_record_has_statistics_that_torch_does_not_count_and_no_large_constant(tmp_path: Path) -> None:
    class Norm(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.norm = torch.nn.BatchNorm1d(2048)
            pl_module.register_buffer("constant", torch.ones(4096))

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            pl_module.norm(torch.rand(4, 2048))

    assert _failed(tmp_path, RuntimeError, Norm(), _Fails("on_train_batch_start", _LOST)) is not None
    record = max(read_records(record_path(tmp_path / "memory", 0)), key=lambda each: each.batches)
    names = {name for group, _ in record.content["buffers"] for name in group}
    assert names == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


class _Clamps(pl.Callback):
    """Changes one parameter before each step, as a Wasserstein GAN does."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            pl_module.net[2].bias.clamp_(-0.01, 0.01)


def test_a_model_that_changes_its_parameters_outside_of_the_optimizer_is_not_kept(tmp_path: Path) -> None:
    _, status = _fit(tmp_path, _Clamps())
    assert status["not_kept"] == "its parameters change between two optimizer steps"


def test_a_module_with_manual_optimization_is_kept(tmp_path: Path) -> None:
    class Steps(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            # As the second optimizer's backward pass, after the first one's step.
            with torch.no_grad():
                pl_module.net[2].bias.add_(0.01)
            keeper = next(each for each in trainer.callbacks if isinstance(each, StepKeeper))
            keeper.on_before_backward(trainer, pl_module, torch.zeros(()))

    failing = _Fails("on_train_batch_start", _LOST)
    assert _failed(tmp_path, RuntimeError, Steps(), failing, manual=True, validate=None) is not None
