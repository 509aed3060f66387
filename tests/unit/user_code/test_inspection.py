"""Counting a model's parameters without allocating them, and importing a fixed file again."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from launcher.config.loading import load_values
from launcher.config.schema import RunConfig
from launcher.user_code.inspection import ModelCountError, class_problems, count_parameters, signature_of


class Huge(pl.LightningModule):
    """Four terabytes of parameters, half of them frozen."""

    def __init__(self, width: int = 1_000_000) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, width // 2, bias=False)
        self.second = torch.nn.Linear(width // 2, width, bias=False).requires_grad_(False)


class ReadsWeights(pl.LightningModule):
    """Cannot be created on the meta device, as it reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 2)
        self.start = float(self.net.weight.sum())


def config_of(name: str, **arguments: object) -> RunConfig:
    return load_values({"model": {"class_path": f"{__name__}.{name}", "init_args": arguments}})


def test_parameters_are_counted_without_their_memory() -> None:
    size = count_parameters(config_of("Huge"))
    assert (size.total, size.trainable) == (1_000_000_000_000, 500_000_000_000)
    assert str(size) == "1,000,000,000,000 parameters, 500,000,000,000 of them trainable"
    assert count_parameters(config_of("Huge", width=4)).total == 16


def test_error_of_a_constructor_is_reported_with_its_place() -> None:
    with pytest.raises(ModelCountError, match=r"ReadsWeights cannot be created on the meta device: .*line \d+"):
        count_parameters(config_of("ReadsWeights"))


def test_default_device_is_restored() -> None:
    with pytest.raises(ModelCountError):
        count_parameters(config_of("ReadsWeights"))
    assert torch.zeros(1).device.type == "cpu"


def test_signature_is_shown_as_written() -> None:
    assert signature_of(f"{__name__}.Huge") == "Huge(width: int = 1000000)"


def test_fixed_file_is_imported_again_and_a_library_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "being_written.py"
    file.write_text("import lightning.pytorch as pl\n")
    config = load_values({"model": {"class_path": "being_written.Net"}})
    (problem,) = class_problems(config, "model")
    assert "module being_written has no Net" in problem.message
    file.write_text("import lightning.pytorch as pl\nclass Net(pl.LightningModule):\n    pass\n# mended\n")
    assert class_problems(config, "model") == []

    module = torch.nn
    assert class_problems(load_values({"model": {"class_path": "torch.nn.NoSuch"}}), "model")
    import sys

    assert sys.modules["torch.nn"] is module
