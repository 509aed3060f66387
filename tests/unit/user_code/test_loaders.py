"""A config whose classes have no data loader is an error before anything starts; every way to give one is accepted."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest

from launcher.config.validation import parse_config
from launcher.core.errors import ConfigError, Problem
from launcher.user_code.classes import import_classes, inspect_classes
from launcher.user_code.loaders import check_loader


class Bare(pl.LightningModule):
    pass


class Own(Bare):
    def train_dataloader(self) -> Any:
        return []


class Inherited(Own):
    pass


class Mixin:
    def train_dataloader(self) -> Any:
        return []


class Mixed(Mixin, Bare):
    pass


class SetInInit(Bare):
    def __init__(self, lr: float = 0.1, jit: bool = False, *, name="x", flag=False) -> None:
        super().__init__()
        self.train_dataloader = list


class SetInSetup(Bare):
    def setup(self, stage: str) -> None:
        setattr(self, "train_dataloader", list)  # noqa: B010


class SetInNestedFunction(Bare):
    def on_fit_start(self) -> None:
        def attach() -> None:
            self.train_dataloader = list

        attach()


class BareData(pl.LightningDataModule):
    pass


class Data(BareData):
    def train_dataloader(self) -> Any:
        return []


class Attach(pl.Callback):
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.train_dataloader = list


def check(model: type, data: type | None = None, loader: str = "train_dataloader", **trainer: Any) -> None:
    def spec(cls: type | None) -> dict[str, Any] | None:
        return None if cls is None else {"class_path": f"{__name__}.{cls.__name__}"}

    config = parse_config({"model": spec(model), "data": spec(data), "trainer": trainer})
    check_loader(config, import_classes(config), loader)


@pytest.mark.parametrize("model", [Own, Inherited, Mixed, SetInInit, SetInSetup, SetInNestedFunction])
def test_a_model_with_its_own_loader_needs_no_data(model: type) -> None:
    check(model)


def test_data_or_a_callback_may_have_the_loader() -> None:
    check(Bare, Data)
    check(Own, BareData)
    check(Bare, callbacks=[{"class_path": f"{__name__}.Attach"}])


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"])
def test_a_missing_loader_is_reported(loader: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(Bare, loader=loader)
    message = f"not given, and Bare has no {loader}; give --data my_pkg.MyData, or add this method to the model"
    assert caught.value.problems == (Problem("data", message),)
    with pytest.raises(ConfigError) as caught:
        check(Bare, BareData, loader=loader)
    assert caught.value.problems == (Problem("data", f"BareData has no {loader}; add this method to it"),)


def test_the_arguments_of_classes_are_found_and_which_of_them_are_flags() -> None:
    config = parse_config({"model": {"class_path": f"{__name__}.SetInInit", "init_args": {"lrr": 1}}})
    found = inspect_classes(config)
    assert [problem.path for problem in found.problems] == ["model.init_args.lrr"]
    assert found.flags == {"model.init_args.lr": False, "model.init_args.jit": True,
                           "model.init_args.name": False, "model.init_args.flag": True}  # fmt: skip
