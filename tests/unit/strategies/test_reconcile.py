"""`strategies.precision.reconcile`: one precision that every rank can run, or an error that names the other ranks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.precision import (
    AgreedPrecision,
    Precision,
    PrecisionError,
    RankCapability,
    normalize_precision,
    reconcile,
)
from tests.support.rank_kinds import EVERY_SPELLING, INVALID, capabilities, capability, computes, cpu, v100

REQUESTS = st.sampled_from(["auto", " Auto ", *(text for text, _ in EVERY_SPELLING)])
WISHES = st.none() | st.booleans()


def answer(
    request: object, ranks: list[RankCapability], use_amp: bool | None = None, fallback: bool = False
) -> AgreedPrecision | PrecisionError:
    try:
        return reconcile(request, ranks, use_amp=use_amp, fallback=fallback)
    except PrecisionError as error:
        return error


@pytest.mark.case(6)
def test_one_gpu_without_support_decides_for_all_and_is_named() -> None:
    agreed = reconcile("auto", [capability(0), v100(1), capability(2)])
    assert agreed.precision is Precision.FP16_MIXED
    assert "rank 1 (node1, Tesla V100)" in " ".join(agreed.reasons)
    assert "rank 0" not in " ".join(agreed.reasons)


@pytest.mark.case(6)
def test_explicit_precision_that_one_gpu_cannot_run_is_rejected() -> None:
    with pytest.raises(PrecisionError) as caught:
        reconcile("bf16-mixed", [capability(0), v100(1), capability(2)])
    assert caught.value.ranks == (1,)
    assert caught.value.nearest == "16-mixed"
    assert "rank 1 (node1, Tesla V100)" in str(caught.value)
    assert "`precision: 16-mixed`" in str(caught.value)
    assert "rank 0" not in str(caught.value)


@pytest.mark.case(6)
def test_fallback_uses_the_best_shared_precision_with_a_notice() -> None:
    agreed = reconcile("bf16-mixed", [capability(0), v100(1)], fallback=True)
    assert agreed.precision is Precision.FP16_MIXED
    assert len(agreed.notices) == 1
    assert "rank 1 (node1, Tesla V100)" in agreed.notices[0]
    assert agreed.notices == agreed.reasons


def test_fallback_changes_nothing_if_the_request_can_be_met() -> None:
    agreed = reconcile("bf16", [capability(0), capability(1)], fallback=True)
    assert (agreed.precision, agreed.notices) == (Precision.BF16_MIXED, ())


@pytest.mark.parametrize(
    ("ranks", "precision"),
    [
        ([capability(0), capability(1)], Precision.BF16_MIXED),
        ([capability(0), v100(1)], Precision.FP16_MIXED),
        ([v100(0), v100(1)], Precision.FP16_MIXED),
        ([capability(0), cpu(1)], Precision.FP32_TRUE),
        ([cpu(0)], Precision.FP32_TRUE),
        ([capability(0, "mps", "fp16 fp32", "Apple GPU")], Precision.FP32_TRUE),
        ([capability(0, "mps", "fp16 bf16 fp32", "Apple M4")], Precision.FP32_TRUE),
    ],
)
def test_auto_prefers_bf16_then_16_then_32(ranks: list[RankCapability], precision: Precision) -> None:
    assert reconcile("auto", ranks).precision is precision


@pytest.mark.parametrize(
    ("request_", "ranks", "precision"),
    [
        ("auto", [capability(0)], Precision.BF16_MIXED),
        ("16", [capability(0)], Precision.FP16_MIXED),
        ("32", [capability(0)], Precision.FP16_MIXED),
        ("bf16", [capability(0)], Precision.BF16_MIXED),
        ("bf16", [v100(0)], Precision.FP16_MIXED),
        ("auto", [v100(0)], Precision.FP16_MIXED),
    ],
)
def test_use_amp_is_applied_if_every_gpu_supports_it(
    request_: str, ranks: list[RankCapability], precision: Precision
) -> None:
    assert reconcile(request_, ranks, use_amp=True).precision is precision


@pytest.mark.case(6)
def test_use_amp_with_bf16_falls_back_to_16_with_one_notice() -> None:
    agreed = reconcile("bf16", [capability(0), v100(1)], use_amp=True)
    assert agreed.precision is Precision.FP16_MIXED
    assert "rank 1 (node1, Tesla V100)" in " ".join(agreed.reasons)
    assert len(agreed.notices) == 1


def test_use_amp_with_16_on_a_cpu_with_bf16_is_accepted() -> None:
    (notice,) = reconcile("16", [capability(0, "cpu", "fp32 bf16", "Xeon AMX")], use_amp=True).notices
    assert "computes bf16 natively" not in notice
    assert "rank 0 (node0, Xeon AMX)" in notice


@pytest.mark.parametrize("request_", ["auto", "16", "bf16", "32"])
def test_use_amp_without_support_gives_32_with_one_notice(request_: str) -> None:
    agreed = reconcile(request_, [capability(0), cpu(1)], use_amp=True)
    assert agreed.precision is Precision.FP32_TRUE
    assert len(agreed.notices) == 1
    assert "rank 1 (node1, EPYC)" in agreed.notices[0]


@pytest.mark.parametrize("request_", ["auto", "16", "bf16"])
def test_use_amp_false_disables_mixed_precision_without_a_notice(request_: str) -> None:
    agreed = reconcile(request_, [capability(0)], use_amp=False)
    assert (agreed.precision, agreed.notices) == (Precision.FP32_TRUE, ())


def test_explicit_16_mixed_on_cpu_is_allowed_for_debugging() -> None:
    agreed = reconcile("16-mixed", [cpu(0), cpu(1)])
    assert (agreed.precision, agreed.has_loss_scale) == (Precision.FP16_MIXED, True)
    assert any("debugging" in reason for reason in agreed.reasons)


def test_16_mixed_is_rejected_if_one_rank_has_a_cpu() -> None:
    with pytest.raises(PrecisionError) as caught:
        reconcile("16-mixed", [capability(0), cpu(1)])
    assert caught.value.ranks == (1,)


def test_mps_has_true_half_precision_but_no_autocast() -> None:
    apple = [capability(0, "mps", "fp16 fp32", "Apple GPU")]
    with pytest.raises(PrecisionError):
        reconcile("16-mixed", apple)
    assert reconcile("16-true", apple).precision is Precision.FP16_TRUE


def test_precision_of_auto_can_be_requested_without_native_fp16() -> None:
    old = [capability(0, native="fp32 fp64", name="GTX 980")]
    taken = reconcile("auto", old).precision
    assert reconcile(taken, old).precision is taken


def test_many_ranks_are_counted_in_a_short_error() -> None:
    with pytest.raises(PrecisionError) as caught:
        reconcile("bf16", [v100(rank) for rank in range(512)])
    assert len(caught.value.ranks) == 512
    assert "rank 7 (node7, Tesla V100) and 504 more" in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_no_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        reconcile("auto", [])


@pytest.mark.case(4)
@pytest.mark.parametrize("use_amp", [None, True, False])
@pytest.mark.parametrize("value", INVALID)
def test_invalid_precision_is_rejected_by_reconcile(value: object, use_amp: bool | None) -> None:
    with pytest.raises(PrecisionError, match="valid are"):
        reconcile(value, [capability(0)], use_amp=use_amp)


@pytest.mark.case(48)
@settings(deadline=None, max_examples=300)
@given(REQUESTS, capabilities(), WISHES, st.booleans())
def test_agreed_precision_runs_on_every_rank(
    request_: object, ranks: list[RankCapability], use_amp: bool | None, fallback: bool
) -> None:
    agreed = answer(request_, ranks, use_amp, fallback)
    if isinstance(agreed, PrecisionError):
        # Only an explicit request can fail, and only because of the named ranks.
        assert use_amp is None
        assert not fallback
        unable = {rank.rank for rank in ranks if not computes(rank, normalize_precision(request_))}
        assert set(agreed.ranks) == unable != set()
        return
    order_on_cpus = use_amp is None and all(rank.device_kind == "cpu" for rank in ranks)
    assert order_on_cpus or all(computes(rank, agreed.precision) for rank in ranks)
    assert agreed.reasons


@pytest.mark.case(48)
@settings(deadline=None)
@given(REQUESTS, capabilities(), WISHES, st.booleans(), st.randoms())
def test_order_of_ranks_does_not_matter(
    request_: object, ranks: list[RankCapability], use_amp: bool | None, fallback: bool, chance: random.Random
) -> None:
    shuffled = list(ranks)
    chance.shuffle(shuffled)
    one, other = (answer(request_, group, use_amp, fallback) for group in (ranks, shuffled))
    assert repr(one) == repr(other)


@pytest.mark.case(48)
@settings(deadline=None)
@given(REQUESTS, capabilities(), WISHES)
def test_agreed_precision_can_be_requested_again(
    request_: object, ranks: list[RankCapability], use_amp: bool | None
) -> None:
    agreed = reconcile(request_, ranks, use_amp=use_amp, fallback=True)
    assert reconcile(agreed.precision, ranks).precision is agreed.precision


@pytest.mark.case(48)
@settings(deadline=None)
@given(st.sampled_from(EVERY_SPELLING), capabilities())
def test_suggested_precision_is_accepted(known: tuple[object, Precision], ranks: list[RankCapability]) -> None:
    refusal = answer(known[0], ranks)
    if isinstance(refusal, PrecisionError):
        assert reconcile(refusal.nearest, ranks).precision == refusal.nearest


@pytest.mark.case(48)
@settings(deadline=None)
@given(capabilities(), WISHES, st.data())
def test_additional_rank_never_allows_more(
    ranks: list[RankCapability], use_amp: bool | None, data: st.DataObject
) -> None:
    fewer = data.draw(st.lists(st.sampled_from(ranks), min_size=1, unique_by=lambda rank: rank.rank))
    best = [Precision.FP32_TRUE, Precision.FP16_MIXED, Precision.BF16_MIXED]
    of_all, of_fewer = (reconcile("auto", group, use_amp=use_amp).precision for group in (ranks, fewer))
    assert best.index(of_all) <= best.index(of_fewer)
