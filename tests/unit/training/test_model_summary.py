"""The short summary of a model: its lines fit the terminal, and a restart does not repeat it."""

from __future__ import annotations

import io
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from launcher.training.callbacks.model_summary import ShortModelSummary, describe_parameters


class Wide(pl.LightningModule):
    def __init__(self, modules: int, has_example: bool = False) -> None:
        super().__init__()
        self.example_input_array = torch.ones(2, 8) if has_example else None
        for index in range(modules):
            self.add_module(f"encoder_of_the_part_with_number_{index}", torch.nn.Linear(8, 8))

    def training_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([*self.parameters(), torch.nn.Parameter(torch.ones(1))], lr=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            x = module(x)
        return x


def printed(model: pl.LightningModule, width: int = 80) -> list[str]:
    screen = io.StringIO()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=0, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                         callbacks=[ShortModelSummary(Console(file=screen, width=width))])  # fmt: skip
    trainer.fit(model, DataLoader([torch.ones(8)]))
    return [line.rstrip() for line in screen.getvalue().splitlines()]


def test_a_model_has_one_line_and_one_for_each_module() -> None:
    assert printed(Wide(2)) == [
        "Model Wide: 144 parameters (576 B), all trained",
        "  encoder_of_the_part_with_number_0  Linear  72",
        "  encoder_of_the_part_with_number_1  Linear  72",
    ]


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start")
@pytest.mark.parametrize("width", [40, 60, 80, 100_000])
@pytest.mark.parametrize("has_example", [False, True])
@pytest.mark.parametrize("modules", [1, 12, 13, 40])
def test_no_line_is_cut_or_longer_than_the_terminal(width: int, has_example: bool, modules: int) -> None:
    lines = printed(Wide(modules, has_example), width)
    assert max(len(line) for line in lines[1:]) <= width
    assert "…" not in "".join(lines)
    has_sizes = has_example and width > 60
    assert any("in sizes" in line and "out sizes" in line for line in lines) == has_sizes
    assert sum(" 72" in line for line in lines[1:]) == min(modules, 12)
    assert (lines[-1] == f"  and {modules - 12} more modules") == (modules > 12)
    assert "FLOPs" not in "".join(lines)


def test_frozen_modules_and_those_in_eval_mode_are_marked() -> None:
    model = Wide(2)
    list(model.children())[1].eval().requires_grad_(False)
    lines = printed(model)
    assert lines[0] == "Model Wide: 144 parameters (576 B), 72 of them trained"
    assert [line.endswith("in eval mode") for line in lines] == [False, False, True]
    assert describe_parameters("Net", 0, 7_500_000_000, "28 GiB") == (
        "Model Net: 7.5 B parameters (28 GiB), none trained"
    )


def test_a_model_without_modules_has_one_line() -> None:
    assert printed(Wide(0)) == ["Model Wide: 0 parameters (0 B), all trained"]
