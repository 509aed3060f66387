"""Plain objects with the Trainer attributes that the callback reads, and foreign scalers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class FixedScaler:
    """Always returns the same scale, which can be set."""

    def __init__(self, scale: Any) -> None:
        self.scale = scale

    def get_scale(self) -> Any:
        return self.scale


class RaisingScaler:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def get_scale(self) -> float:
        raise self.error


def plain_trainer(scaler: Any = None, *, step: int = 1, epoch: int | None = 0, **more: Any) -> Any:
    """`strategy.precision_plugin.scaler`, `current_epoch`, `global_step`, and other given attributes."""
    strategy = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    return SimpleNamespace(strategy=strategy, current_epoch=epoch, global_step=step, **more)


def deepspeed_trainer(optimizer: Any, *, fp16: Any = True, skipped: Any = 0) -> Any:
    """A strategy with a DeepSpeed engine, whose `loss_scale()` would be the configured one."""
    engine = SimpleNamespace(
        optimizer=optimizer, skipped_steps=skipped, fp16_enabled=lambda: fp16, loss_scale=lambda: 65536.0
    )
    return SimpleNamespace(
        strategy=SimpleNamespace(precision_plugin=SimpleNamespace(), deepspeed_engine=engine),
        current_epoch=0,
        global_step=1,
    )
