"""`strategies.precision`: the exact texts of reasons, notices and errors."""

from __future__ import annotations

from typing import Any

import pytest

from strategies.precision import Precision, PrecisionError, RankCapability, normalize_precision, reconcile
from tests.support.rank_kinds import capability, cpu, v100

H100S = [capability(0), capability(1)]
V100S = [v100(0), v100(1)]
MIXED = [capability(0), v100(1)]
DEBUGGING = "is for debugging: it computes the same numbers, but not faster"
NATIVE = "every rank computes bf16 natively"
NOT_NATIVE = "every rank is a CUDA device, but not native in bf16: rank 1 (node1, Tesla V100)"


@pytest.mark.parametrize(
    ("request_", "ranks", "options", "reasons"),
    [
        ("auto", H100S, {}, (f"precision auto: {NATIVE}",)),
        ("auto", MIXED, {}, (f"precision auto: {NOT_NATIVE}",)),
        ("auto", [capability(0), cpu(1), cpu(2)], {},
         ("precision auto: mixed precision is not native on rank 1 (node1, EPYC), rank 2 (node2, EPYC)",)),
        ("auto", [cpu(0)], {}, ("precision auto: mixed precision is native on no rank: rank 0 (node0, EPYC)",)),
        ("auto", [cpu(n) for n in range(4)], {},
         (("precision auto: mixed precision is native on no rank: "
           "rank 0 (node0, EPYC), rank 1 (node1, EPYC) and 2 more"),)),
        ("bf16", H100S, {}, ("precision bf16-mixed was requested, and every rank can",)),
        ("32", [cpu(0)], {}, ("precision 32-true was requested, and every rank can",)),
        ("16", [cpu(0)], {},
         ("precision 16-mixed was requested, and every rank can", f"on a CPU 16-mixed {DEBUGGING}")),
        ("auto", [cpu(0)], {"checkpoint": "bf16"},
         ("precision auto: the checkpoint was trained in bf16-mixed, and every rank can",
          f"on a CPU bf16-mixed {DEBUGGING}")),
        ("auto", [cpu(0)], {"checkpoint": "32"},
         ("precision auto: the checkpoint was trained in 32-true, and every rank can",)),
        ("auto", H100S, {"use_amp": False}, ("use_amp is false: no mixed precision",)),
        ("auto", H100S, {"use_amp": True}, (f"use_amp: {NATIVE}",)),
        ("16", H100S, {"use_amp": True}, ("use_amp: every rank is a CUDA device",)),
        ("auto", V100S, {"use_amp": True}, ("use_amp: every rank is a CUDA device",)),
    ],
)  # fmt: skip
def test_reason_text(
    request_: Any, ranks: list[RankCapability], options: dict[str, Any], reasons: tuple[str, ...]
) -> None:
    agreed = reconcile(request_, ranks, **options)
    assert (agreed.reasons, agreed.notices) == (reasons, ())


@pytest.mark.parametrize(
    ("request_", "ranks", "options", "notice"),
    [
        ("bf16", MIXED, {"fallback": True},
         ("precision bf16-mixed is not possible on rank 1 (node1, Tesla V100); "
          f"falling back to 16-mixed ({NOT_NATIVE})")),
        ("bf16", MIXED, {"use_amp": True},
         f"use_amp with bf16-mixed was requested, but {NOT_NATIVE}; training in 16-mixed"),
        ("auto", [capability(0), cpu(1)], {"use_amp": True},
         "use_amp was requested, but mixed precision is not native on rank 1 (node1, EPYC); training in 32-true"),
    ],
)  # fmt: skip
def test_notice_text(request_: Any, ranks: list[RankCapability], options: dict[str, Any], notice: str) -> None:
    agreed = reconcile(request_, ranks, **options)
    assert agreed.notices == agreed.reasons == (notice,)


@pytest.mark.parametrize("count", [8, 9])
def test_error_names_eight_ranks_and_counts_the_others(count: int) -> None:
    named = ", ".join(f"rank {n} (node{n}, Tesla V100)" for n in range(8))
    more = "" if count == 8 else " and 1 more"
    with pytest.raises(PrecisionError) as caught:
        reconcile("bf16", [v100(n) for n in range(count)])
    assert str(caught.value) == (
        f"precision bf16-mixed was requested, but {named}{more} cannot run it natively; the best precision that all "
        f"{count} ranks share is 16-mixed: set `precision: 16-mixed`, or `precision_fallback: true` to use it"
    )


def test_error_about_the_deepspeed_config_has_the_request_as_value() -> None:
    with pytest.raises(PrecisionError) as caught:
        reconcile("auto", MIXED, deepspeed_config={"bf16": {"enabled": True}})
    assert caught.value.value == "auto"


@pytest.mark.parametrize(
    ("ranks", "world_size", "message"),
    [
        ([], None, "reconcile needs the capability of at least one rank, none was given"),
        ([capability(0)], 9, "reconcile needs the capability of 9 ranks; rank 1, 2, 3, 4, 5, 6, 7, 8 is missing"),
        ([capability(0)], 10,
         "reconcile needs the capability of 10 ranks; rank 1, 2, 3, 4, 5, 6, 7, 8 and 1 more is missing"),
        ([capability(n) for n in range(5)], 2, "reconcile needs the capability of 2 ranks; there are ranks up to 4"),
    ],
)  # fmt: skip
def test_invalid_ranks_error_text(ranks: list[RankCapability], world_size: int | None, message: str) -> None:
    with pytest.raises(ValueError, match="reconcile") as caught:
        reconcile("auto", ranks, world_size=world_size)
    assert str(caught.value) == message


TRANSFORMER_ENGINE = "needs NVIDIA's Transformer Engine and a recipe for each layer, which the launcher does not set up"
WEIGHTS = "is a format for frozen weights, not for training"


@pytest.mark.parametrize(
    ("value", "why"),
    [("fp8", TRANSFORMER_ENGINE), (8, TRANSFORMER_ENGINE), ("FP8", TRANSFORMER_ENGINE), ("float8", TRANSFORMER_ENGINE),
     ("transformer-engine", TRANSFORMER_ENGINE), ("nf4", WEIGHTS), ("int8", WEIGHTS)],
)  # fmt: skip
def test_unsupported_precision_is_rejected_with_the_reason(value: object, why: str) -> None:
    with pytest.raises(PrecisionError) as caught:
        normalize_precision(value)
    assert str(caught.value) == f"{value!r} {why}; nearest is 'bf16-mixed'"
    assert (caught.value.value, caught.value.nearest) == (value, Precision.BF16_MIXED)


def test_unknown_precision_error_lists_valid_values() -> None:
    with pytest.raises(PrecisionError) as caught:
        normalize_precision("fp15")
    assert str(caught.value) == (
        "'fp15' is not a precision; valid are 16-mixed, bf16-mixed, 32-true, 16-true, bf16-true, 64-true, and their "
        "short forms, 16, fp16, half, float16, bf16, bfloat16, 32, fp32, float, float32, 64, fp64, double, float64; "
        "nearest is 'fp16'"
    )
