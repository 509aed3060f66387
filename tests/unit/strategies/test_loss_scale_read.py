"""`strategies.loss_scale`: reading the scale of any scaler."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strategies.loss_scale import LossScaleError, find_loss_scale, read_loss_scale
from tests.support.plain_trainer import FixedScaler, RaisingScaler, plain_trainer
from tests.unit.strategies.test_loss_scale import BIG, SMALL, counting, step


def test_torch_scaler_is_read_before_and_after_the_first_step() -> None:
    plain = torch.amp.GradScaler("cpu", 1024.0)
    for tracker in (None, 0):
        sample = read_loss_scale(plain_trainer(plain))
        assert sample is not None
        assert (sample.scale, sample.dynamic, sample.source) == (512.0 if tracker == 0 else 1024.0, True, "torch")
        assert (sample.skipped_steps, sample.growth_tracker, sample.floor_steps) == (None, tracker, None)
        step(plain, BIG)


def test_counting_scaler_is_read_with_counts() -> None:
    scaler = counting(init_scale=2.0)
    sample = read_loss_scale(plain_trainer(scaler))
    assert sample is not None
    assert (sample.scale, sample.skipped_steps, sample.growth_tracker, sample.floor_steps) == (2.0, 0, 0, 0)
    step(scaler, math.inf)
    step(scaler, SMALL)
    sample = read_loss_scale(plain_trainer(scaler))
    assert sample is not None
    assert (sample.scale, sample.skipped_steps, sample.growth_tracker, sample.floor_steps) == (1.0, 1, 1, 2)
    assert (sample.dynamic, sample.source) == (True, "torch")
    assert {type(n) for n in (sample.skipped_steps, sample.growth_tracker, sample.floor_steps)} == {int}


def test_find_loss_scale_does_not_copy_from_the_device() -> None:
    scaler, plain = counting(), torch.amp.GradScaler("cpu", 1024.0)
    for each in (scaler, plain):
        step(each, BIG)
    live, of_plain = (find_loss_scale(plain_trainer(each)) for each in (scaler, plain))
    assert live is not None
    assert of_plain is not None
    for value in (live.scale, live.skipped_steps, live.growth_tracker, live.floor_steps):
        assert isinstance(value, torch.Tensor)
    assert isinstance(of_plain.scale, torch.Tensor)
    assert isinstance(of_plain.growth_tracker, torch.Tensor)


def test_counts_are_created_on_the_device_of_the_scale() -> None:
    counts = counting()._on_device(torch.device("meta"))
    assert {count.device.type for count in counts.values()} == {"meta"}


@pytest.mark.case(15)
@pytest.mark.case(16)
@pytest.mark.parametrize(
    "trainer",
    [object(), SimpleNamespace(strategy=None), SimpleNamespace(strategy=SimpleNamespace()),
     SimpleNamespace(strategy=SimpleNamespace(precision_plugin=SimpleNamespace())), plain_trainer(None),
     plain_trainer(torch.amp.GradScaler("cpu", enabled=False))],
)  # fmt: skip
def test_no_scaler_means_no_scale(trainer: Any) -> None:
    assert find_loss_scale(trainer) is None
    assert read_loss_scale(trainer) is None


@pytest.mark.parametrize("value", [0, 0.0, 8, 65536.0, math.inf, torch.tensor(8.0), torch.tensor([8.0])])
def test_get_scale_of_another_scaler_is_used(value: Any) -> None:
    sample = read_loss_scale(plain_trainer(FixedScaler(value)))
    assert sample is not None
    assert (sample.scale, sample.source, type(sample.scale)) == (float(value), "other", float)
    assert sample.dynamic is True


@pytest.mark.case(14)
@pytest.mark.parametrize("kind", [RuntimeError, ValueError, AttributeError, TypeError, KeyError])
def test_error_of_a_scaler_is_reported_with_its_cause(kind: type[Exception]) -> None:
    with pytest.raises(
        LossScaleError, match=rf"RaisingScaler.get_scale\(\) raised {kind.__name__}: .*broken"
    ) as caught:
        read_loss_scale(plain_trainer(RaisingScaler(kind("broken"))))
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.case(14)
@pytest.mark.parametrize("value", ["65536", None, True, [1.0], {}, torch.tensor([1.0, 2.0])])
def test_scaler_without_a_numeric_scale_is_an_error(value: Any) -> None:
    with pytest.raises(LossScaleError, match=r"FixedScaler.get_scale\(\) is .*, not a number"):
        find_loss_scale(plain_trainer(FixedScaler(value)))


@pytest.mark.case(14)
def test_scaler_without_get_scale_is_an_error() -> None:
    with pytest.raises(LossScaleError, match="AttributeError"):
        find_loss_scale(plain_trainer(object()))


@pytest.mark.case(14)
@pytest.mark.parametrize("name", ["strategy", "precision_plugin", "scaler"])
def test_error_of_a_property_before_the_scaler_is_reported(name: str) -> None:
    def get(self: Any) -> Any:
        raise RuntimeError("not set up")

    owner: Any = type("Owner", (), {name: property(get)})()
    if name != "strategy":
        owner = owner if name == "precision_plugin" else SimpleNamespace(precision_plugin=owner)
        owner = SimpleNamespace(strategy=owner)
    with pytest.raises(LossScaleError, match="RuntimeError: not set up"):
        find_loss_scale(owner)
