"""Identical ranks are planned as one record, with the same result as separate records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

import launcher.agreement.facts
from launcher.agreement.facts import Agreement, RankFacts, make_identical_ranks
from launcher.config.schema import RunConfig
from launcher.core.errors import PlanError
from launcher.planning.memory import machine_of
from launcher.planning.plan import make_plan
from strategies.precision import Precision
from strategies.repeated import RepeatedRecords, count_groups, select
from tests.support.rank_threads import CPU, H100, V100, facts


def first_of(device: Any, local: int, **versions: str | None) -> RankFacts:
    one = facts(0, device, traits={"batch_size": 4})
    assert one.hardware is not None
    hardware = dataclasses.replace(one.hardware, versions={**one.hardware.versions, **versions})
    return dataclasses.replace(one, local_world_size=local, hardware=hardware)


def plan_or_error(config: RunConfig, agreement: Agreement) -> Any:
    try:
        return make_plan(config, agreement)
    except PlanError as error:
        return str(error)


def test_repeated_records_are_created_on_access() -> None:
    ranks = RepeatedRecords("rank", 10, lambda first, place: f"{first} {place}")
    assert (len(ranks), ranks[0], ranks[3], ranks[-1], list(ranks[:2])) == (
        10, "rank", "rank 3", "rank 9", ["rank", "rank 1"],
    )  # fmt: skip
    with pytest.raises(IndexError):
        ranks[10]
    assert select(ranks, lambda one: one == "rank") is ranks
    assert not select(ranks, lambda one: one == "rank 1")
    assert count_groups(ranks) == [("rank", 10)]
    assert count_groups(["a", "b"]) == [("a", 1), ("b", 1)]
    assert select(["a", "b"], lambda one: one == "b") == ["b"]
    nobody = RepeatedRecords("rank", 0, lambda first, place: first)
    assert not select(nobody, lambda one: True)
    assert not count_groups(nobody)


@pytest.mark.parametrize("count", [1, 2, 24])
@pytest.mark.parametrize("device", [CPU, H100, V100])
@pytest.mark.parametrize(
    "given",
    [{}, {"precision": "bf16-mixed"}, {"precision": "bf16-mixed", "precision_fallback": True}, {"use_amp": True},
     {"precision": "64-true"}, {"strategy": "deepspeed_stage_3_offload_nvme"}],
)  # fmt: skip
def test_repeated_ranks_give_the_same_plan_as_separate_ranks(count: int, device: Any, given: dict[str, Any]) -> None:
    config = RunConfig(global_batch_size=96, **given)
    short = Agreement(make_identical_ranks(first_of(device, min(count, 8), ninja=None), count), assumed=True)
    whole = dataclasses.replace(short, facts=tuple(short.facts))
    assert [f.rank for f in whole.facts] == list(range(count))
    assert [f.node_rank for f in whole.facts] == [rank // 8 for rank in range(count)]
    assert plan_or_error(config, short) == plan_or_error(config, whole)
    assert list(short.capabilities()) == list(whole.capabilities())
    assert (short.hosts, short.num_nodes, short.world_size) == (whole.hosts, whole.num_nodes, whole.world_size)
    assert machine_of(short, Precision.FP32_TRUE) == machine_of(whole, Precision.FP32_TRUE)


@pytest.mark.parametrize("given", [{}, {"precision": "bf16-mixed"}, {"use_amp": True}])
@pytest.mark.parametrize("device", [CPU, H100, V100])
def test_million_ranks_are_not_created_one_by_one(
    device: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counting(make: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
        return lambda first, place: made.append(place) or make(first, place)

    of_facts = launcher.agreement.facts._numbered_capability
    monkeypatch.setattr(launcher.agreement.facts, "_numbered", counting(launcher.agreement.facts._numbered))
    monkeypatch.setattr(launcher.agreement.facts, "_numbered_capability", lambda known: counting(of_facts(known)))
    agreement = Agreement(make_identical_ranks(first_of(device, 1000), 1_000_000), assumed=True)
    config = RunConfig(global_batch_size=1_000_000, precision_fallback=True, **given)
    plan = make_plan(config, agreement)
    machine_of(agreement, Precision.FP32_TRUE)
    assert (plan.world_size, plan.num_nodes, sum(plan.devices.values())) == (1_000_000, 1000, 1_000_000)
    # The node of the last rank, and the ranks that a reason names.
    assert len(made) < 50
