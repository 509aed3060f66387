"""`strategies.fsdp_blocks`: which modules FSDP2 gathers one after another."""

from __future__ import annotations

import pytest
from torch import nn

from strategies.base import StrategyError
from strategies.fsdp_blocks import check_wrap, find_blocks
from tests.support.fsdp_models import Base, Block, Tied
from tests.support.model_families import SMALL


def names(model: nn.Module, wrap: tuple[str, ...] = ()) -> list[str]:
    found = {id(block): name for name, block in model.named_modules()}
    return [found[id(block)] for block in find_blocks(model, wrap)]


class Lists(nn.ModuleList):
    """A list with a class of its own."""


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = Block()
        self.first, self.second, self.third = block, block, Block()


def test_repeated_layers_with_children_are_the_blocks() -> None:
    assert names(Base()) == ["blocks.0", "blocks.1", "blocks.2"]


def test_layers_without_children_are_blocks_if_no_other_class_repeats() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    assert names(model) == ["0", "2"]


def test_modules_with_tied_weights_stay_in_the_root() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight = model[0].weight
    assert names(model) == ["1", "2"]
    assert names(Tied()) == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_module_that_occurs_twice_is_one_block() -> None:
    assert names(Reused()) == ["first", "third"]


@pytest.mark.parametrize("lists", [nn.ModuleList, Lists])
def test_lists_are_never_blocks(lists: type[nn.ModuleList]) -> None:
    model = nn.ModuleDict({name: lists([Block(), Block()]) for name in "ab"})
    assert names(model) == ["a.0", "a.1", "b.0", "b.1"]


def test_small_repeated_modules_are_not_worth_a_group() -> None:
    model = nn.ModuleList([nn.Linear(1000, 1000), *(nn.LayerNorm(8) for _ in range(4))])
    assert names(model) == []


def test_layers_that_attention_reads_without_calling_them_stay_in_the_root() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert names(nn.ModuleList([attention.out_proj, nn.MultiheadAttention(8, 2).out_proj])) == []


@pytest.mark.parametrize("name", SMALL)
def test_blocks_of_known_models_do_not_overlap_and_own_their_parameters(name: str) -> None:
    model = SMALL[name].make()
    owned = [id(p) for block in find_blocks(model) for p in block.parameters()]
    assert len(owned) == len(set(owned))


def test_wrap_takes_subclasses_and_nested_modules_in_the_order_of_the_model() -> None:
    class Special(Block): ...

    model = nn.Sequential(Block(), Special())
    assert names(model, ("Special",)) == ["1"]
    assert names(model, ("Block",)) == ["0", "1"]
    assert names(model, ("Block", "Linear")) == ["0", "0.up", "0.down", "1", "1.up", "1.down"]


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        ("Blok", "did you mean Block?"),
        ("Nothing", "its classes are Block, LayerNorm, Linear"),
        ("ModuleList", "whose modules are never called"),
        ("Linear", "shares a parameter with a module outside of it"),
    ],
)
def test_wrap_that_cannot_be_gathered_is_an_error_with_advice(wrap: str, message: str) -> None:
    with pytest.raises(StrategyError) as caught:
        check_wrap(Tied(), [wrap])
    assert message in str(caught.value)
    assert repr(wrap) in str(caught.value)


def test_wrap_of_the_models_own_classes_is_valid() -> None:
    check_wrap(Tied(), ["Block", "LayerNorm"])
    check_wrap(Tied(), [])
