"""A resumed run uses the values that Lightning's finders found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch.utils.data import DataLoader, TensorDataset

from launcher.training.data.order import DataOrder, DataSplit
from launcher.training.loops.fit_loop import use_resumable_loops
from launcher.training.resume.tuned_values import TunedValues
from strategies.batch import BatchSplit

pytestmark = pytest.mark.filterwarnings("ignore")


class _Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.arange(64.0)[:, None]), self.batch_size, shuffle=True)


class _Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-3
        self.net = torch.nn.Linear(1, 1)
        self.steps: list[tuple[int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps.append((self.global_step, len(batch[0])))
        return (self.net(batch[0] / 64) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


def _fit(folder: Path, epochs: int, ckpt: Path | None, notices: list[str]) -> _Module:
    torch.manual_seed(1)
    # It tries 2 and chooses 4.
    finders = [BatchSizeFinder(max_trials=2, steps_per_trial=1), LearningRateFinder(num_training_steps=20, min_lr=0.01)]
    tuned = TunedValues(finders, resumes=ckpt is not None, notice=notices.append)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_epochs=epochs, default_root_dir=folder, callbacks=[*tuned.kept, tuned],
    )  # fmt: skip
    order = DataOrder(DataSplit(BatchSplit(1, None, 1), rank=0, seed=1), notices.append)
    use_resumable_loops(trainer, order)
    module = _Module()
    trainer.fit(module, datamodule=_Data(), ckpt_path=ckpt, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


def test_finders_search_once_and_a_resume_uses_their_values(tmp_path: Path) -> None:
    notices: list[str] = []
    first = _fit(tmp_path, 1, None, notices)
    assert first.steps[-16:] == [(step, 4) for step in range(16)]
    assert notices == []

    again = _fit(tmp_path, 2, tmp_path / "last.ckpt", notices)

    assert again.steps == [(step, 4) for step in range(16, 32)]
    assert again.lr == first.lr
    (notice,) = notices
    assert notice.startswith("BatchSizeFinder and LearningRateFinder does not search again")
