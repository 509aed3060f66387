"""`strategies.fsdp_traffic`: volumes, messages and layouts by hand-computed numbers, and the choice that follows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from strategies.assessment import TIE
from strategies.base import TrainingStep
from strategies.comparison import Comparison, ComparisonOptions, compare_strategies
from strategies.fsdp import FSDP2, FSDP2_GRAD_OP, FSDP2_OFFLOAD, HSDP
from strategies.fsdp_traffic import ShardLayout, find_layout_problem, python_seconds
from strategies.machine import MachineModel, Ring
from strategies.model_states import ModelShape, ParameterShape, StateTypes
from strategies.precision import Precision
from strategies.registry import DDP, ZERO_2
from strategies.sharding import ShardOptions
from strategies.step_time import step_time
from strategies.step_trace import ModelProfile, StepTrace
from tests.unit.strategies.test_comparison import GIB, compare, machine, profile, timed

# Two blocks of 10 rows and 16 elements, and a root of 6 elements, of which 2 are frozen.
MODEL = ModelShape(
    (ParameterShape(160, rows=10), ParameterShape(160, rows=10), ParameterShape(4, rows=4),
     ParameterShape(2, trainable=False, rows=2)),
    ((0, 1, 2),),
    blocks=((0,), (1,), (2, 3)),
)  # fmt: skip
TRACE = StepTrace(1, 0, 0, 0, 0, 0, 0, flops=1)
MIXED = StateTypes(compute_bytes=2)


def step(passes: int = 1, types: StateTypes = MIXED, world: int = 4, **sharding: Any) -> TrainingStep:
    return TrainingStep(MODEL, TRACE, world, types, passes, sharding=ShardOptions(**sharding))


def volumes(entry: Any, of: TrainingStep, ranks: MachineModel) -> list[tuple[float, int, Ring]]:
    """Volume, messages and ring of each collective."""
    return [(each.volume, each.messages, ranks.ring(each.scope)) for each in entry.collectives(of, ranks, 3.0)]


# With 4 ranks a block has 4 * 3 rows of 16 elements, the root 4 * 1 + 4 * 1 elements, of which 4 are trained.
WEIGHTS, AGAIN, GRADIENTS = 2 * (192 + 192 + 8), 2 * (192 + 192), 4 * (192 + 192 + 4)
ALL = Ring(4, 4)


@pytest.mark.parametrize(
    ("entry", "passes", "options", "expected"),
    [
        (FSDP2, 1, {}, [(WEIGHTS, 3, ALL), (AGAIN + GRADIENTS, 5, ALL)]),
        (FSDP2_GRAD_OP, 1, {}, [(WEIGHTS, 3, ALL), (GRADIENTS, 3, ALL)]),
        (FSDP2, 3, {}, [(3 * WEIGHTS, 9, ALL), (3 * (AGAIN + GRADIENTS), 15, ALL)]),
        (FSDP2, 3, {"reduce_every_batch": False},
         [(3 * WEIGHTS, 9, ALL), (AGAIN + GRADIENTS, 5, ALL), (2 * AGAIN, 4, ALL)]),
        (FSDP2_GRAD_OP, 3, {"reduce_every_batch": False}, [(3 * WEIGHTS, 9, ALL), (GRADIENTS, 3, ALL)]),
        (FSDP2, 1, {"reduce_dtype": "param"}, [(WEIGHTS, 3, ALL), (AGAIN + GRADIENTS // 2, 5, ALL)]),
        (FSDP2_OFFLOAD, 1, {}, [(WEIGHTS, 3, ALL), (AGAIN + GRADIENTS, 5, ALL)]),
    ],
)  # fmt: skip
def test_weights_are_gathered_twice_without_the_root_and_gradients_are_summed(
    entry: Any, passes: int, options: dict[str, Any], expected: list[tuple[float, int, Ring]]
) -> None:
    assert volumes(entry, step(passes, **options), machine(4)) == expected


def test_hsdp_sums_a_part_of_the_gradients_across_nodes() -> None:
    # Two nodes of two ranks: with 2 ranks nothing but the root is padded.
    weights, again, gradients = 2 * (160 + 160 + 6), 2 * 320, 4 * (320 + 4)
    ranks = machine(4, per_node=2)
    found = volumes(HSDP, step(), ranks)
    inside, across = Ring(2, 2), Ring(2, 1)
    assert found == [(weights, 3, inside), (again + gradients, 5, inside), (2 * gradients / 2, 3, across)]
    time = step_time(HSDP, step(), ranks)
    assert time.bytes_across_nodes == gradients // 2
    assert time.bytes_inside_nodes == (weights + again + gradients) // 2
    assert time.bytes_per_rank == time.bytes_inside_nodes + time.bytes_across_nodes


@pytest.mark.parametrize(
    ("shard_ranks", "shards", "replicas"),
    [
        (None, Ring(8, 8), Ring(4, 1)),
        (4, Ring(4, 4), Ring(8, 2)),  # two groups of a node
        (16, Ring(16, 8), Ring(2, 1)),  # a group of two nodes
        (1, Ring(1, 1), Ring(32, 8)),
    ],
)
def test_shard_ranks_decide_who_exchanges_with_whom(shard_ranks: int | None, shards: Ring, replicas: Ring) -> None:
    layout = ShardLayout.of(HSDP.variant, machine(32), shard_ranks)
    assert (layout.shards, layout.replicas) == (shards, replicas)
    assert shards.crosses_nodes is (shard_ranks == 16)


@pytest.mark.parametrize(
    ("world", "per_node", "shard_ranks", "problem"),
    [
        (16, 8, None, None),
        (8, 8, None, "with one node it is the same as fsdp2"),
        (8, 8, 4, None),
        (8, 8, 8, "all ranks share states, as in fsdp2"),
        (6, 4, None, "6 ranks on nodes of up to 4 are not as many on each node"),
        (8, 8, 3, "fsdp.shard_ranks 3 does not divide 8 ranks"),
    ],
)
def test_hsdp_is_a_candidate_only_with_several_groups_of_equal_size(
    world: int, per_node: int, shard_ranks: int | None, problem: str | None
) -> None:
    ranks = machine(world, per_node=per_node)
    assert find_layout_problem(HSDP.variant, ranks, shard_ranks) == problem
    assert find_layout_problem(FSDP2.variant, ranks, shard_ranks) is None
    options = ComparisonOptions(sharding=ShardOptions(shard_ranks=shard_ranks))
    found = compare_strategies(profile(1), ranks, Precision.BF16_MIXED, [split_of(ranks)], options).of("hsdp")
    assert found is not None
    assert found.eligible is (problem is None)
    assert (problem or "") in found.reason


def split_of(ranks: MachineModel) -> Any:
    from strategies.batch import BatchSplit

    return BatchSplit(ranks.world_size, 1, 1)


def test_offload_moves_shards_to_the_device_and_gradients_to_the_host() -> None:
    ranks = machine(4)
    update, moved = FSDP2_OFFLOAD.optimizer_time(step(2), ranks)
    shards, freed, gradients = (192 + 192 + 8) / 4, (192 + 192) / 4, (192 + 192 + 4) / 4
    assert moved == pytest.approx(4 * 2 * (shards + freed + gradients) / ranks.host_bandwidth)
    assert update > 100 * FSDP2.optimizer_time(step(2), ranks)[0], "on the host"
    assert FSDP2.optimizer_time(step(2), ranks)[1] == 0


def test_python_time_is_by_group_and_micro_batch() -> None:
    one = python_seconds(step())
    assert 3 * 200e-6 < one < 3 * 400e-6
    assert python_seconds(step(4)) == pytest.approx(4 * one)
    assert timed(profile(1), FSDP2, machine(8)).overhead < timed(profile(1), ZERO_2, machine(8)).overhead


def slow_network(found: ModelProfile, ranks: MachineModel, bandwidth: float) -> Comparison:
    return compare(found, dataclasses.replace(ranks, node_bandwidth=bandwidth))


def test_hsdp_wins_where_the_network_between_two_nodes_is_slow_and_fsdp2_where_memory_is_short() -> None:
    found, ranks = profile(7), machine(16)
    assert slow_network(found, ranks, 25e9).pick != "hsdp", "one port for each GPU"
    slow = slow_network(found, ranks, 1e9)
    hsdp, fsdp2 = slow.of("hsdp"), slow.of("fsdp2")
    assert hsdp is not None
    assert fsdp2 is not None
    assert hsdp.step.seconds < 0.7 * fsdp2.step.seconds
    assert slow.of("hsdp") == min(
        (a for a in slow.assessments if a.can_train and a.name.startswith(("fsdp2", "hsdp"))),
        key=lambda a: a.step.seconds,
    )
    assert (hsdp.step.bytes_across_nodes, fsdp2.step.bytes_across_nodes) == (
        pytest.approx(4 * found.model.numel / 8, rel=0.01),
        fsdp2.step.bytes_per_rank,
    )
    short = slow_network(found, dataclasses.replace(ranks, memory_bytes=14 * GIB), 1e9)
    assert not next(a.fits for a in short.assessments if a.name == "hsdp")
    assert next(a.fits for a in short.assessments if a.name == "fsdp2")


def test_of_equally_fast_candidates_the_order_is_ddp_then_fsdp2_then_zero_then_offload() -> None:
    """All traffic is hidden, and the memory of all is small: nothing but the order decides."""
    compute = dataclasses.replace(profile(0.1).plain[0], flops=10**18)
    found = dataclasses.replace(profile(0.1), plain=(compute, compute), sharded=(compute, compute))
    ranks = machine(16)
    names = ["ddp", "fsdp2", "fsdp2_grad_op", "hsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
    for position, name in enumerate(names):
        options = ComparisonOptions(obstacles=dict.fromkeys(names[:position], "left out"))
        compared = compare_strategies(found, ranks, Precision.BF16_MIXED, [split_of(ranks)], options)
        able = [a for a in compared.assessments if a.can_train]
        assert all(a.seconds_per_sample <= able[0].seconds_per_sample * (1 + TIE) for a in able)
        assert compared.pick == name
    assert {a.name for a in able[1:]} >= {"fsdp2_offload", "deepspeed_stage_2_offload"}


def test_without_zero_the_choice_is_among_ddp_and_fsdp2() -> None:
    ranks = machine(8)
    zero = {a.name: "DeepSpeed is not installed" for a in compare(profile(1), ranks).assessments if "deep" in a.name}
    picks = [
        compare_strategies(
            profile(size), ranks, Precision.BF16_MIXED, [split_of(ranks)], ComparisonOptions(obstacles=zero)
        ).pick
        for size in (0.1, 7, 20, 60)
    ]
    assert picks == ["ddp", "fsdp2", "fsdp2", "fsdp2_offload"]


def test_on_a_cpu_ddp_is_first_and_only_variants_of_fsdp2_are_compared_by_time() -> None:
    # DDP needs 18.6 GiB, FSDP2 with gathered parameters 6.4, without 4.8; ZeRO 1 sends as much as the former.
    found, ranks = profile(1), machine(4, "cpu", memory_gib=40)
    split = [split_of(ranks)]
    picks = {
        gib: compare_strategies(found, dataclasses.replace(ranks, memory_bytes=gib * GIB), Precision.FP32_TRUE, split)
        for gib in (40, 18, 8)
    }
    assert [each.pick for each in picks.values()] == ["ddp", "fsdp2_grad_op", "fsdp2"]
    assert picks[40].why.endswith("the simplest that fits: on a CPU times are not compared")
    assert "ms a sample" in picks[18].why or "s a sample" in picks[18].why
    # After running out of memory the first that needs less follows, which has the most room.
    assert picks[40].next == "fsdp2"


def test_ddp_needs_no_groups() -> None:
    assert DDP.python_seconds(step()) == 0
