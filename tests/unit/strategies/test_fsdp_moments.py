"""The states of FSDP2 and the moments of its step, on small models."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.base import TrainingStep
from strategies.fsdp import FSDP2, FSDP2_GRAD_OP, FSDP2_OFFLOAD, HSDP, FullyShard
from strategies.memory import estimate_memory
from strategies.model_states import ModelShape, OptimizerShape, ParameterShape, StateTypes
from strategies.precision import Precision
from strategies.sharding import DEFAULT_SHARDING, ShardOptions
from strategies.step_trace import BlockEvent, Moment, StepTrace

PLAIN = OptimizerShape("SGD", 0, 0, 0)
VARIANTS = (FSDP2, FSDP2_GRAD_OP, HSDP, FSDP2_OFFLOAD)
FULL = StateTypes()
MIXED = StateTypes(compute_bytes=2)


def model_of(*rows: int, root: int = 0, optimizer: OptimizerShape = PLAIN) -> ModelShape:
    """Each block has one parameter; with `root` one more outside of them."""
    parameters = [ParameterShape(n, rows=n) for n in rows]
    blocks: list[tuple[int, ...]] = [(i,) for i in range(len(rows))]
    if root:
        parameters.append(ParameterShape(root, rows=root))
    blocks.append((len(rows),) if root else ())
    return ModelShape(tuple(parameters), (tuple(range(len(parameters))),), optimizer, blocks=tuple(blocks))


def trace_of(model: ModelShape, live: int = 0) -> StepTrace:
    """Blocks run in their order; nothing but `live` bytes is allocated."""
    numbers = range(len(model.blocks) - 1)
    events = [BlockEvent(kind, i, live, live) for i in numbers for kind in ("enter", "leave")]
    events.append(BlockEvent("loss", None, live, live))
    for i in reversed(numbers):
        events += [BlockEvent(kind, i, live, live) for kind in ("outputs", "gradient", "inputs")]
    events += [BlockEvent("gradient", i, live, live) for i in model.blocks[-1]]
    return StepTrace(1, live, live, 0, 0, 0, 0, 1, events=(*events, BlockEvent("end", None, live, live)))


def moments_of(
    candidate: FullyShard,
    model: ModelShape,
    trace: StepTrace,
    types: StateTypes = FULL,
    sharding: ShardOptions = DEFAULT_SHARDING,
    accumulate: int = 1,
) -> list[Moment]:
    step = TrainingStep(model, trace, 2, types, accumulate, sharding=sharding)
    return list(candidate.moments(step, candidate.model_states(step)))


def peak_of(moments: list[Moment], phase: str) -> int:
    return max(moment.total for moment in moments if moment.phase == phase)


def test_rows_are_padded_to_the_same_number_on_each_rank() -> None:
    # Three rows of five elements: two rows on each rank.
    model = ModelShape((ParameterShape(15, rows=3),), ((0,),), OptimizerShape())
    states = FSDP2.model_states(TrainingStep(model, trace_of(model_of(1)), 2, StateTypes()))
    assert (states.parameters, states.gradients, states.optimizer_states) == (40, 40, 10 * 8 + 4)
    assert ParameterShape(1, rows=1).shard(4) == 1
    assert ParameterShape(7, rows=0).shard(4) == 7
    assert ParameterShape(7).shard(4) == 2


def test_hsdp_shards_over_its_ranks_and_offload_keeps_nothing_on_the_device() -> None:
    model = model_of(100, 60)
    trace = trace_of(model)
    step = TrainingStep(model, trace, 8, StateTypes(), sharding=ShardOptions(shard_ranks=2))
    assert HSDP.model_states(step).parameters == 4 * 80
    assert FSDP2.model_states(step).parameters == 4 * (13 + 8)
    states = FSDP2_OFFLOAD.model_states(step)
    assert (states.parameters, states.gradients, states.host) == (0, 0, 2 * 4 * (13 + 8))


def test_parameters_that_are_not_sharded_are_whole_on_each_rank() -> None:
    parameters = (
        ParameterShape(100, rows=100),
        ParameterShape(10, rows=0, is_whole=True),
        ParameterShape(6, rows=6, is_whole_in_mixed=True),
    )
    model = ModelShape(parameters, ((0, 1, 2),), PLAIN, blocks=((0, 2),))
    for types, elements in ((StateTypes(), 50 + 10 + 3), (MIXED, 50 + 10 + 6)):
        states = FSDP2.model_states(TrainingStep(model, trace_of(model), 2, types))
        assert (states.parameters, states.gradients) == (4 * elements, 4 * elements)
    offloaded = FSDP2_OFFLOAD.model_states(TrainingStep(model, trace_of(model), 2, StateTypes()))
    assert (offloaded.parameters, offloaded.host) == (40, 2 * 4 * 53)


def test_one_block_is_gathered_at_a_time_and_the_root_for_the_whole_step() -> None:
    model = model_of(900, 1000, root=10)
    found = moments_of(FSDP2, model, trace_of(model))
    # The last step's gradients; the root; the first block's buffer; the second one's buffer and parameters.
    assert peak_of(found, "forward") == 4 * (955 + 10 + 900 + 2 * 1000)
    # The second block: its gradient, with input and output of the reduction; the first one's buffer; the root.
    assert peak_of(found, "backward") == 4 * (1000 + 1000 + 500 + 900 + 10)
    assert peak_of(found, "step") == 4 * 955


def test_grad_op_keeps_all_blocks_gathered_until_their_backward_pass() -> None:
    model = model_of(1000, 1000, 1000)
    # Buffers of two blocks, and all parameters.
    assert peak_of(moments_of(FSDP2_GRAD_OP, model, trace_of(model)), "forward") == 4 * (1500 + 5000)
    assert peak_of(moments_of(FSDP2, model, trace_of(model)), "forward") == 4 * (1500 + 3000)


def test_mixed_precision_gathers_in_16_bits_and_sums_in_fp32() -> None:
    model = model_of(1000)
    found = moments_of(FSDP2, model, trace_of(model), MIXED)
    # Buffer and parameters; the cast copy of the shard is smaller.
    assert peak_of(found, "forward") == 4 * 500 + 2 * (1000 + 1000)
    # The 16-bit gradient, which is freed last, with input and output of the reduction.
    assert peak_of(found, "backward") == 2 * 1000 + 4 * (1000 + 500)
    narrow = moments_of(FSDP2, model, trace_of(model), MIXED, ShardOptions(reduce_dtype="param"))
    # The sum is cast to the parameter's type.
    assert peak_of(narrow, "backward") == 2 * 1000 + 2 * 500 + 4 * 500 + 2 * 1000


def test_gradients_of_several_micro_batches_are_kept_whole_if_they_are_reduced_once() -> None:
    model = model_of(1000, 1000)
    every, last = (
        moments_of(FSDP2, model, trace_of(model), sharding=ShardOptions(reduce_every_batch=is_every), accumulate=2)
        for is_every in (True, False)
    )
    assert peak_of(every, "forward") == 4 * (1000 + 3000)
    assert peak_of(last, "forward") == 4 * (2000 + 3000)
    # Sharded gradients of the first micro batch are kept, and the next ones added.
    assert every[-1].gradients == last[-1].gradients == 4 * 1000


def test_activations_count_at_their_moment() -> None:
    model = model_of(1000, 1000)
    trace = trace_of(model)
    events = [BlockEvent(e.kind, e.index, 90_000 if e.kind == "loss" else 0, 0) for e in trace.events]
    found = moments_of(FSDP2, model, StepTrace(1, 0, 0, 0, 0, 0, 0, 1, events=tuple(events)))
    # At the end of the forward pass no block is gathered any more, but the last buffer is there.
    assert peak_of(found, "forward") == 90_000 + 4 * (1000 + 1000)


def test_step_that_was_not_traced_block_by_block_needs_no_less() -> None:
    model = model_of(1000, 200, 1000, root=50)
    trace = trace_of(model, live=10_000)
    untraced = StepTrace(1, 10_000, 10_000, 0, 0, 0, 0, 1)
    for candidate in VARIANTS:
        for phase in ("forward", "backward"):
            assumed, traced = (peak_of(moments_of(candidate, model, t), phase) for t in (untraced, trace))
            assert assumed >= traced


def test_block_whose_input_has_no_gradient_is_reduced_after_the_root() -> None:
    model = model_of(1000, 10, root=10)
    trace = trace_of(model)
    kept = tuple(event for event in trace.events if (event.kind, event.index) != ("inputs", 0))
    found = moments_of(FSDP2, model, StepTrace(1, 0, 0, 0, 0, 0, 0, 1, events=kept))
    # At the root's reduction the block is still gathered, with its whole gradient.
    assert Moment("backward", 4 * (5 + 1000 + 10), 0, 4 * (1000 + 10)) in found
    assert found[-1].gradients == 4 * 510


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.booleans(), st.booleans()), min_size=1, max_size=6),
    st.sampled_from(VARIANTS),
    st.sampled_from([StateTypes(), MIXED, StateTypes(2, 0.5, 0.5)]),
    st.booleans(),
    st.integers(1, 2),
    st.integers(1, 5),
)
def test_gradients_of_the_step_are_those_of_the_states(
    blocks: list[tuple[int, bool, bool]],
    candidate: FullyShard,
    types: StateTypes,
    is_every: bool,
    accumulate: int,
    ranks: int,
) -> None:
    parameters = tuple(
        ParameterShape(3 * rows, trainable, rows, is_whole_in_mixed=is_norm) for rows, trainable, is_norm in blocks
    )
    indices = tuple(range(len(parameters)))
    model = ModelShape(parameters, (indices,), PLAIN, blocks=tuple((i,) for i in indices))
    gradients = [e for e in trace_of(model).events if e.kind != "gradient" or parameters[e.index or 0].trainable]
    trace = StepTrace(1, 0, 0, 0, 0, 0, 0, 1, events=tuple(gradients))
    sharding = ShardOptions(shard_ranks=ranks, reduce_every_batch=is_every)
    step = TrainingStep(model, trace, ranks, types, accumulate, sharding=sharding)
    states = candidate.model_states(step)
    found = list(candidate.moments(step, states))
    assert found[-1] == Moment("step", states.gradients, 0, 0, 0)
    assert all(min(m.gradients, m.buffers, m.activations) >= 0 for m in found)


@pytest.mark.parametrize("candidate", VARIANTS)
def test_optimizer_updates_its_share(candidate: FullyShard) -> None:
    model = model_of(1000, optimizer=OptimizerShape())
    trace = StepTrace(1, 0, 0, 0, 0, 8000, 0, 1)
    found = estimate_memory(model, trace, candidate, 4, Precision.FP32_TRUE)
    moments = candidate.moments(TrainingStep(model, trace, 4, StateTypes()), candidate.model_states(
        TrainingStep(model, trace, 4, StateTypes())))  # fmt: skip
    assert moments[-1].temporaries == (0 if candidate is FSDP2_OFFLOAD else 2000)
    assert found.optimizer_states == (0 if candidate is FSDP2_OFFLOAD else 250 * 8 + 4)
