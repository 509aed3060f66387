"""The time of a training by kind, with a clock that only the user's code moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from launcher.core.errors import Interrupted
from launcher.core.events import EventLog, read_events
from launcher.training.callbacks.events import EventWriter
from launcher.training.callbacks.time_account import TimeAccount


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _Samples(Dataset[Tensor]):
    def __init__(self, clock: _Clock, cost: float) -> None:
        self.clock, self.cost = clock, cost

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        self.clock.now += self.cost
        return torch.ones(1)


class _Module(pl.LightningModule):
    """Each hook costs another power of ten, so that no sum can be taken for another."""

    def __init__(self, clock: _Clock, *, automatic: bool) -> None:
        super().__init__()
        self.clock = clock
        self.automatic_optimization = automatic
        self.layer = torch.nn.Linear(1, 1)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.clock.now += 1.0
        loss = self.layer(batch).sum()
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.clock.now += 0.1

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.clock.now += 0.001

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock.now += 100.0

    @override
    def on_validation_epoch_end(self) -> None:
        self.clock.now += 0.01

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class _Account(pl.Callback):
    def __init__(self, account: TimeAccount) -> None:
        self.account = account
        self.spent: dict[str, float] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.account.start(trainer)

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self.account.batch_begins()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.spent = self.account.read()
        self.account.stop()


@pytest.mark.parametrize("automatic", [True, False])
def test_each_second_is_of_the_kind_that_it_was_spent_on(tmp_path: Path, automatic: bool) -> None:
    clock = _Clock()
    callback = _Account(TimeAccount(clock))
    # The checkpoint is saved within a validation.
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, callbacks=[callback, saver], logger=False,
                         enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)  # fmt: skip
    train, val = (DataLoader(_Samples(clock, cost), batch_size=2) for cost in (0.5, 0.0))
    trainer.fit(_Module(clock, automatic=automatic), train, val)

    assert callback.spent == pytest.approx({
        "step": 8 * 1.0, "data": 16 * 0.5, "validation": 2 * (4 * 0.1 + 0.01), "checkpoint": 2 * 100.0
    })  # fmt: skip
    assert clock.now - sum(callback.spent.values()) == pytest.approx(8 * 0.001), "the rest was spent in hooks"
    loop = trainer.fit_loop.epoch_loop
    owners = (trainer, loop, loop.val_loop, loop.automatic_optimization, loop.manual_optimization)
    names = ("save_checkpoint", "advance", "run", "_on_before_fetch", "_on_after_fetch")
    assert not any(name in vars(owner) for owner in owners for name in names), "the Trainer is as before"


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_fetches_its_batches_itself_waits_for_data_only_while_it_fetches() -> None:
    clock = _Clock()
    callback = _Account(TimeAccount(clock))

    class Fetches(_Module):
        def training_step(self, dataloader_iter: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            batch, index, _ = next(dataloader_iter)
            return super().training_step(batch, index)

    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], logger=False, limit_val_batches=0,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    data = DataLoader(_Samples(clock, 0.5), batch_size=2)
    trainer.fit(Fetches(clock, automatic=True), data, data)
    assert (callback.spent["step"], callback.spent["data"]) == (pytest.approx(4), pytest.approx(4))


def test_a_wrapper_of_the_user_stays() -> None:
    account, trainer = TimeAccount(), pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)

    def own(*_: Any, **__: Any) -> None:
        """The user's."""

    vars(trainer)["save_checkpoint"] = own
    account.start(trainer)
    account.start(trainer)
    assert trainer.save_checkpoint is not own
    account.stop()
    assert trainer.save_checkpoint is own


@pytest.mark.parametrize(("error", "is_known"), [(Interrupted(15, checkpoint=None, step=3), True), (KeyError(), False)])
def test_only_a_stop_has_the_time_up_to_the_exception(tmp_path: Path, error: BaseException, is_known: bool) -> None:
    class Stops(_Module):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if self.global_step == 3:
                raise error
            return super().training_step(batch, batch_idx)

    file, clock = tmp_path / "events.jsonl", _Clock()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[EventWriter(EventLog(file, 0))], logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    data = DataLoader(_Samples(clock, 0.0), batch_size=2)
    with pytest.raises(type(error)):
        trainer.fit(Stops(clock, automatic=True), data, data)
    events = list(read_events(file))
    assert next(event["kind"] for event in events if "spent" in event) == "first_step"
    assert any(event["kind"] == "time_spent" for event in events) is is_known
    assert "advance" not in vars(trainer.fit_loop.epoch_loop)
