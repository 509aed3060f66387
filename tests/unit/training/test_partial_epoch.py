"""Notices before the first step of a resume in the middle of an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelPruning, StochasticWeightAveraging
from torch.utils.data import DataLoader, TensorDataset

from launcher.training.data.order import DataOrder, DataSplit
from launcher.training.loops.fit_loop import use_resumable_loops
from launcher.training.resume.partial_epoch import PartialEpochNotices, find_own_hooks
from strategies.batch import BatchSplit

pytestmark = pytest.mark.filterwarnings("ignore")


class _Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.arange(8.0)[:, None]), batch_size=2)


class _Begins(_Plain):
    def on_train_epoch_start(self) -> None:
        self.seen = 0


class _Unfreezes(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None: ...


class _Silent(pl.Callback):
    pass


def _fit(
    folder: Path, module: pl.LightningModule, steps: int, ckpt: Path | None, *callbacks: pl.Callback, **options: Any
) -> list[str]:
    notices: list[str] = []
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_steps=steps, max_epochs=3, default_root_dir=folder,
        callbacks=[*callbacks, PartialEpochNotices(notices.append)], **options,
    )  # fmt: skip
    order = DataOrder(DataSplit(BatchSplit(1, None, 1), rank=0, seed=1), print)
    use_resumable_loops(trainer, order)
    trainer.fit(module, ckpt_path=ckpt, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return notices


def test_only_hooks_of_the_user_are_listed() -> None:
    callbacks = [_Unfreezes(), _Silent(), _Unfreezes(), LearningRateMonitor(), PartialEpochNotices(print)]
    assert find_own_hooks("on_train_epoch_start", _Begins(), callbacks) == [
        "_Begins.on_train_epoch_start",
        "_Unfreezes.on_train_epoch_start",
    ]
    assert find_own_hooks("on_train_epoch_start", _Plain(), [_Silent()]) == []


@pytest.mark.parametrize(("steps", "in_its_middle"), [(5, True), (4, False)])
def test_resume_within_an_epoch_gives_a_notice(tmp_path: Path, steps: int, in_its_middle: bool) -> None:
    assert _fit(tmp_path, _Begins(), steps, None, _Unfreezes()) == []
    reported = _fit(tmp_path, again := _Begins(), 12, tmp_path / "last.ckpt", _Unfreezes())
    assert again.seen == 4  # the last epoch's
    assert len(reported) == in_its_middle
    if in_its_middle:
        assert reported[0].startswith(
            "epoch 1 is resumed in its middle, so _Begins.on_train_epoch_start and _Unfreezes."
        )
    assert _fit(tmp_path, _Plain(), steps, None) == []
    assert _fit(tmp_path, _Plain(), 12, tmp_path / "last.ckpt") == []


@pytest.mark.parametrize(("start", "reported"), [(1, 1), (2, 1), (3, 0)])
def test_started_weight_averaging_gives_a_notice(tmp_path: Path, start: int, reported: int) -> None:
    def averaging() -> pl.Callback:
        return StochasticWeightAveraging(0.1, swa_epoch_start=start)

    assert _fit(tmp_path, _Plain(), 5, None, averaging()) == []
    notices = _fit(tmp_path, _Plain(), 12, tmp_path / "last.ckpt", averaging())
    assert [text.partition(" ")[0] for text in notices] == ["StochasticWeightAveraging"] * reported


@pytest.mark.parametrize(
    ("steps", "at_the_end", "reported"), [(3, True, False), (4, True, True), (6, True, True), (3, False, True)]
)
def test_started_pruning_gives_a_notice(tmp_path: Path, steps: int, at_the_end: bool, reported: bool) -> None:
    def pruning() -> pl.Callback:
        return ModelPruning("l1_unstructured", amount=0.5, prune_on_train_epoch_end=at_the_end)

    _fit(tmp_path, _Plain(), steps, None, pruning())
    notices = _fit(tmp_path, _Plain(), 12, tmp_path / "last.ckpt", pruning())
    assert [text.partition(" ")[0] for text in notices] == ["ModelPruning"] * reported


class _Ends(_Plain):
    def on_train_epoch_end(self) -> None: ...


class _Validates(_Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


class _Stops(pl.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.at


_VALIDATED = "validated once more than in an uninterrupted run, which callbacks such as EarlyStopping count"
_CALLED = "called _Ends.on_train_epoch_end, which is called again at the end of the epoch"


@pytest.mark.parametrize(
    ("module", "stops_at", "steps", "reported"),
    [
        # Of 4 steps an epoch.
        (_Validates, 6, 12, [f"the run ended in the middle of epoch 1: to end it, Lightning {_VALIDATED}"]),
        (_Validates, 8, 12, []),
        (_Validates, None, 6, []),
        (_Plain, 6, 12, []),
        (_Ends, 6, 12, [f"the run ended in the middle of epoch 1: to end it, Lightning {_CALLED}"]),
        (_Ends, None, 6, [f"the run ended in the middle of epoch 1: to end it, Lightning {_CALLED}"]),
        (_Ends, 8, 12, []),
        (_Ends, None, 8, []),
    ],
)
def test_hooks_that_run_twice_in_an_epoch_ended_early_give_a_notice(
    tmp_path: Path, module: type[_Plain], stops_at: int | None, steps: int, reported: list[str]
) -> None:
    _fit(tmp_path, module(), steps, None, *([] if stops_at is None else [_Stops(stops_at)]))
    assert _fit(tmp_path, module(), 12, tmp_path / "last.ckpt") == reported
    # Only the first resume gives the notice.
    assert _fit(tmp_path, module(), 12, tmp_path / "last.ckpt") == []


def test_validation_that_was_due_at_the_stop_gives_no_notice(tmp_path: Path) -> None:
    for module in (_Validates, _Ends):
        _fit(tmp_path, module(), 12, None, _Stops(6), val_check_interval=2)
        reported = _fit(tmp_path, module(), 12, tmp_path / "last.ckpt", val_check_interval=2)
        assert [_VALIDATED in text for text in reported] == ([] if module is _Validates else [False])
