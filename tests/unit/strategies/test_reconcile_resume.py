"""`reconcile` with a DeepSpeed config, a checkpoint and a known number of ranks."""

from __future__ import annotations

import random
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.precision import AgreedPrecision, Precision, PrecisionError, RankCapability, reconcile
from tests.support.deepspeed_configs import ANYTHING, WHOLE
from tests.support.rank_kinds import EVERY_SPELLING, INVALID, capabilities, capability, computes, cpu, v100

FP16, BF16, FP32 = Precision.FP16_MIXED, Precision.BF16_MIXED, Precision.FP32_TRUE
H100S = [capability(0), capability(1)]
MIXED = [capability(0), v100(1)]
REQUESTS = st.sampled_from(["auto", " Auto ", *(text for text, _ in EVERY_SPELLING)])
WISHES = st.none() | st.booleans()
CHECKPOINTS = st.none() | st.sampled_from(list(Precision))
ON_CHANGE: st.SearchStrategy[Literal["notice", "error"]] = st.sampled_from(["notice", "error"])


def answer(request: object, ranks: list[RankCapability], **options: Any) -> AgreedPrecision | PrecisionError:
    try:
        return reconcile(request, ranks, **options)
    except PrecisionError as error:
        return error


# DeepSpeed's config.


@pytest.mark.parametrize(
    ("config", "precision"),
    [({"fp16": {"enabled": True}}, FP16), ({"bf16": {"enabled": True}}, BF16), ({"bfloat16": {"enabled": True}}, BF16)],
)
def test_auto_uses_the_precision_of_the_deepspeed_config(config: dict[str, Any], precision: Precision) -> None:
    agreed = reconcile("auto", H100S, deepspeed_config=config)
    assert agreed.precision is precision
    assert f"the DeepSpeed config requests {precision}" in agreed.reasons[0]


def test_precision_of_the_deepspeed_config_is_rejected_if_a_rank_cannot_run_it() -> None:
    with pytest.raises(PrecisionError, match="the DeepSpeed config requests bf16-mixed, but rank 1") as caught:
        reconcile("auto", MIXED, deepspeed_config={"bf16": {"enabled": True}})
    assert (caught.value.ranks, caught.value.nearest) == ((1,), FP16)


def test_conflicts_with_the_deepspeed_config_are_all_listed() -> None:
    config = {"bf16": {"enabled": True}, "amp": {"enabled": True}, "communication_data_type": "bf16"}
    with pytest.raises(PrecisionError, match="contradicts precision 16-mixed") as caught:
        reconcile("16", H100S, deepspeed_config=config)
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["bf16.enabled", "amp.enabled:", "communication_data_type"]
    assert caught.value.value == "16-mixed"


@pytest.mark.parametrize(
    ("ranks", "off", "precision", "reason"),
    [
        (H100S, ("bf16",), FP16, "every rank is a CUDA device, but the DeepSpeed config disables bf16"),
        (H100S, ("fp16",), BF16, "every rank computes bf16 natively"),
        (H100S, ("bf16", "fp16"), FP32, "the DeepSpeed config disables bf16 and fp16"),
        (MIXED, ("fp16",), FP32, "the DeepSpeed config disables fp16"),
        ([cpu(0)], ("fp16",), FP32, "mixed precision is native on no rank"),
    ],
)
def test_auto_skips_a_dtype_that_the_deepspeed_config_disables(
    ranks: list[RankCapability], off: tuple[str, ...], precision: Precision, reason: str
) -> None:
    agreed = reconcile("auto", ranks, deepspeed_config={dtype: {"enabled": False} for dtype in off})
    assert agreed.precision is precision
    assert agreed.reasons[0].startswith(f"precision auto: {reason}")


def test_auto_skips_the_checkpoint_precision_if_the_deepspeed_config_disables_it() -> None:
    agreed = reconcile("auto", H100S, checkpoint="bf16-mixed", deepspeed_config={"bf16": {"enabled": False}})
    assert agreed.precision is FP16
    assert agreed.reasons[0].startswith(
        "precision auto: not the checkpoint's bf16-mixed, which the DeepSpeed config disables"
    )
    assert agreed.changed_from is BF16


def test_two_enabled_blocks_are_rejected_for_any_request() -> None:
    config = {"fp16": {"enabled": True}, "bf16": {"enabled": True}}
    for request in ("auto", "16", "bf16", "32"):
        with pytest.raises(PrecisionError, match="are both true"):
            reconcile(request, H100S, deepspeed_config=config)


@pytest.mark.parametrize("request_", ["bf16", "auto"])
def test_fallback_applies_to_the_deepspeed_config(request_: str) -> None:
    agreed = reconcile(request_, MIXED, fallback=True, deepspeed_config={"bf16": {"enabled": True}})
    assert agreed.precision is FP16
    assert agreed.deepspeed_blocks == {"fp16": {"enabled": True}, "bf16": {"enabled": False}}
    assert len(agreed.notices) == 1


def test_unused_fallback_does_not_hide_a_conflict() -> None:
    with pytest.raises(PrecisionError, match="contradicts"):
        reconcile("16", H100S, fallback=True, deepspeed_config={"bf16": {"enabled": True}})


def test_use_amp_does_not_override_the_deepspeed_config() -> None:
    with pytest.raises(PrecisionError, match="contradicts precision 32-true"):
        reconcile("auto", H100S, use_amp=False, deepspeed_config={"fp16": {"enabled": True}})


@pytest.mark.parametrize(
    ("request_", "fp16", "bf16"), [("16", True, False), ("16-true", True, False), ("bf16", False, True),
                                   ("bf16-true", False, True), ("32", False, False)]
)  # fmt: skip
def test_deepspeed_blocks_match_the_precision(request_: str, fp16: bool, bf16: bool) -> None:
    agreed = reconcile(request_, H100S, deepspeed_config={})
    assert agreed.deepspeed_blocks == {"fp16": {"enabled": fp16}, "bf16": {"enabled": bf16}}
    # DeepSpeed scales the loss in 16-true as well.
    assert agreed.has_loss_scale is fp16


def test_no_blocks_without_a_deepspeed_config() -> None:
    assert reconcile("16", H100S).deepspeed_blocks is None


def test_request_of_the_deepspeed_config_is_named_in_reason_and_error() -> None:
    assert reconcile("bf16", H100S).reasons == ("precision bf16-mixed was requested, and every rank can",)
    with pytest.raises(PrecisionError, match=r"^precision bf16-mixed was requested, but rank 1 ") as caught:
        reconcile("BF16", MIXED)
    assert caught.value.value == "BF16"


# The checkpoint.


def test_auto_resumes_in_the_checkpoint_precision() -> None:
    agreed = reconcile("auto", H100S, checkpoint="16-mixed")
    assert (agreed.precision, agreed.notices, agreed.changed_from) == (FP16, (), None)
    assert agreed.reasons == ("precision auto: the checkpoint was trained in 16-mixed, and every rank can",)


def test_auto_states_why_the_checkpoint_precision_is_not_used() -> None:
    agreed = reconcile("auto", MIXED, checkpoint="bf16-mixed")
    assert (agreed.precision, agreed.changed_from) == (FP16, BF16)
    assert "not the checkpoint's bf16-mixed, which rank 1 (node1, Tesla V100) cannot run" in agreed.reasons[0]
    assert agreed.notices == (
        (
            "the checkpoint was trained in bf16-mixed, this run trains in 16-mixed; "
            "the loss scale starts at its initial value"
        ),
    )


def test_auto_with_16_mixed_checkpoint_on_cpus_notes_debugging() -> None:
    agreed = reconcile("auto", [cpu(0)], checkpoint="16-mixed")
    assert agreed.precision is FP16
    assert any("debugging" in reason for reason in agreed.reasons)


@pytest.mark.parametrize(
    ("before", "request_", "ending"),
    [
        ("16-mixed", "bf16", "; its loss scale is no longer needed"),
        ("bf16-mixed", "16", "; the loss scale starts at its initial value"),
        ("32-true", "bf16", ""),
    ],
)
def test_precision_change_notice_names_both_precisions(before: str, request_: str, ending: str) -> None:
    agreed = reconcile(request_, H100S, checkpoint=before)
    text = f"the checkpoint was trained in {before}, this run trains in {agreed.precision}{ending}"
    assert (agreed.notices, agreed.changed_from) == ((text,), Precision(before))


def test_precision_change_is_an_error_on_request() -> None:
    with pytest.raises(PrecisionError, match="on_precision_change is error") as caught:
        reconcile("bf16", H100S, checkpoint="16-mixed", on_change="error")
    assert "set `precision: 16-mixed`, or `on_precision_change: notice`" in str(caught.value)
    assert (caught.value.value, caught.value.nearest) == ("bf16-mixed", FP16)
    assert reconcile("16", H100S, checkpoint="16-mixed", on_change="error").notices == ()


def test_change_and_fallback_give_two_notices() -> None:
    agreed = reconcile("bf16", MIXED, fallback=True, checkpoint="32")
    assert ["falling back" in notice for notice in agreed.notices] == [True, False]
    assert "the checkpoint was trained in 32-true" in agreed.notices[1]


def test_deepspeed_config_takes_precedence_over_checkpoint_and_use_amp() -> None:
    by_config = reconcile("auto", H100S, checkpoint="16", deepspeed_config={"bf16": {"enabled": True}})
    assert (by_config.precision, by_config.changed_from) == (BF16, FP16)
    by_wish = reconcile("auto", H100S, checkpoint="16", use_amp=True)
    assert (by_wish.precision, by_wish.changed_from) == (BF16, FP16)


@pytest.mark.parametrize("value", [value for value in INVALID if value is not None])
def test_invalid_checkpoint_precision_is_rejected(value: object) -> None:
    with pytest.raises(PrecisionError, match="is not a precision"):
        reconcile("auto", H100S, checkpoint=value)


# The ranks.


def test_missing_ranks_are_named() -> None:
    with pytest.raises(ValueError, match=r"the capability of 4 ranks; rank 1, 3 is missing"):
        reconcile("auto", [capability(0), capability(2)], world_size=4)


def test_many_missing_ranks_are_counted() -> None:
    with pytest.raises(ValueError, match=r"rank 1, 2, 3, 4, 5, 6, 7, 8 and 91 more is missing"):
        reconcile("auto", [capability(0)], world_size=100)


def test_too_many_ranks_are_an_error() -> None:
    with pytest.raises(ValueError, match="the capability of 1 ranks; there are ranks up to 1"):
        reconcile("auto", H100S, world_size=1)
    assert reconcile("auto", H100S, world_size=2).precision is BF16


def test_duplicate_rank_is_named() -> None:
    with pytest.raises(ValueError, match=r"there are several of rank 1, 3"):
        reconcile("auto", [capability(n) for n in (0, 1, 1, 2, 3, 3, 3)])


# All combinations.


@pytest.mark.case(48)
@settings(deadline=None, max_examples=150)
@given(REQUESTS, capabilities(), WISHES, st.booleans(), st.none() | WHOLE | ANYTHING, CHECKPOINTS, ON_CHANGE)
def test_agreed_precision_runs_everywhere_and_enables_at_most_one_block(
    request_: object,
    ranks: list[RankCapability],
    use_amp: bool | None,
    fallback: bool,
    config: dict[str, Any] | None,
    before: Precision | None,
    on_change: Literal["notice", "error"],
) -> None:
    agreed = answer(request_, ranks, use_amp=use_amp, fallback=fallback, deepspeed_config=config, checkpoint=before,
                    on_change=on_change, world_size=len(ranks))  # fmt: skip
    if isinstance(agreed, PrecisionError):
        assert str(agreed)
        return
    only_cpus = all(rank.device_kind == "cpu" for rank in ranks)
    assert only_cpus or all(computes(rank, agreed.precision) for rank in ranks)
    assert agreed.reasons
    assert agreed.changed_from is (before if before is not agreed.precision else None)
    assert on_change == "notice" or agreed.changed_from is None
    if config is None:
        assert agreed.deepspeed_blocks is None
        return
    assert agreed.deepspeed_blocks is not None
    enabled = {name for name, block in agreed.deepspeed_blocks.items() if block["enabled"] is True}
    dtype = {"16": "fp16", "bf16": "bf16", "32": None}[agreed.precision.split("-")[0]]
    assert enabled == ({dtype} if dtype else set())
    assert agreed.has_loss_scale == (dtype == "fp16")


@pytest.mark.case(48)
@settings(deadline=None, max_examples=60)
@given(REQUESTS, capabilities(), WISHES, st.booleans(), st.none() | WHOLE, CHECKPOINTS)
def test_agreement_is_stable_with_the_resulting_config(
    request_: object,
    ranks: list[RankCapability],
    use_amp: bool | None,
    fallback: bool,
    config: dict[str, Any] | None,
    before: Precision | None,
) -> None:
    agreed = answer(request_, ranks, use_amp=use_amp, fallback=fallback, deepspeed_config=config, checkpoint=before)
    if isinstance(agreed, PrecisionError):
        return
    made = None if config is None else {**config, **(agreed.deepspeed_blocks or {})}
    again = reconcile(agreed.precision, ranks, deepspeed_config=made, checkpoint=agreed.precision, on_change="error")
    assert (again.precision, again.deepspeed_blocks) == (agreed.precision, agreed.deepspeed_blocks)
    assert (again.notices, again.changed_from) == ((), None)


@pytest.mark.case(48)
@settings(deadline=None, max_examples=60)
@given(REQUESTS, capabilities(), WISHES, st.booleans(), st.none() | WHOLE, CHECKPOINTS, ON_CHANGE, st.randoms())
def test_order_of_ranks_does_not_matter_with_deepspeed(
    request_: object,
    ranks: list[RankCapability],
    use_amp: bool | None,
    fallback: bool,
    config: dict[str, Any] | None,
    before: Precision | None,
    on_change: Literal["notice", "error"],
    chance: random.Random,
) -> None:
    shuffled = list(ranks)
    chance.shuffle(shuffled)
    one, other = (
        answer(request_, group, use_amp=use_amp, fallback=fallback, deepspeed_config=config, checkpoint=before,
               on_change=on_change)
        for group in (ranks, shuffled)
    )  # fmt: skip
    assert repr(one) == repr(other)


@pytest.mark.case(48)
@settings(deadline=None, max_examples=60)
@given(REQUESTS, capabilities(), st.none() | WHOLE, CHECKPOINTS)
def test_config_of_the_caller_is_not_changed(
    request_: object, ranks: list[RankCapability], config: dict[str, Any] | None, before: Precision | None
) -> None:
    untouched = repr(config)
    answer(request_, ranks, fallback=True, deepspeed_config=config, checkpoint=before)
    assert repr(config) == untouched
