"""A resume trains the parameters that a finetuning has unfrozen, and not those that the program freezes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from launcher.training.data.order import DataOrder, DataSplit
from launcher.training.loops.fit_loop import use_resumable_loops
from launcher.training.resume.trained_parameters import KEY, TrainedParameters, read_flags
from strategies.batch import BatchSplit

pytestmark = pytest.mark.filterwarnings("ignore")


class _Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.head(self.backbone(batch[0])) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.05)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.arange(16.0).reshape(8, 2) / 16), batch_size=2)


class _OneByOne(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone[:2], optimizer, lr=0.02)
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone[2], optimizer, lr=0.01)


class _OwnWay(pl.Callback):
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        pl_module.backbone.requires_grad_(False)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone.requires_grad_(True)


class _AllParameters(_Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.05)


def _fit(folder: Path, steps: int, callback: pl.Callback, module: type[_Net] = _Net) -> tuple[_Net, list[str]]:
    notices: list[str] = []
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_steps=steps, max_epochs=4, default_root_dir=folder,
        callbacks=[callback, TrainedParameters(notices.append)],
    )  # fmt: skip
    order = DataOrder(DataSplit(BatchSplit(1, None, 1), rank=0, seed=1), print)
    use_resumable_loops(trainer, order)
    file = folder / "last.ckpt"
    trainer.fit(made := module(), ckpt_path=file if file.exists() else None, weights_only=True)
    trainer.save_checkpoint(file)
    return made, notices


_FINETUNINGS = {"one by one": _OneByOne, "backbone": lambda: BackboneFinetuning(1, lambda epoch: 1.5)}


@pytest.fixture(scope="module")
def complete_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], _Net]:
    """The module after an uninterrupted training, by name of the finetuning."""

    @functools.cache
    def train(name: str) -> _Net:
        return _fit(tmp_path_factory.mktemp("complete"), 16, _FINETUNINGS[name]())[0]

    return train


@pytest.mark.parametrize("name", _FINETUNINGS)
@pytest.mark.parametrize("stops", [(2,), (6,), (8,), (5, 11), (10, 12)])
def test_finetuning_resumes(
    tmp_path: Path, name: str, stops: tuple[int, ...], complete_of: Callable[[str], _Net]
) -> None:
    complete, finetuning = complete_of(name), _FINETUNINGS[name]
    for steps in stops:
        _fit(tmp_path, steps, finetuning())
    resumed, notices = _fit(tmp_path, 16, finetuning())
    assert read_flags(resumed) == read_flags(complete)
    assert all(read_flags(complete).values())
    for key, value in complete.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=0, atol=0, msg=key)
    assert notices == []


def test_program_that_freezes_parameters_itself_gets_a_notice(tmp_path: Path) -> None:
    _fit(tmp_path, 8, _OwnWay(), _AllParameters)
    resumed, notices = _fit(tmp_path, 16, _OwnWay(), _AllParameters)
    assert not resumed.backbone[0].weight.requires_grad
    (text,) = notices
    assert text.startswith("backbone.0.weight and 5 more was trained when the checkpoint was saved and is frozen now")


def test_checkpoint_has_the_changes_of_the_training(tmp_path: Path) -> None:
    _fit(tmp_path, 3, _OneByOne())
    assert KEY not in torch.load(tmp_path / "last.ckpt", weights_only=True)
    _fit(tmp_path, 6, _OneByOne())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved[KEY] == dict.fromkeys(
        ("backbone.1", *(f"backbone.{n}.{kind}" for n in (0, 1) for kind in ("weight", "bias"))), True
    )
    # From other versions of the module and of the launcher.
    saved[KEY]["gone.weight"] = True
    torch.save(saved, tmp_path / "last.ckpt")
    assert all(read_flags(_fit(tmp_path, 16, _OneByOne())[0]).values())
    torch.save({key: value for key, value in saved.items() if key != KEY}, tmp_path / "last.ckpt")
    assert not read_flags(_fit(tmp_path, 7, _OneByOne())[0])["backbone.0.weight"]
