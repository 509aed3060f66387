"""The progress of real trainings: lines in a file, and a bar on a terminal of 80 columns."""

from __future__ import annotations

import io
import math
import pickle
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from rich.console import Console
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from launcher.training.callbacks.progress import ProgressLines, read_length
from launcher.training.callbacks.progress_bar import TerminalProgress
from launcher.training.callbacks.progress_text import TrainingLength

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Clock:
    """Advanced by the model: the measured times are exact."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


class Net(pl.LightningModule):
    def __init__(self, clock: Clock | None = None, in_bar: bool = True, optimizers: int = 1) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.clock, self.in_bar, self.optimizer_count = clock or Clock(), in_bar, optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.clock.time += 0.5
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("train_regression_root_mean_squared_error", 2.0, prog_bar=False)
        self.log("train_loss", 1.0, prog_bar=self.in_bar)
        if not self.automatic_optimization:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
                self.manual_backward(self.layer(batch[0]).pow(2).mean())
                optimizer.step()
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.clock.time += 100
        self.log("val_loss", 3.0, prog_bar=self.in_bar)
        self.log("accuracy_of_the_validation", 0.25)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The model's hook is called after the callbacks'.
        self.clock.time += 1000

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(self.optimizer_count)]


class Endless(IterableDataset[list[torch.Tensor]]):
    def __iter__(self) -> Any:
        while True:
            yield torch.ones(2)


def trained(
    folder: Path,
    model: Net,
    *callbacks: pl.Callback,
    data: Any = None,
    batch_size: int = 1,
    ckpt_path: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    settings: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 2, "enable_progress_bar": False} | options
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_model_summary=False,
                         default_root_dir=str(folder), callbacks=list(callbacks), **settings)  # fmt: skip
    loader = DataLoader(data or TensorDataset(torch.ones(6, 2)), batch_size=batch_size)
    validation = DataLoader(TensorDataset(torch.ones(2, 2)), batch_size=1)
    trainer.fit(model, loader, validation, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
@pytest.mark.parametrize("in_bar", [True, False])
def test_lines_show_speed_time_left_and_all_metrics(tmp_path: Path, in_bar: bool) -> None:
    clock, screen = Clock(), io.StringIO()
    lines = ProgressLines(Console(file=screen, width=40), clock)
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    trained(tmp_path, Net(clock, in_bar), lines, checkpoints)
    found = screen.getvalue().splitlines()
    metrics = ["train_loss 1", "train_regression_root_mean_squared_error 2"]
    train = "  ".join(metrics if in_bar else metrics[::-1])
    later = "  ".join([metrics[0], "val_loss 3", metrics[1]]) if in_bar else train
    # 2 steps a second in the first and in the second epoch: validations and checkpoints are left out. The time left
    # has their share from the first one on.
    assert found[0] == f"step 2/12  2.00 steps/s (mean 2.00)  ETA 0:00:05  {train}"
    assert found[3].startswith("validation at step 6  val_loss 3  accuracy_of_the_validation 0.25")
    assert [line.split("  ETA")[0] for line in found if line.startswith("step")] == [
        f"step {step}/12  2.00 steps/s (mean 2.00)" for step in (2, 4, 6, 8, 10, 12)]  # fmt: skip
    assert found[4].endswith(f"  {later}")
    assert found[6].split("  ")[2] == "ETA 0:00:00"


class DrawNow(pl.Callback):
    """Draws the bar without waiting for the next redraw."""

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        trainer.progress_bar_callback.refresh(hard=True)


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
def test_the_bar_and_all_metrics_fit_80_columns(tmp_path: Path) -> None:
    clock, screen = Clock(), io.StringIO()
    console = Console(file=screen, width=80, height=24, force_terminal=True, _environ={"TERM": "xterm"})
    trained(tmp_path, Net(clock), TerminalProgress(console, clock), DrawNow(), enable_progress_bar=True)
    lines = [_CONTROL.sub("", line).rstrip("\r") for line in screen.getvalue().replace("\r", "\n").split("\n")]
    assert max(map(len, lines)) <= 80
    last = [line for line in lines if line.strip()][-4:]
    assert last[0].startswith("Epoch 1/1 ━━━")
    assert last[0].endswith(" 6/6  2.00 steps/s (mean 2.00)  ETA 0:00:00")
    assert last[1].split() == ["train_loss", "1", "val_loss", "3"]
    assert last[2:] == ["train_regression_root_mean_squared_error 2", "accuracy_of_the_validation 0.25"]
    assert any(line.startswith("Validation ━") for line in lines)
    assert any(line.startswith("Sanity Checking ━") for line in lines)
    assert "v_num" not in screen.getvalue()


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
@pytest.mark.parametrize("kind", ["test", "validate"])
def test_the_bar_of_an_evaluation_ends_before_lightnings_table(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = TerminalProgress(Console(file=io.StringIO(), force_terminal=True, width=80, height=24))
    bar.metrics = {"of_a_training": 1.0}
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=str(tmp_path), callbacks=[bar])
    live: list[bool] = []

    def print_results(*_: Any) -> None:
        assert bar.progress is not None
        live.append(bar.progress.live.is_started)

    monkeypatch.setattr(_EvaluationLoop, "_print_results", staticmethod(print_results))
    model = Net()
    model.test_step = model.validation_step  # type: ignore[method-assign]
    getattr(trainer, kind)(model, DataLoader(TensorDataset(torch.ones(2, 2))), verbose=True)
    assert live == [False]
    assert "of_a_training" not in bar.metrics


def test_a_bar_can_be_pickled() -> None:
    bar = pickle.loads(pickle.dumps(TerminalProgress(Console(file=io.StringIO()), math.sqrt)))  # type: ignore[arg-type] # noqa: S301
    assert isinstance(bar, TerminalProgress)


class LengthAt(pl.Callback):
    """Records the length after the third batch."""

    def __init__(self) -> None:
        self.found: TrainingLength | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and trainer.current_epoch == 0:
            self.found = read_length(trainer, 0, batch_idx + 1)
            trainer.should_stop = True


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers", "ignore:The `train_dataloader` does not have")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 2}, TrainingLength(12, None, 9)),
        ({"max_epochs": 2, "max_steps": 7}, TrainingLength(7, 4, 9)),
        ({"max_epochs": -1, "max_steps": 30}, TrainingLength(30, 27)),
        ({"max_epochs": -1}, TrainingLength()),
        ({"max_epochs": 4, "accumulate_grad_batches": 4}, TrainingLength(8, None, 21)),
        ({"max_epochs": 2, "model": {"optimizers": 2}}, TrainingLength(None, None, 9)),
        ({"max_epochs": 2, "max_steps": 20, "model": {"optimizers": 2}}, TrainingLength(20, 14, 9)),
        ({"max_epochs": 2, "callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]}, TrainingLength(None, None, 9)),
        ({"max_epochs": 2, "data": Endless()}, TrainingLength()),
        ({"max_epochs": 2, "data": Endless(), "max_steps": 9}, TrainingLength(9, 6)),
    ],
)
def test_the_length_of_a_training_is_known_by_each_of_its_limits(
    tmp_path: Path, options: dict[str, Any], expected: TrainingLength
) -> None:
    options = dict(options)
    length = LengthAt()
    # The lines accept each of these trainings, too.
    added = [length, ProgressLines(Console(file=io.StringIO())), *options.pop("callbacks", [])]
    model = Net(**options.pop("model", {}))
    trained(tmp_path, model, *added, enable_checkpointing=False, limit_val_batches=0, **options)
    assert length.found == expected


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers", "ignore:The `train_dataloader` does not have")
@pytest.mark.parametrize("size", [8, 16])
def test_the_number_of_steps_is_right_after_a_resume_with_other_batches(tmp_path: Path, size: int) -> None:
    saved, data = tmp_path / "one.ckpt", TensorDataset(torch.ones(32, 2))
    first = trained(tmp_path, Net(), data=data, batch_size=4, max_epochs=1, enable_checkpointing=False)
    first.save_checkpoint(saved)
    output = io.StringIO()
    options = {"max_epochs": 3, "log_every_n_steps": 1, "enable_checkpointing": False}
    lines = ProgressLines(Console(file=output))
    resumed = trained(tmp_path, Net(), lines, data=data, batch_size=size, ckpt_path=saved, **options)
    steps = re.findall(r"^step (\d+)/(\d+)", output.getvalue(), re.M)
    assert steps[-1] == (str(resumed.global_step),) * 2
    assert len({total for _, total in steps}) == 1


def test_the_length_includes_max_time(tmp_path: Path) -> None:
    length = LengthAt()
    trained(tmp_path, Net(), length, enable_checkpointing=False, limit_val_batches=0, max_epochs=-1,
            max_time=timedelta(hours=1))  # fmt: skip
    assert length.found is not None
    assert length.found.seconds_left == pytest.approx(3600, abs=60)
    assert length.found.batches_left is None
