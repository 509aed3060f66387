"""`strategies.block_checkpoints`: blocks whose activations are computed again in the backward pass."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from strategies.block_checkpoints import checkpoint_blocks
from tests.support.fsdp_models import WIDTH, Base, Block


class Counting(Block):
    """Counts its forward passes."""

    runs = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        type(self).runs += 1
        return super().forward(x) * scale


def blocks(kind: type[nn.Module] = Block, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), kind(**options), kind(**options))


def gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    model(torch.ones(3, WIDTH)).pow(2).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_each_block_runs_again_once_and_gives_the_same_gradients_with_dropout() -> None:
    expected = gradients(blocks(Counting, dropout=0.5))
    model = blocks(Counting, dropout=0.5)
    assert [type(block) for block in checkpoint_blocks(model)] == [Counting, Counting]
    checkpoint_blocks(model)  # once is enough
    Counting.runs = 0
    assert all(map(torch.equal, gradients(model), expected))
    assert Counting.runs == 4


def test_names_stay_and_the_model_can_be_copied_and_pickled() -> None:
    model = blocks()
    checkpoint_blocks(model)
    assert list(model.state_dict()) == list(blocks().state_dict())
    expected = gradients(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 -- our own
        model[1].down.weight.data.zero_()  # type: ignore[union-attr]
        assert all(map(torch.equal, gradients(copied), expected)), "it has its own weights"


def test_arguments_by_name_reach_the_block() -> None:
    block = Counting()
    model = nn.ModuleList([block, Counting()])
    x = torch.ones(2, WIDTH)
    expected = block(x, scale=3.0)
    checkpoint_blocks(model)
    assert torch.equal(block(x, scale=3.0), expected)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def test_statistics_are_updated_once_in_a_step() -> None:
    states: list[dict[str, Tensor]] = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Part(), Part())
        assert not is_checkpointed or len(checkpoint_blocks(model)) == 2
        for _ in range(3):
            model(torch.randn(5, 4)).pow(2).sum().backward()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_layers_without_children_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert checkpoint_blocks(model) == []
    assert checkpoint_blocks(Base(), ["Linear"]) != []
