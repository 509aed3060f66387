"""`launcher.monitoring.buffers`: running statistics that hold NaN or infinity, in real fp16 steps on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from launcher.core.events import EventLog
from launcher.monitoring.buffers import BufferMonitor, find_non_finite_buffers
from launcher.monitoring.health import Alert
from strategies.loss_scale import CountingGradScaler


class _Average(nn.Module):
    """User-defined statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().float().mean(0)
        return x - self.mean


class _Net(pl.LightningModule):
    """One batch of large numbers, then normal ones."""

    def __init__(self, norm: nn.Module, bad_step: int | None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 1))
        self.register_buffer("mask", torch.full((3,), float("-inf")))
        self.bad_step = bad_step

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0] * (1e30 if batch_idx == self.bad_step else 1)).float().pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def _fit(model: _Net, folder: Path, scaler: torch.amp.GradScaler | None = None) -> tuple[list[Any], list[str]]:
    alerts: list[tuple[int, Alert]] = []
    notices: list[str] = []

    class SaveAtEnd(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for name in ("one", "two"):
                trainer.save_checkpoint(folder / name)

    watch = BufferMonitor(lambda alert, step: alerts.append((step, alert)), EventLog(folder / "e", 0), notices.append)
    trainer = pl.Trainer(
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler or CountingGradScaler("cpu", init_scale=8.0))],
        callbacks=[watch, SaveAtEnd()],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=4))
    return alerts, notices


@pytest.mark.parametrize(
    ("norm", "names"),
    [
        (nn.BatchNorm1d(8), "net.1.running_mean, net.1.running_var"),
        (nn.BatchNorm1d(8, track_running_stats=False), None),
        (nn.LayerNorm(8), None),
        (_Average(), "net.1.mean"),
        (nn.Sequential(nn.BatchNorm1d(8), _Average()), "net.1.0.running_mean, net.1.0.running_var, net.1.1.mean"),
    ],
    ids=["batch norm", "of the batch alone", "layer norm", "own", "both"],
)
def test_broken_buffers_after_a_skipped_step_raise_one_alert(
    norm: nn.Module, names: str | None, tmp_path: Path
) -> None:
    model = _Net(norm, bad_step=2)
    alerts, notices = _fit(model, tmp_path)
    if names is None:
        assert (alerts, notices) == ([], [])
        return
    ((step, alert),) = alerts
    assert (step, alert.kind, alert.ranks) == (3, "buffers_not_finite", (0,))
    assert alert.text.startswith(f"{names} hold NaN or infinity on rank 0 after a skipped step; ")
    # Two checkpoints, one notice.
    (notice,) = notices
    assert notice.startswith(f"the checkpoint of step 6 holds NaN or infinity in {names}: ")


def test_a_mask_of_infinities_and_a_healthy_run_raise_no_alert(tmp_path: Path) -> None:
    model = _Net(nn.BatchNorm1d(8), bad_step=None)
    assert _fit(model, tmp_path) == ([], [])
    assert find_non_finite_buffers(model) == ["mask"]


def test_with_a_scaler_that_counts_nothing_the_checkpoint_is_checked(tmp_path: Path) -> None:
    model = _Net(nn.BatchNorm1d(8), bad_step=2)
    alerts, notices = _fit(model, tmp_path, torch.amp.GradScaler("cpu", init_scale=8.0))
    assert alerts == []
    assert "net.1.running_mean" in notices[0]


def test_a_broken_batch_norm_of_a_checkpoint_is_reported(tmp_path: Path) -> None:
    model = _Net(nn.BatchNorm1d(8), bad_step=None)
    model.net[1].running_var.fill_(float("nan"))  # type: ignore[union-attr]
    _, notices = _fit(model, tmp_path)
    assert "net.1.running_var" in notices[0]
