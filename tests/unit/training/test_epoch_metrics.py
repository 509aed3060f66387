"""A module's torchmetrics are restored by a resume: those of an epoch, those of all epochs, and wrappers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics as tm
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import wrappers
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision

from launcher.training.data.order import DataOrder, DataSplit
from launcher.training.loops.fit_loop import use_resumable_loops
from launcher.training.resume.epoch_metrics import EpochMetrics
from launcher.training.resume.random_states import RandomStates
from strategies.batch import BatchSplit

pytestmark = pytest.mark.filterwarnings("ignore")


class _Counts(tm.Metric):
    """A metric of the user with a counter outside of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.seen, self.largest, self.scale = 0, [], 2.0

    def update(self, values: torch.Tensor) -> None:
        self.total = self.total + values.sum()
        self.seen += 1
        self.largest = [*self.largest[-2:], values.max().detach()]

    def compute(self) -> torch.Tensor:
        return self.scale * self.total + self.seen + sum(self.largest)


class _Measured(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 3)
        many = tm.MetricCollection({"p": MulticlassPrecision(3), "f": MulticlassF1Score(3), "a": MulticlassAccuracy(3)})
        # Metrics in `all` are not reset; those in `each` are reset in each epoch.
        self.all = torch.nn.ModuleDict({
            "minmax": tm.MinMaxMetric(tm.MeanMetric()), "max": tm.MaxMetric(), "running": tm.RunningMean(window=3),
            "own": _Counts(), "cat": tm.CatMetric(),
            "boot": wrappers.BootStrapper(tm.MeanMetric(), num_bootstraps=3, sampling_strategy="multinomial"),
            "tracker": wrappers.MetricTracker(tm.MeanMetric(), maximize=True),
        })  # fmt: skip
        self.each = torch.nn.ModuleDict(
            {
                "many": many,
                "classes": wrappers.ClasswiseWrapper(MulticlassAccuracy(3, average=None)),
                "outputs": wrappers.MultioutputWrapper(tm.MeanSquaredError(), 3),
            }
        )
        self.logged, self.val_logged = tm.MeanMetric(), tm.SumMetric()
        self.found: dict[int, Any] = {}
        self.sums: list[float] = []

    def on_train_epoch_start(self) -> None:
        self.all["tracker"].increment()  # type: ignore[operator]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out, kind = self.net(batch[0]), batch[1]
        for name, metric in self.all.items():
            if name == "running":
                metric(out.mean(1).detach())
            else:
                metric.update(out.mean(1).detach())  # type: ignore[operator]
        self.all["minmax"].compute()  # type: ignore[operator]
        self.each["many"].update(out, kind)  # type: ignore[operator]
        self.each["classes"].update(out, kind)  # type: ignore[operator]
        self.each["outputs"].update(out, torch.zeros_like(out))  # type: ignore[operator]
        self.logged.update(out.mean(1).detach())
        self.log("logged", self.logged, on_epoch=True, on_step=False)
        return torch.nn.functional.cross_entropy(out, kind)

    def on_train_epoch_end(self) -> None:
        metrics = {**self.all, **self.each}
        self.found[self.current_epoch] = copy.deepcopy({n: m.compute() for n, m in metrics.items()})  # type: ignore[operator]
        for metric in self.each.values():
            metric.reset()  # type: ignore[operator]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_logged.update(batch[0].sum())
        self.log("val", self.val_logged)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.sums.append(float(self.val_logged.compute()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)

    def _data(self) -> Any:
        made = torch.Generator().manual_seed(3)
        inputs = torch.randn(8, 2, generator=made)
        return DataLoader(TensorDataset(inputs, torch.randint(0, 3, (8,), generator=made)), batch_size=2)

    train_dataloader = val_dataloader = _data


class _LeftError(Exception):
    pass


class _SavesAndLeaves(pl.Callback):
    """After a step, at the end of a validation, or after an epoch."""

    def __init__(self, at: int, hook: str, file: Path) -> None:
        self.at, self.hook, self.file = at, hook, file

    def _leave(self, trainer: pl.Trainer, hook: str) -> None:
        if hook == self.hook and trainer.global_step >= self.at and not trainer.sanity_checking:
            trainer.save_checkpoint(self.file)
            raise _LeftError

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._leave(trainer, "step")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave(trainer, "validation")


class _SavesAtTheEnd(pl.callbacks.ModelCheckpoint):
    """Lightning calls it after the module's own hook."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, _SavesAndLeaves):
                callback._leave(trainer, "epoch")


def _fit(folder: Path, leaves: tuple[int, str] | None, ckpt: Path | None) -> tuple[_Measured, Any, list[str]]:
    pl.seed_everything(1, verbose=False)
    module, notices = _Measured(), []
    file = folder / "left.ckpt"
    own = [] if leaves is None else [_SavesAndLeaves(*leaves, file)]
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        max_epochs=3, default_root_dir=folder, val_check_interval=2, num_sanity_val_steps=1,
        callbacks=[*own, _SavesAtTheEnd(folder, save_top_k=0), RandomStates(notices.append),
                   EpochMetrics(notices.append)],
    )  # fmt: skip
    order = DataOrder(DataSplit(BatchSplit(1, None, 1), rank=0, seed=1), notices.append)
    use_resumable_loops(trainer, order)
    trainer.fit(module, ckpt_path=ckpt, weights_only=True)
    return module, dict(trainer.callback_metrics), notices


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[_Measured, Any]:
    """The module after a training without an end in between, and its logged metrics."""
    module, logged, _ = _fit(tmp_path_factory.mktemp("uninterrupted"), None, None)
    return module, logged


@pytest.mark.parametrize(
    "leaves", [(3, "step"), (4, "step"), (5, "step"), (2, "validation"), (6, "validation"), (4, "epoch"), (8, "epoch")]
)
def test_metrics_continue_after_a_resume(
    tmp_path: Path, leaves: tuple[int, str], uninterrupted: tuple[_Measured, Any]
) -> None:
    complete, logged = uninterrupted
    with pytest.raises(_LeftError):
        _fit(tmp_path, leaves, None)
    resumed, again, notices = _fit(tmp_path, None, tmp_path / "left.ckpt")
    assert max(resumed.found) == 2
    for epoch, values in resumed.found.items():
        for name, value in values.items():
            torch.testing.assert_close(value, complete.found[epoch][name], rtol=0, atol=0, msg=f"{epoch}: {name}")
    assert resumed.sums == complete.sums[-len(resumed.sums) :]
    torch.testing.assert_close(again, logged, rtol=0, atol=0)
    assert resumed.all["tracker"].n_steps == 3
    assert notices == []


def test_settings_of_metrics_are_not_restored(tmp_path: Path) -> None:
    """Attributes that the training has not changed are not restored."""
    with pytest.raises(_LeftError):
        _fit(tmp_path, (3, "step"), None)
    saved = torch.load(tmp_path / "left.ckpt", weights_only=True)["launcher_epoch_metrics"][0]["own"]
    assert {*saved["all.own"]["more"]} == {"seen", "largest"}
    assert {*saved["all.minmax"]["more"]} == {"min_val", "max_val"}
    assert saved["all.running"]["more"] == {"_num_vals_seen": 3}
