"""`strategies.comparison`, `strategies.memory`, `strategies.step_time`: the fastest strategy that fits."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.assessment import MARGIN, TIE
from strategies.base import StrategyEntry, TrainingStep
from strategies.batch import BatchSplit
from strategies.comparison import Comparison, ComparisonOptions, compare_strategies, next_after
from strategies.gpus import find_gpu
from strategies.machine import CollectiveTraffic, MachineModel
from strategies.memory import estimate_memory
from strategies.model_states import ModelShape, OptimizerShape, ParameterShape, StateTypes, ZeroSettings
from strategies.precision import Precision
from strategies.registry import DDP, SINGLE_DEVICE, ZERO_1, ZERO_2, ZERO_3, list_candidates
from strategies.step_time import StepTime, step_time
from strategies.step_trace import ModelProfile, StepTrace
from strategies.units import format_bytes

GIB = 1 << 30
BF16 = Precision.BF16_MIXED


def profile(billions: float, activations_gib: float = 1.0, tensors: int = 300) -> ModelProfile:
    """A model of equal tensors under Adam; activations of a micro batch of 1, and twice as many of 2."""
    blocks = tuple(tuple(range(start, start + tensors // 30)) for start in range(0, tensors, tensors // 30))
    shape = ParameterShape(int(billions * 1e9 / tensors))
    model = ModelShape((shape,) * tensors, (tuple(range(tensors)),), blocks=blocks)

    def trace(size: int) -> StepTrace:
        bytes_ = int(activations_gib * GIB * size)
        return StepTrace(size, bytes_, bytes_, bytes_ + 4 * model.numel, 0, 4 * model.numel, 8 * model.numel,
                         int(6 * model.numel * 2048 * size))  # fmt: skip

    traces = trace(1), trace(2)
    return ModelProfile(model, traces, traces, "traced")


def machine(
    world: int, kind: str = "cuda", memory_gib: float = 80, per_node: int = 8, gpu: str = "h100"
) -> MachineModel:
    found = find_gpu(gpu)
    memory = int(memory_gib * GIB)
    return MachineModel(kind, world, min(per_node, world), memory, found.half_flops, found.memory_bandwidth,
                        found.link_bandwidth, 25e9, found.host_bandwidth)  # fmt: skip


def compare(found: ModelProfile, ranks: MachineModel, *splits: BatchSplit, precision: Precision = BF16) -> Comparison:
    return compare_strategies(found, ranks, precision, splits or (BatchSplit(ranks.world_size, 1, 1),))


@pytest.mark.parametrize(
    ("billions", "world", "kind", "expected"),
    [
        (0.1, 1, "cpu", "single_device"),
        (0.1, 1, "cuda", "single_device"),
        (0.1, 4, "cpu", "ddp"),
        (1.0, 8, "cpu", "ddp"),
        (0.1, 8, "cuda", "ddp"),
        (1.0, 1, "mps", "single_device"),
    ],
)
def test_simplest_strategy_is_chosen_without_memory_pressure(
    billions: float, world: int, kind: str, expected: str
) -> None:
    assert compare(profile(billions), machine(world, kind)).pick == expected


def test_larger_models_are_sharded_more() -> None:
    picks = [compare(profile(size), machine(64)).pick for size in (0.1, 7, 20, 60)]
    assert picks == ["ddp", "fsdp2_grad_op", "fsdp2_grad_op", "deepspeed_stage_3"]


def test_offload_is_chosen_only_if_nothing_else_fits_and_not_on_cpu() -> None:
    found = compare(profile(8), machine(1))
    assert found.pick is not None
    assert found.pick.endswith("offload")
    reasons = {a.name: a.reason for a in compare(profile(1), machine(2, "cpu")).assessments if not a.eligible}
    assert "nowhere to offload" in reasons["deepspeed_stage_3_offload"]


@pytest.mark.parametrize(
    ("change", "reason_part"),
    [
        ({"zero_obstacle": "the module optimizes by hand"}, "the module optimizes by hand"),
        (
            {"model": dataclasses.replace(profile(20).model, optimizer=OptimizerShape("Adafactor"))},
            "not take Adafactor",
        ),
    ],
)
def test_zero_is_not_eligible_if_deepspeed_cannot_train_the_model(change: dict[str, object], reason_part: str) -> None:
    found = compare(dataclasses.replace(profile(20), **change), machine(64))  # type: ignore[arg-type]
    assert found.pick == "fsdp2_grad_op"
    assert all(reason_part in a.reason for a in found.assessments if a.name.startswith("deepspeed"))
    assert not any(reason_part in a.reason for a in found.assessments if not a.name.startswith("deepspeed"))


def test_every_candidate_has_memory_time_and_a_reason() -> None:
    found = compare(profile(7), machine(8))
    assert [a.name for a in found.assessments] == [c.name for c in list_candidates()]
    for assessed in found.assessments:
        assert assessed.reason
        assert assessed.memory.total > 0
        assert assessed.step.seconds > 0
    assert "GiB above the limit of 73.6 GiB" in next(a.reason for a in found.assessments if a.name == "ddp")


def test_largest_micro_batch_that_fits_is_chosen() -> None:
    splits = [BatchSplit(8, n, 16 // n) for n in (16, 8, 4, 2, 1)]
    found = compare(profile(0.1, activations_gib=9), machine(8), *splits)
    taken = found.of(found.pick or "")
    assert taken is not None
    assert (taken.micro_batch_size, taken.accumulate, taken.fits) == (8, 2, True)
    # Twice as much would not fit.
    assert found.limit_bytes < 16 * 9 * GIB


def test_if_nothing_fits_the_reason_states_the_shortage_and_alternatives() -> None:
    poor = dataclasses.replace(machine(2), host_memory_bytes=64 * GIB)
    found = compare(profile(70), poor)
    assert found.pick is None
    assert "of host memory a rank" in next(a.reason for a in found.assessments if a.name == "deepspeed_stage_3_offload")
    assert "no strategy fits" in found.why
    assert "needs least of the device, but 652 GiB of host memory a rank, 588 GiB too much" in found.why
    assert "nodes with more memory" in found.why
    assert "ranks with fsdp2" in found.why
    number = int(found.why.partition("what would do: ")[2].split()[0])
    assert compare(profile(70), dataclasses.replace(poor, world_size=number)).pick is not None
    large = compare(profile(0.1, activations_gib=200), machine(2))
    assert "activation checkpointing" in large.why
    assert "more than the limit of 73.6 GiB" in large.why


def test_a_smaller_micro_batch_that_fits_is_proposed() -> None:
    found = compare(profile(0.1, activations_gib=9), machine(8), BatchSplit(8, 64, 1))
    assert found.pick is None
    proposed = found.why.partition("what would do: a micro batch of ")[2].split()
    assert proposed[:2] == ["8", "with"]
    again = compare(profile(0.1, activations_gib=9), machine(8), BatchSplit(8, int(proposed[0]), 1))
    assert next(a.name for a in again.assessments if a.can_train) == proposed[2]
    # On as few ranks, nothing is proposed that does not fit either.
    assert (
        "a micro batch of"
        not in compare(profile(70), machine(2)).why.partition("what would do: ")[2].split(" ranks")[0]
    )


def test_memory_share_sets_the_limit() -> None:
    found = profile(1, activations_gib=10)
    split = (BatchSplit(1, 1, 1),)
    needs = compare(found, machine(1)).assessments[0].memory.total
    memory = dataclasses.replace(machine(1), memory_bytes=needs)
    assert compare_strategies(found, memory, BF16, split, ComparisonOptions(1.0)).assessments[0].fits
    assert not compare_strategies(found, memory, BF16, split, ComparisonOptions(0.99)).assessments[0].fits


def test_next_candidate_needs_less_memory() -> None:
    found = compare(profile(7), machine(8))
    pick, following = found.of(found.pick or ""), found.of(found.next or "")
    assert pick is not None
    assert following is not None
    assert following.memory.total < pick.memory.total
    assert following.fits


def test_next_candidates_need_less_until_none_is_left() -> None:
    found = compare(profile(7), machine(8))
    name, needs = "ddp", []
    while (following := next_after(name, found.assessments, machine(8))) is not None:
        name = following
        needs.append(next(a.memory.total for a in found.assessments if a.name == name))
    assert len(needs) > 1
    assert needs == sorted(needs, reverse=True)
    assert next_after("fsdp", found.assessments, machine(8)) is None


def test_comparison_is_json() -> None:
    values = compare(profile(1), machine(8)).to_dict()
    assert json.loads(json.dumps(values)) == values
    entry = values["assessments"][1]
    parts = ("parameters", "gradients", "optimizer_states", "activations", "temporaries", "buffers")
    assert sum(entry["memory"][part] for part in parts) == entry["memory"]["total"]


def test_comparison_without_a_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one way"):
        compare_strategies(profile(1), machine(1), BF16, ())


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.01, 100), st.floats(0.01, 40), st.sampled_from([1, 2, 8, 64]), st.sampled_from(["cpu", "cuda"]),
    st.sampled_from([Precision.FP32_TRUE, BF16, Precision.BF16_TRUE]),
)  # fmt: skip
def test_pick_fits_and_no_fitting_candidate_is_faster_by_the_margin(
    billions: float, activations: float, world: int, kind: str, precision: Precision
) -> None:
    found = compare(profile(billions, activations), machine(world, kind), precision=precision)
    able = [a for a in found.assessments if a.eligible and a.fits]
    if found.pick is None:
        assert not able
        return
    pick = found.of(found.pick)
    assert pick in able
    assert pick.memory.total <= found.limit_bytes
    if kind == "cuda":
        # Later candidates must be faster than the pick by the margin; earlier ones must not be faster.
        order = [a.name for a in able]
        later = able[order.index(pick.name) + 1 :]
        # Of equally fast ones the pick needs least, and may be slower than the first of them by as much.
        assert all(a.step.seconds * (1 + TIE) >= pick.step.seconds * (1 - MARGIN) for a in later)


def timed(found: ModelProfile, candidate: StrategyEntry, ranks: MachineModel, accumulate: int = 1) -> StepTime:
    """In 16 bits, with a micro batch of 1."""
    step = TrainingStep(found.model, found.plain[0], ranks.world_size, StateTypes(2), accumulate)
    return step_time(candidate, step, ranks)


def test_volumes_match_the_papers() -> None:
    # ZeRO, section 7: stages 1 and 2 send the parameters' size twice, stage 3 three times.
    found = profile(1)
    size = 2 * found.model.numel

    def sent(candidate: StrategyEntry, accumulate: int = 1) -> float:
        return timed(found, candidate, machine(64), accumulate).bytes_per_rank / (size * 63 / 64)

    assert sent(SINGLE_DEVICE) == 0
    assert sent(DDP) == pytest.approx(2)
    assert sent(ZERO_1) == pytest.approx(2)
    assert sent(ZERO_2) == pytest.approx(2)
    assert sent(ZERO_3) == pytest.approx(2)  # the forward pass's parameters are kept below the reuse distance
    assert sent(ZERO_2, 4) == pytest.approx(5)  # stage 2 reduces each micro batch
    assert sent(DDP, 4) == pytest.approx(2)
    big = profile(7)
    time = timed(big, ZERO_3, machine(64))
    assert time.bytes_per_rank == pytest.approx(3 * 2 * big.model.numel * 63 / 64, rel=1e-6)


def test_bytes_across_nodes_need_several_nodes_and_take_longer() -> None:
    found = profile(7)
    inside, across = (timed(found, ZERO_3, machine(8, per_node=n)) for n in (8, 1))
    assert inside.bytes_across_nodes == 0
    assert across.bytes_across_nodes == across.bytes_per_rank > 0
    assert across.communication > inside.communication


class HybridShard(type(DDP)):  # type: ignore[misc]
    """Shards within a node and replicates across nodes."""

    name = "hybrid"

    def collectives(self, step: TrainingStep, machine: MachineModel, compute: float) -> list[CollectiveTraffic]:
        size = step.model.numel * step.types.parameter_bytes
        return [
            CollectiveTraffic(2 * size, 1, 0.0, "node"),
            CollectiveTraffic(2 * size / machine.ranks_per_node, 1, 0.0, "across"),
        ]


def test_collective_scope_node_and_across() -> None:
    found, ranks = profile(7), machine(32, per_node=8)
    hybrid, ddp = timed(found, HybridShard(), ranks), timed(found, DDP, ranks)
    size = 2 * found.model.numel
    assert hybrid.bytes_per_rank == round(2 * size * 7 / 8 + 2 * size / 8 * 3 / 4)
    assert hybrid.bytes_across_nodes == round(2 * size / 8 * 3 / 4)
    # An eighth of the volume crosses, over an eighth of the network each.
    inside = 2 * size * 7 / 8 / (ranks.link_bandwidth * 0.7)
    across = 2 * size / 8 * 3 / 4 / (ranks.node_bandwidth * 0.7)
    assert hybrid.communication == pytest.approx(inside + across, rel=0.01)
    assert ddp.bytes_across_nodes == ddp.bytes_per_rank
    alone = timed(found, HybridShard(), machine(1))
    assert (alone.communication, alone.bytes_per_rank) == (0.0, 0)


def test_single_device_frees_gradients_and_ddp_keeps_buckets() -> None:
    model = ModelShape((ParameterShape(1000),), ((0,),))
    trace = StepTrace(1, forward=100, backward=900, backward_with_gradients=4500, inputs=8, step=0,
                      optimizer_states=8000, flops=1)  # fmt: skip
    single, ddp = (estimate_memory(model, trace, c, 2, Precision.FP32_TRUE) for c in (SINGLE_DEVICE, DDP))
    assert (single.phase, single.gradients + single.activations) == ("backward", 4500)
    assert (ddp.phase, ddp.gradients, ddp.buffers, ddp.activations) == ("backward", 4000, 0, 900)
    again = estimate_memory(model, trace, SINGLE_DEVICE, 1, Precision.FP32_TRUE, accumulate=2)
    assert again.gradients + again.activations == 4900


def test_mixed_precision_keeps_fp32_weights_without_zero_and_16_bit_weights_with_zero() -> None:
    found = profile(1)
    ddp, zero = (estimate_memory(found.model, found.plain[0], c, 8, BF16) for c in (DDP, ZERO_2))
    assert ddp.parameters == 4 * found.model.numel
    assert zero.parameters == pytest.approx(2 * found.model.numel, rel=1e-6)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (80 * GIB, "80 GiB"), (1100 * GIB, "1100 GiB")]
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_zero_step_holds_flat_fp32_gradient_temporaries_and_later_groups() -> None:
    trace = StepTrace(1, forward=0, backward=0, backward_with_gradients=0, inputs=8, step=0, optimizer_states=0,
                      flops=1)  # fmt: skip
    none = ZeroSettings(reduce_bucket_size=0, persistence_threshold=0, max_live_parameters=0)
    greedy = OptimizerShape(temporary_bytes_per_element=32)
    one = ModelShape((ParameterShape(1000), ParameterShape(1000)), ((0, 1),), greedy)
    two = dataclasses.replace(one, groups=((0,), (1,)))

    def step(model: ModelShape, candidate: StrategyEntry, precision: Precision) -> tuple[str, int, int]:
        found = estimate_memory(model, trace, candidate, 2, precision, settings=none)
        return found.phase, found.gradients, found.activations + found.temporaries

    # A rank's part of the one group has 1000 elements: 4 bytes of flat gradient, 32 of temporaries, the batch.
    assert step(one, ZERO_2, Precision.FP32_TRUE) == ("step", 0, 36_000 + 8)
    assert step(one, ZERO_3, BF16) == ("step", 2_000, 36_000 + 8)
    # Two groups of 500 elements each; the second group's gradients are still alive, in one buffer with the first.
    assert step(two, ZERO_2, Precision.FP32_TRUE) == ("step", 4 * 2_000, 500 * (4 + 32) + 8)
    assert step(two, ZERO_3, Precision.FP32_TRUE) == ("step", 4 * 1_000, 500 * (4 + 32) + 8)
