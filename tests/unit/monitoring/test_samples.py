"""`launcher.monitoring.samples`: one rank's sample as a packed vector."""

from __future__ import annotations

import pytest

from launcher.monitoring.samples import ABSENT, FIELDS, RankSample, unpack_sample

FULL = (1.0, 1024.0, 3.0, 17.0, 5.0, 1.0, 0.25, 0.05, 0.1, 2.0**40, 8.0, 512.0)


def test_every_number_has_its_place() -> None:
    assert unpack_sample(2, FULL) == RankSample(2, 1024.0, 3, 17, 5, True, 0.25, 0.05, 0.1, 2**40, False, 8.0, 512.0)
    assert len(FULL) == len(FIELDS)


def test_counts_are_integers() -> None:
    sample = unpack_sample(0, FULL)
    counts = (sample.skipped_steps, sample.growth_tracker, sample.floor_steps, sample.peak_memory)
    assert {type(count) for count in counts} == {int}


@pytest.mark.case(38)
@pytest.mark.parametrize("has_scale", [1.0, 0.0])
def test_a_scale_of_0_is_kept_and_a_missing_one_is_none(has_scale: float) -> None:
    vector = [has_scale, 0.0, *FULL[2:]]
    assert unpack_sample(0, vector).scale == (0.0 if has_scale else None)


def test_an_unreadable_scale_differs_from_a_missing_one() -> None:
    none, unknown = (unpack_sample(0, [has_scale, *FULL[1:]]) for has_scale in (0.0, ABSENT))
    assert (none.scale, none.scale_unknown) == (None, False)
    assert (unknown.scale, unknown.scale_unknown) == (None, True)


def test_what_is_not_counted_is_none() -> None:
    vector = [0.0, *[ABSENT] * 4, 0.0, *FULL[6:]]
    sample = unpack_sample(1, vector)
    assert (sample.scale, sample.skipped_steps, sample.growth_tracker, sample.floor_steps) == (None,) * 4
    assert sample.loss_not_finite is False


def test_zero_is_a_count() -> None:
    sample = unpack_sample(1, [1.0, 8.0, 0.0, 0.0, 0.0, *FULL[5:]])
    assert (sample.skipped_steps, sample.growth_tracker, sample.floor_steps) == (0, 0, 0)


@pytest.mark.parametrize("vector", [FULL[:-1], (*FULL, 1.0)])
def test_a_vector_of_another_length_is_refused(vector: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="zip"):
        unpack_sample(0, vector)


def test_the_default_sample_has_no_scale_and_no_time() -> None:
    assert RankSample(4) == RankSample(4, None, None, None, None, False, 0.0, 0.0, 0.0, 0)
