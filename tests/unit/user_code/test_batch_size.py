"""Where the user's objects keep their micro batch size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest

from launcher.config.schema import RunConfig
from launcher.training.run import _user_objects
from launcher.user_code.objects import Loaders, UserObjects


class _InHparams:
    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()  # type: ignore[attr-defined]

    def size(self: Any) -> int:
        return self.hparams.batch_size


class _InAttribute:
    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def size(self) -> int:
        return self.batch_size


class _InBoth(_InHparams):
    def __init__(self, batch_size: int = 16) -> None:
        super().__init__(batch_size)
        self.batch_size = batch_size

    def size(self: Any) -> int:
        assert self.batch_size == self.hparams.batch_size
        return self.batch_size


class _InProperty(_InHparams):
    @property
    def batch_size(self: Any) -> int:
        return self.hparams.batch_size


@pytest.mark.parametrize("base", [pl.LightningDataModule, pl.LightningModule])
@pytest.mark.parametrize("kind", [_InHparams, _InAttribute, _InBoth, _InProperty])
def test_the_batch_size_of_an_object_is_found_and_set(kind: type[Any], base: type[Any]) -> None:
    owner: Any = type("Owner", (kind, base), {})()
    is_data = base is pl.LightningDataModule
    objects = UserObjects(pl.LightningModule(), owner) if is_data else UserObjects(owner)
    assert objects.traits()["batch_size"] == 16
    objects.use_batch_size(8)
    assert owner.size() == 8
    assert objects.traits()["batch_size"] == 8


def test_an_object_without_a_batch_size_is_not_changed() -> None:
    for objects in (UserObjects(pl.LightningModule()), UserObjects(pl.LightningModule(), pl.LightningDataModule())):
        owner = objects.data or objects.model
        objects.use_batch_size(8)
        assert objects.traits()["batch_size"] is None
        assert not hasattr(owner, "batch_size")
        assert not owner.hparams


def test_the_batch_size_of_given_loaders_is_theirs() -> None:
    objects = UserObjects(pl.LightningModule(), Loaders(type("Loader", (), {"batch_size": 4})()))
    objects.use_batch_size(8)
    assert objects.traits()["batch_size"] == 4


@pytest.mark.parametrize(("global_batch_size", "expected"), [(16, 8), (None, 16)])
def test_a_run_of_given_objects_sets_the_planned_size(global_batch_size: int | None, expected: int) -> None:
    owner: Any = type("Owner", (_InHparams, pl.LightningDataModule), {})()
    batch = SimpleNamespace(micro_batch_size=8)
    plan = SimpleNamespace(batch=batch, strategy=SimpleNamespace(name="ddp"))
    run: Any = SimpleNamespace(given=UserObjects(pl.LightningModule(), owner), plan=plan,
                               config=RunConfig(global_batch_size=global_batch_size),
                               output=SimpleNamespace(notice=pytest.fail))  # fmt: skip
    assert _user_objects(run).data is owner
    assert owner.size() == expected
