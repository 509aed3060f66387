"""`strategies.loss_scale` on DeepSpeed's engine: its live scale, not the configured one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from strategies.loss_scale import LossScaleError, LossScaleSample, find_loss_scale, read_loss_scale
from tests.support.plain_trainer import deepspeed_trainer


class ZeroOptimizer:
    """As in ZeRO: the optimizer has a scaler with the scale (deepspeed/runtime/zero/stage_1_and_2.py)."""

    def __init__(self, scale: Any, dynamic: Any = True) -> None:
        self.loss_scaler = SimpleNamespace(cur_scale=scale, dynamic=dynamic)


class FusedOptimizer:
    """As FP16_Optimizer: the optimizer has the scale (deepspeed/runtime/fp16/fused_optimizer.py)."""

    def __init__(self, scale: Any, dynamic: Any = True) -> None:
        self.loss_scale_config = SimpleNamespace(cur_scale=1.0, dynamic_loss_scale=dynamic)
        self.cur_scale = scale


@pytest.mark.parametrize("make", [ZeroOptimizer, FusedOptimizer])
@pytest.mark.parametrize("dynamic", [True, False])
def test_live_scale_and_skipped_steps_are_read(make: Any, dynamic: bool) -> None:
    trainer = deepspeed_trainer(make(16384, dynamic), skipped=2)
    assert read_loss_scale(trainer) == LossScaleSample(16384.0, dynamic, "deepspeed", 2)


def test_scale_without_dynamic_attribute_is_static() -> None:
    optimizer = SimpleNamespace(cur_scale=128.0)
    assert read_loss_scale(deepspeed_trainer(optimizer)) == LossScaleSample(128.0, False, "deepspeed", 0)


def test_fp16_enabled_may_be_an_attribute() -> None:
    trainer = deepspeed_trainer(FusedOptimizer(8.0))
    trainer.strategy.deepspeed_engine.fp16_enabled = True
    assert find_loss_scale(trainer) is not None
    trainer.strategy.deepspeed_engine.fp16_enabled = False
    assert find_loss_scale(trainer) is None


@pytest.mark.parametrize(
    "trainer",
    [
        deepspeed_trainer(FusedOptimizer(8.0), fp16=False),
        deepspeed_trainer(None),
        deepspeed_trainer(SimpleNamespace()),
        SimpleNamespace(strategy=SimpleNamespace(deepspeed_engine=None)),
    ],
    ids=["bf16", "no optimizer", "no scale", "not set up"],
)
def test_engine_without_loss_scale_gives_none(trainer: Any) -> None:
    assert read_loss_scale(trainer) is None


@pytest.mark.parametrize("skipped", [None, "2"])
def test_invalid_skipped_steps_are_not_counted(skipped: Any) -> None:
    sample = read_loss_scale(deepspeed_trainer(FusedOptimizer(8.0), skipped=skipped))
    assert sample is not None
    assert sample.skipped_steps is None


def test_engine_without_an_attribute_is_no_error() -> None:
    trainer = deepspeed_trainer(FusedOptimizer(8.0))
    del trainer.strategy.deepspeed_engine.skipped_steps
    assert read_loss_scale(trainer) == LossScaleSample(8.0, True, "deepspeed", None)
    del trainer.strategy.deepspeed_engine.fp16_enabled
    assert read_loss_scale(trainer) is None


@pytest.mark.case(14)
@pytest.mark.parametrize("scale", ["16384", [1.0], True])
def test_scale_that_is_not_a_number_is_an_error(scale: Any) -> None:
    with pytest.raises(LossScaleError, match=r"DeepSpeed's cur_scale is .*, not a number"):
        find_loss_scale(deepspeed_trainer(FusedOptimizer(scale)))


@pytest.mark.case(14)
def test_error_of_the_engine_is_reported() -> None:
    trainer = deepspeed_trainer(FusedOptimizer(8.0))

    def broken() -> bool:
        raise RuntimeError("no config")

    trainer.strategy.deepspeed_engine.fp16_enabled = broken
    with pytest.raises(LossScaleError, match="RuntimeError: no config"):
        find_loss_scale(trainer)
