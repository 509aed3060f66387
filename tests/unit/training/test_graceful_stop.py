"""The step at which a run stops, with real Trainers: all its hooks have run once when it is saved."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from launcher.core.errors import Interrupted
from launcher.training.callbacks.run_checkpoint import CheckpointAfterBatch
from launcher.training.stop.agreement import StopAgreement
from launcher.training.stop.callback import GracefulStop
from launcher.training.stop.progress import StopProgress


class Counting(pl.LightningModule):
    """Counts the calls of its hook and averages its weight there, in buffers."""

    calls: Tensor
    average: Tensor

    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)
        self.register_buffer("calls", torch.zeros(1, dtype=torch.long))
        self.register_buffer("average", torch.zeros(1))
        self.automatic_optimization = not manual

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizer = cast(Any, self.optimizers())
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[0]).square().mean())

    def on_train_batch_end(self, *_: Any) -> None:
        self.calls += 1
        self.average.lerp_(self.layer.weight.detach().flatten(), 0.5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.linspace(0.1, 1, 8)[:, None]), batch_size=1)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(2, 1)), batch_size=1)


class Calls(pl.Callback):
    """A callback of the user whose count is in the checkpoint."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}


class Later(Calls):
    """A callback after the launcher's."""


class Ask(pl.Callback):
    """Requests the stop in this step."""

    def __init__(self, agreement: StopAgreement, step: int) -> None:
        self._agreement, self._step = agreement, step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            self._agreement.request(15)


class Notes(pl.Callback):
    """The state after each step of an uninterrupted run, as in a checkpoint of its end."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}

    def _note(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # The request comes in the first micro batch of a step.
        state = {name: value.clone() for name, value in module.state_dict().items()}
        self.after.setdefault(trainer.global_step, state)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._note(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note(trainer, pl_module)


def fit(folder: Path, module: Counting, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False, num_sanity_val_steps=0,
        enable_model_summary=False, callbacks=callbacks,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        **{"max_epochs": 2, **options},
    )  # fmt: skip
    trainer.fit(module)
    return trainer


def stopping(checkpoint: Path, step: int) -> list[pl.Callback]:
    agreement = StopAgreement(None, 0, 1)
    return [
        Ask(agreement, step),
        GracefulStop(agreement, cast(Any, SimpleNamespace(install=list, progress=StopProgress())), checkpoint),
    ]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*pre-optimization state.*")
@pytest.mark.parametrize(
    ("options", "manual"),
    [
        ({}, False),
        ({"val_check_interval": 2}, True),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None, "accumulate_grad_batches": 3}, False),
        ({"limit_train_batches": 5, "accumulate_grad_batches": 2}, False),
        ({"limit_val_batches": 0}, True),
        ({"max_steps": 11}, False),
    ],
)
def test_checkpoint_of_a_stop_has_the_hooks_of_its_step_once(
    tmp_path: Path, options: dict[str, Any], manual: bool
) -> None:
    notes = Notes()
    complete = fit(tmp_path, Counting(manual=manual), [notes], **options)
    # Within an epoch, at the end of one, and at the last two steps.
    for step in {1, complete.global_step // 2 - 1, complete.global_step - 2, complete.global_step - 1}:
        calls, later = Calls(), Later()
        # Lightning moves a ModelCheckpoint behind the launcher's callbacks.
        user: list[pl.Callback] = [later, ModelCheckpoint(tmp_path / "user", every_n_train_steps=1, save_top_k=0)]
        path = tmp_path / f"{step}.ckpt"
        with contextlib.suppress(Interrupted):
            fit(tmp_path, Counting(manual=manual), [calls, *stopping(path, step), *user], **options)
        saved = load(path)
        assert saved["global_step"] in (step + 1, step + 2)
        assert saved["state_dict"] == notes.after[saved["global_step"]]
        counts = [saved["callbacks"][each.state_key]["count"] for each in (calls, later)]
        assert counts == [int(saved["state_dict"]["calls"])] * 2
        # For Lightning it is a checkpoint at the end of a batch: a resume does the rest of that end.
        progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert progress["completed"] == progress["processed"] - 1


class Raw(Counting):
    """Calls its optimizer without Lightning, which then counts no step; or has no optimizer."""

    def __init__(self, every: int, *, has_optimizer: bool = True) -> None:
        super().__init__(manual=True)
        self._every, self._has_optimizer = every, has_optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = self.layer(batch[0]).square().mean()
        if not self._has_optimizer:
            return
        optimizer = cast(Any, self.optimizers(use_pl_optimizer=False))
        self.manual_backward(loss)
        if (batch_idx + 1) % self._every == 0:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers() if self._has_optimizer else None


class AskInBatch(Ask):
    """Requests the stop in this batch."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == self._step:
            self._agreement.request(15)


@pytest.mark.parametrize(("every", "has_optimizer", "stops_after"), [(1, True, 4), (3, True, 6), (1, False, 4)])
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*configure_optimizers.*")
def test_stop_works_if_lightning_counts_no_steps(
    tmp_path: Path, every: int, has_optimizer: bool, stops_after: int
) -> None:
    path = tmp_path / "last.ckpt"
    stop = stopping(path, 0)[1]
    with pytest.raises(Interrupted):
        fit(tmp_path, Raw(every, has_optimizer=has_optimizer), [AskInBatch(cast(Any, stop)._agreement, 3), stop])
    content = load(path)
    assert content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == stops_after
    assert content["global_step"] == 0


@pytest.mark.parametrize(
    ("options", "first", "saved", "left"),
    [
        ({}, 3, [4], 4),
        ({}, 7, [8, 9], 9),
        ({"val_check_interval": 2}, 3, [4, 5], 5),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 8, [9, 10], 10),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 4, [5], 5),
        # A validation follows every step.
        ({"val_check_interval": 1}, 3, [4, 5], 5),
        ({"limit_train_batches": 1, "max_epochs": 9}, 3, [4, 5], 5),
        # At its last step the training ends by itself.
        ({}, 14, [15], 15),
        ({}, 15, [16], None),
        ({"max_steps": 6}, 5, [6], None),
        ({"val_check_interval": 1}, 14, [15, 16], None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_stop_before_a_validation_saves_at_once_and_leaves_after_the_next_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    first: int,
    saved: list[int],
    left: int | None,
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", lambda self, *_, **__: steps.append(self.global_step))

    def end() -> int | None:
        try:
            fit(tmp_path, Counting(), stopping(tmp_path / "last.ckpt", first), **options)
        except Interrupted as interruption:
            return interruption.step
        return None

    assert (end(), steps) == (left, saved)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*pre-optimization state.*")
@pytest.mark.parametrize("manual", [False, True])
def test_checkpoint_every_n_steps_has_the_modules_hook_of_its_step(tmp_path: Path, manual: bool) -> None:
    notes = Notes()
    keeper = CheckpointAfterBatch(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=3, monitor=None)
    fit(tmp_path, Counting(manual=manual), [notes, keeper])
    found: dict[int, dict[str, Any]] = {load(path)["global_step"]: load(path) for path in tmp_path.glob("step=*.ckpt")}
    assert sorted(found) == [3, 6, 9, 12, 15]
    for step, content in found.items():
        assert content["state_dict"] == notes.after[step]
