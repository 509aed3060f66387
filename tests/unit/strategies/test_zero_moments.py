"""The moments of a ZeRO step and the copies of its reductions, on small models."""

from __future__ import annotations

import dataclasses

import pytest

from strategies.memory import PROCESS, estimate_memory
from strategies.model_states import ModelShape, OptimizerShape, ParameterShape, ZeroSettings
from strategies.precision import Precision
from strategies.step_trace import GradientArrival, StepTrace, at_batch_size
from strategies.zero import ZERO_1, ZERO_2, ZERO_2_OFFLOAD, ZERO_3, ZERO_3_OFFLOAD, Zero
from strategies.zero_reduction import Reduction, find_largest_pieces, find_offsets, find_reduction
from strategies.zero_states import owned_parts

PLAIN = OptimizerShape("SGD", 0, 0, 0)


def model_of(*numels: int) -> ModelShape:
    return ModelShape(tuple(ParameterShape(n) for n in numels), (tuple(range(len(numels))),), PLAIN)


def trace_of(model: ModelShape, *peaks: int, live: int = 0, forward: int = 0) -> StepTrace:
    """Gradients come from the last parameter to the first; one peak for each, and one for the end."""
    course, gradients = [], 0
    for number, peak in zip([*reversed(range(len(model.parameters))), None], peaks, strict=True):
        course.append(GradientArrival(gradients, peak, live, number))
        gradients += 0 if number is None else 4 * model.parameters[number].numel
    return StepTrace(1, forward, max(peaks), 0, 0, 0, 0, 1, tuple(course))


def beside_states(
    model: ModelShape, trace: StepTrace, candidate: Zero, ranks: int = 1, bucket: int = 0, *,
    process: bool = False, overlap: bool = False, accumulate: int = 1,
) -> tuple[str, int]:  # fmt: skip
    settings = ZeroSettings(bucket, overlap, persistence_threshold=0, prefetch_bucket_size=0)
    found = estimate_memory(model, trace, candidate, ranks, Precision.FP32_TRUE, settings=settings,
                            whole_process=process, accumulate=accumulate)  # fmt: skip
    beside = found.gradients + found.activations + found.temporaries + found.buffers
    return found.phase, beside - (PROCESS if process else 0)


def test_activations_and_gradients_of_different_moments_are_not_added() -> None:
    model = model_of(1000, 1000)
    # The peak is before the first gradient; all gradients are alive at the end.
    trace = trace_of(model, 50_000, 0, 0)
    assert beside_states(model, trace, ZERO_2, bucket=1000) == ("backward", 50_000), "no bucket exists yet"
    # After the first gradient the complete bucket exists; a process has only the written pages.
    middle = trace_of(model, 0, 50_000, 0)
    assert beside_states(model, middle, ZERO_2, bucket=5000) == ("backward", 50_000 + 20_000)
    assert beside_states(model, middle, ZERO_2, bucket=5000, process=True) == ("backward", 50_000 + 4000)
    # At the last gradient the first is reduced, and the buffer for all of them exists.
    low = trace_of(model, 0, 0, 20_000)
    assert beside_states(model, low, ZERO_2, bucket=1000) == ("backward", 8000 + 4000 + 20_000)


def test_stage_1_without_overlap_keeps_all_gradients_until_the_end() -> None:
    model = model_of(1000, 1000)
    trace = trace_of(model, 0, 0, 10)
    # The second gradient, the buffer of the single rank, and the bucket with the first gradient.
    together = 4000 + 8000 + 4000
    assert beside_states(model, trace, ZERO_1, bucket=1000) == ("backward", together)
    # With a second stream it reduces gradients as they arrive.
    overlapped = beside_states(model, trace, ZERO_1, bucket=1000, overlap=True)
    assert overlapped == beside_states(model, trace, ZERO_2, bucket=1000, overlap=True)


def test_accumulated_gradients_count_from_the_start_of_the_last_micro_batch() -> None:
    model = model_of(1000, 1000)
    trace = trace_of(model, 0, 0, 0, forward=100_000)
    assert beside_states(model, trace, ZERO_2, bucket=1000) == ("forward", 100_000)
    assert beside_states(model, trace, ZERO_2, bucket=1000, accumulate=2) == ("forward", 100_000 + 8000)
    assert beside_states(model, trace, ZERO_1, 2, bucket=1000, accumulate=2) == ("forward", 100_000 + 8000)


def test_stage_1_frees_accumulated_gradients_as_they_are_reduced() -> None:
    model = model_of(*[1000] * 10)
    trace = trace_of(model, *[0] * 11)
    # All gradients, the bucket, and finally the rank's half of the gradients.
    phase, most = beside_states(model, trace, ZERO_1, 2, bucket=1000, overlap=True, accumulate=4)
    assert (phase, most) == ("backward", 40_000 - 4000 + 20_000 + 2 * 4000)


def test_gradient_larger_than_a_bucket_is_kept_until_the_next_gradient() -> None:
    model = model_of(10, 1000)
    # The large gradient comes first; the peak is in between.
    trace = trace_of(model, 0, 30_000, 0)
    assert beside_states(model, trace, ZERO_2, bucket=600) == ("backward", 30_000 + 600 * 4 + 4000)


def test_stage_3_releases_parameters_during_backward() -> None:
    model = model_of(1000, 1000)
    gradients = 4 * (500 + 500)
    early = beside_states(model, trace_of(model, 90_000, 0, 0), ZERO_3, 2, bucket=1000)
    late = beside_states(model, trace_of(model, 0, 0, 90_000), ZERO_3, 2, bucket=1000)
    assert early == ("backward", 90_000 + 8000 + 4000 + gradients)
    assert late == ("backward", 90_000 + 4000 + gradients)


def test_process_counts_gloo_copies_and_written_pages_of_a_bucket() -> None:
    model = model_of(1000, 1000)
    trace = trace_of(model, 0, 0, 0)
    allocated = beside_states(model, trace, ZERO_2, 2, bucket=100_000)
    written = beside_states(model, trace, ZERO_2, 2, bucket=100_000, process=True)
    assert allocated == ("backward", 400_000 + 4000)
    # The whole model's gradients in the bucket; gloo copies what goes to one rank, and no gradient is kept.
    assert written == ("backward", 8000 + 4000)
    whole = estimate_memory(model, trace, ZERO_2, 2, Precision.FP32_TRUE, whole_process=True)
    assert whole.buffers == 8000 + 4000 + PROCESS


def test_pieces_of_a_rank_are_copied_only_if_not_contiguous() -> None:
    model = model_of(60, 100, 40)
    assert owned_parts(model, 1, 2) == (100,)
    places = find_offsets(model, 2)
    assert places == {0: (0, 100), 1: (60, 100), 2: (160, 100)}
    # In the order of the model each rank has one piece.
    assert find_reduction([(0, 240), (1, 400), (2, 160)], places, 4) == Reduction(200, 0, 100)
    # In reverse order the second parameter's first part is between the parts of the second rank.
    assert find_reduction([(2, 160), (1, 400), (0, 240)], places, 4) == Reduction(200, 100, 100)
    assert find_reduction([(2, 160)], places, 4) == Reduction(40, 0, 40)
    # A parameter with an unknown offset can be anywhere.
    assert find_reduction([(2, 160), (9, 40)], places, 4) == Reduction(50, 50, 50)
    assert find_offsets(model, 65) == {}


def test_course_is_interpolated_between_two_batch_sizes() -> None:
    small, large = (
        dataclasses.replace(trace_of(model_of(5), peak, 0, live=peak // 2), batch_size=size)
        for size, peak in ((1, 100), (3, 300))
    )
    assert at_batch_size(small, large, 2).course == (GradientArrival(0, 200, 100, 0), GradientArrival(20, 0, 100, None))
    # Different gradients with another number of samples: no interpolation.
    assert at_batch_size(dataclasses.replace(small, course=()), large, 2).course == ()


@pytest.mark.parametrize("candidate", [ZERO_1, ZERO_2, ZERO_3])
def test_untraced_backward_pass_is_assumed_to_stay_at_its_peak(candidate: Zero) -> None:
    model = model_of(1000, 1000)
    seen = trace_of(model, 7000, 7000, 7000, live=7000)
    unseen = dataclasses.replace(seen, course=())
    assert beside_states(model, unseen, candidate, 2, 1000) == beside_states(model, seen, candidate, 2, 1000)


def test_gradient_norm_uses_fp64_copies_one_piece_at_a_time() -> None:
    # The step of plain SGD needs only a flat copy of the gradient.
    assert beside_states(model_of(1000), trace_of(model_of(1000), 0, 0), ZERO_2) == ("step", 4000 + 8000)
    halves = model_of(500, 500)
    assert beside_states(halves, trace_of(halves, 0, 0, 0), ZERO_2) == ("step", 4000 + max(4000, 8 * 500))
    # Rank 0 owns 600 and 250, rank 1 750 and 100, and each keeps complete gradients: no rank has the maximum of both.
    uneven = model_of(600, 1000, 100)
    apart = beside_states(uneven, trace_of(uneven, 0, 0, 0, 0), ZERO_2, 2)
    assert apart == ("step", max(6400 + 8 * 600, 4400 + 8 * 750))
    # Stage 3 moves states to host memory in parts of 250 million elements.
    huge = model_of(400_000_000)
    assert beside_states(huge, trace_of(huge, 0, 0), ZERO_3)[1] == (4 + 8) * 400_000_000
    offloaded = beside_states(huge, trace_of(huge, 0, 0), ZERO_3_OFFLOAD)
    assert offloaded == ("backward", 4 * 400_000_000 + 8 * 250_000_000)
    # During the copy to host memory: the bucket with all gradients, and the copy of one of them.
    offloaded = beside_states(halves, trace_of(halves, 0, 0, 0), ZERO_2_OFFLOAD, bucket=1000)
    assert offloaded == ("backward", 4000 + 2000 + 8 * 500)


@pytest.mark.parametrize(
    ("numels", "stage", "ranks", "pieces"),
    [
        ((100, 1000), 2, 1, [1000]),
        ((100, 1000), 2, 2, [450, 550]),
        ((100, 1000), 3, 2, [500, 500]),
        ((7,), 3, 2, [4, 4]),
        ((10, 10, 10), 1, 2, [10, 10]),
        ((), 3, 4, [0] * 4),
    ],
)
def test_find_largest_pieces(numels: tuple[int, ...], stage: int, ranks: int, pieces: list[int]) -> None:
    assert find_largest_pieces(model_of(*numels), stage, ranks) == pieces
