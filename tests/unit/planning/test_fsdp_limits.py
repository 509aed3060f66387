"""Ranks, callbacks and models that FSDP2 does not work with: an error before the ranks train, or no candidate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn

from launcher.agreement.facts import Agreement, RankFacts
from launcher.config.loading import load_values
from launcher.config.presets import preset_values
from launcher.config.schema import FsdpOptions, RunConfig
from launcher.core.errors import PlanError
from launcher.planning.fit_plan import check_blocks, check_model
from launcher.planning.fsdp_limits import find_block_problem, fsdp_obstacles
from launcher.planning.plan import Plan, make_plan
from launcher.user_code.objects import UserObjects
from strategies.fsdp import FullyShard
from strategies.registry import list_candidates, list_strategies
from tests.support.rank_threads import CPU, H100, facts
from tests.support.toy import Toy

NAMES = [entry.name for entry in list_strategies() if isinstance(entry, FullyShard)]
SWA = StochasticWeightAveraging(swa_lrs=0.1)
PRUNING = ModelPruning("l1_unstructured", amount=0.1)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Flat(pl.LightningModule):
    """A model without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)


class Layers(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))


def ranks_of(sizes: Sequence[int], **traits: Any) -> Agreement:
    """Ranks on nodes of these sizes."""
    places = [(node, local, size) for node, size in enumerate(sizes) for local in range(size)]
    return Agreement(tuple(
        dataclasses.replace(facts(rank, H100), node_rank=node, local_rank=local, local_world_size=size,
                            host=f"node{node}", traits=traits)
        for rank, (node, local, size) in enumerate(places)
    ))  # fmt: skip


def planned(agreement: Agreement, name: str, **settings: Any) -> Plan:
    return make_plan(RunConfig(strategy=name, **settings), agreement)


@pytest.mark.parametrize(("preset", "nodes", "strategy"), [("fsdp2-node", 1, "fsdp2"), ("hsdp-multi-node", 2, "hsdp")])
def test_a_preset_has_a_plan_on_its_machines(preset: str, nodes: int, strategy: str) -> None:
    plan = make_plan(load_values({**preset_values(preset), "model": {"class_path": "a.B"}}), ranks_of([8] * nodes))
    assert (plan.strategy.name, plan.precision, plan.world_size) == (strategy, "bf16-mixed", 8 * nodes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "callback", [WeightAveraging(), EMAWeightAveraging(), SWA, PRUNING], ids=lambda c: type(c).__name__
)
def test_a_callback_that_needs_whole_parameters_is_an_error(name: str, callback: pl.Callback) -> None:
    traits = UserObjects(Toy(), callbacks=[EarlyStopping("loss"), callback]).traits()
    expected = f"the callback {type(callback).__name__} needs whole parameters, but FSDP2 shards them; remove it, or"
    with pytest.raises(PlanError, match=expected):
        planned(ranks_of([2], **traits), name)
    assert planned(ranks_of([2], **traits), "ddp").strategy.name == "ddp"
    assert planned(ranks_of([2]), name).strategy.name == name


def test_such_a_callback_rules_the_candidates_out() -> None:
    traits = UserObjects(Toy(), callbacks=[SWA]).traits()
    names = {each.name for each in list_candidates() if isinstance(each, FullyShard)}
    assert {*fsdp_obstacles(RunConfig(), ranks_of([2], **traits))} == names
    assert fsdp_obstacles(RunConfig(), ranks_of([2])) == {}


@pytest.mark.parametrize(
    ("sizes", "shard_ranks", "problem"),
    [
        ([2, 2], None, None),
        ([2, 3], None, "the nodes have 2 and 3 ranks; start as many on each node, set `fsdp.shard_ranks`, or use"),
        ([1, 2, 4], None, "the nodes have 1, 2 and 4 ranks"),
        ([2, 4], 3, None),
        ([2, 2], 3, "fsdp.shard_ranks: given 3, which does not divide the number of ranks, 4"),
        ([2, 2], 4, None),
    ],
)
def test_hybrid_sharding_needs_equal_groups_of_ranks(
    sizes: list[int], shard_ranks: int | None, problem: str | None
) -> None:
    options = FsdpOptions(shard_ranks=shard_ranks)
    if problem is None:
        assert planned(ranks_of(sizes), "hsdp", fsdp=options).strategy.name == "hsdp"
    else:
        with pytest.raises(PlanError, match=problem):
            planned(ranks_of(sizes), "hsdp", fsdp=options)
    assert planned(ranks_of(sizes), "fsdp2").strategy.name == "fsdp2"


@pytest.mark.parametrize("strategy", ["auto", *NAMES])
def test_a_block_class_that_the_model_lacks_is_an_error(strategy: str) -> None:
    config = RunConfig(strategy=strategy, fsdp=FsdpOptions(wrap=["Layr"]))
    assert "did you mean Layer?" in (find_block_problem(Layers(), config, strategy) or "")
    plan = planned(ranks_of([2]), NAMES[0])
    with pytest.raises(PlanError, match=r"fsdp\.wrap has 'Layr'.*did you mean Layer"):
        check_blocks(config, plan, given=UserObjects(Layers()))
    check_blocks(RunConfig(strategy=strategy, fsdp=FsdpOptions(wrap=["Layer"])), plan, given=UserObjects(Layers()))
    check_blocks(RunConfig(strategy="ddp"), plan, given=UserObjects(Layers()))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"fsdp": FsdpOptions(compile=True)}, "fsdp.compile"),
        ({"activation_checkpointing": True, "fsdp": FsdpOptions(compile=True)},
         "activation_checkpointing and fsdp.compile"),
    ],
)  # fmt: skip
def test_settings_of_blocks_need_a_model_with_blocks(settings: dict[str, Any], named: str) -> None:
    config = RunConfig(strategy="fsdp2", **settings)
    assert (find_block_problem(Flat(), config, "fsdp2") or "").startswith(f"{named}: given True, but the model has no")
    assert find_block_problem(Layers(), config, "fsdp2") is None
    assert find_block_problem(Flat(), RunConfig(strategy="fsdp2"), "fsdp2") is None
    problem = find_block_problem(Flat(), dataclasses.replace(config, strategy="auto"), "auto")
    assert (problem is None) is (named == "fsdp.compile"), "DDP may be chosen, which compiles no blocks"


def test_activation_checkpointing_needs_blocks_under_every_strategy() -> None:
    plan = planned(Agreement((facts(0, CPU), facts(1, CPU))), "auto")
    given = RunConfig(activation_checkpointing=True)
    check_model(Layers(), plan, pytest.fail, given)
    with pytest.raises(PlanError, match="activation_checkpointing: given True, but the model has no blocks"):
        check_model(Flat(), plan, pytest.fail, given)


def test_the_facts_of_ranks_carry_the_callbacks() -> None:
    assert RankFacts.from_json(facts(0, CPU, traits={"weight_callbacks": ["A"]}).to_json()).traits == {
        "weight_callbacks": ["A"]
    }
