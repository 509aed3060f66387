"""`strategies.model_states`: ZeRO's formulas and DeepSpeed's padding, without processes."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from strategies.base import StrategyEntry, TrainingStep
from strategies.model_states import (
    DEFAULT_SETTINGS,
    ModelShape,
    ModelStates,
    OptimizerShape,
    ParameterShape,
    StateTypes,
    ZeroSettings,
)
from strategies.registry import (
    DDP,
    SINGLE_DEVICE,
    ZERO_1,
    ZERO_2,
    ZERO_2_OFFLOAD,
    ZERO_3,
    ZERO_3_NVME,
    ZERO_3_OFFLOAD,
    list_candidates,
)
from strategies.step_trace import StepTrace

# The ZeRO paper's numbers: 2 bytes for weights, 2 for gradients, K = 12 for master copy and Adam.
HALF = StateTypes(2)
FULL = StateTypes()
NO_SCALARS = OptimizerShape(state_bytes_per_tensor=0)


def model_states(
    model: ModelShape,
    candidate: StrategyEntry,
    ranks: int,
    types: StateTypes = FULL,
    settings: ZeroSettings = DEFAULT_SETTINGS,
    measured: int | None = None,
) -> ModelStates:
    return candidate.model_states(TrainingStep(model, StepTrace(*[0] * 8), ranks, types, settings=settings), measured)


def shape(*numels: int, frozen: tuple[int, ...] = (), optimizer: OptimizerShape = NO_SCALARS) -> ModelShape:
    parameters = tuple(ParameterShape(n, i not in frozen) for i, n in enumerate(numels))
    return ModelShape(parameters, (tuple(range(len(numels))),), optimizer)


def test_example_of_the_zero_paper() -> None:
    # Figure 1 of Rajbhandari et al. 2020: 31.4, 16.6 and 1.9 GB with K = 12. DeepSpeed's stage 1 keeps foreign
    # gradients no longer than the reduction, as stage 2 does: 16.6 GB too.
    model = shape(*[7_500_000] * 1000)
    sums = {}
    for candidate in (ZERO_1, ZERO_2, ZERO_3):
        states = model_states(model, candidate, 64, HALF)
        sums[candidate.variant.stage] = (states.parameters + states.gradients + states.optimizer_states) / 1e9
    assert sums == pytest.approx({1: 16.6, 2: 16.6, 3: 1.9}, abs=0.07)


def test_single_device_and_ddp_keep_all_states() -> None:
    for candidate in (SINGLE_DEVICE, DDP):
        states = model_states(shape(10, 5), candidate, 4)
        assert (states.parameters, states.gradients, states.optimizer_states) == (60, 60, 120)


def test_frozen_parameters_have_no_gradients_or_states() -> None:
    model = shape(10, 6, frozen=(0,))
    for candidate in (DDP, ZERO_2, ZERO_3):
        states = model_states(model, candidate, 1)
        assert states.gradients == 24
        assert states.parameters == 64
        assert states.optimizer_states == 6 * (8 if candidate is DDP else 12)


def test_stage_2_pads_each_group_to_two_elements_per_rank() -> None:
    model = ModelShape((ParameterShape(9), ParameterShape(5)), ((0,), (1,)), NO_SCALARS)
    states = model_states(model, ZERO_2, 2)
    assert states.parameters == (12 + 8) * 4
    assert states.optimizer_states == (6 + 4) * 12


def test_stage_2_keeps_complete_gradients_that_overlap_the_part_of_a_rank() -> None:
    # 4 ranks own 26 elements each; the second parameter overlaps all parts, and the last part has 4 of padding.
    assert model_states(shape(10, 80, 10), ZERO_2, 4).gradients == 4 * (80 + 10 + 4)


def test_stage_3_pads_each_parameter_and_keeps_small_parameters_gathered() -> None:
    small = ZeroSettings(persistence_threshold=10)
    states = model_states(shape(9, 11), ZERO_3, 4, settings=small)
    assert (states.parameters, states.gathered) == ((3 + 3) * 4, 12 * 4)
    assert states.gradients == 24
    assert model_states(shape(9, 11), ZERO_3, 1, settings=small).gathered == 0


def test_optimizer_determines_state_bytes() -> None:
    sgd = OptimizerShape("SGD", 0, 0, 0)
    assert model_states(shape(10, optimizer=sgd), DDP, 1).optimizer_states == 0
    assert model_states(shape(12, optimizer=sgd), ZERO_2, 2).optimizer_states == 6 * 4


def test_offload_moves_states_to_the_host() -> None:
    model = shape(*[1_000_000] * 8)
    on_device, offloaded = (model_states(model, c, 2, HALF) for c in (ZERO_2, ZERO_2_OFFLOAD))
    assert (offloaded.gradients, offloaded.optimizer_states) == (0, 0)
    assert offloaded.parameters == on_device.parameters
    assert offloaded.host > on_device.optimizer_states
    small = ZeroSettings(sub_group_size=1_000_000)
    third, nvme = (model_states(model, c, 2, HALF, small) for c in (ZERO_3_OFFLOAD, ZERO_3_NVME))
    assert (third.parameters, third.nvme) == (0, 0)
    assert nvme.nvme > 0
    assert third.host > nvme.host


def test_measured_optimizer_states_replace_the_formula() -> None:
    assert model_states(shape(10), DDP, 2, measured=7).optimizer_states == 7


@settings(deadline=None)
@example([67, 63, 127], ZERO_1, 2, StateTypes())
@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=20),
    st.sampled_from([c for c in list_candidates() if c.is_sharded]),
    st.integers(1, 64),
    st.sampled_from([StateTypes(), HALF]),
)
def test_more_ranks_need_less_sharded_memory_except_for_padding(
    numels: list[int], candidate: StrategyEntry, world: int, types: StateTypes
) -> None:
    few, many = (model_states(shape(*numels), candidate, n, types) for n in (world, 2 * world))
    padding = 2 * 2 * world * len(numels) * 16
    for part in ("parameters", "optimizer_states", "host"):
        assert getattr(many, part) <= getattr(few, part) + padding
    # Stages 1 and 2 keep the complete gradient of a tensor that overlaps a rank's part, at both ends.
    assert many.gradients <= few.gradients + padding + 2 * max(numels) * 4
    assert all(value >= 0 for value in dataclasses.astuple(many))
