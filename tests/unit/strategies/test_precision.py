"""`strategies.precision`: spellings, the short form of one process, and the agreed precision of all ranks."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.precision import (
    AgreedPrecision,
    Precision,
    PrecisionError,
    compute_effective_precision,
    normalize_precision,
)
from tests.support.rank_kinds import EVERY_SPELLING, INVALID


def normalized(value: object) -> Precision | PrecisionError:
    try:
        return normalize_precision(value)
    except PrecisionError as error:
        return error


@pytest.mark.case(36)
@pytest.mark.parametrize(("spelling", "precision"), EVERY_SPELLING)
def test_every_spelling_maps_to_a_lightning_name(spelling: object, precision: Precision) -> None:
    assert normalize_precision(spelling) is precision


@pytest.mark.case(36)
@pytest.mark.parametrize("value", [True, False])
def test_booleans_are_rejected(value: bool) -> None:
    with pytest.raises(PrecisionError, match=repr(value)):
        normalize_precision(value)


@pytest.mark.case(36)
@pytest.mark.case(48)
@settings(deadline=None)
@given(st.sampled_from(EVERY_SPELLING), st.randoms(), st.text(" \t\n", max_size=3), st.text(" \t\n", max_size=3))
def test_case_blanks_and_underscores_are_ignored(
    known: tuple[object, Precision], chance: random.Random, before: str, after: str
) -> None:
    text = "".join(chance.choice((c.upper(), c.lower(), c.replace("-", "_"))) for c in str(known[0]))
    assert normalize_precision(before + text + after) is known[1]


@pytest.mark.case(48)
@settings(deadline=None)
@given(st.one_of(st.text(max_size=12), st.integers(), st.floats(), st.none(), st.booleans(), st.binary(max_size=4)))
def test_value_is_normalized_or_rejected_with_a_valid_suggestion(value: object) -> None:
    answer = normalized(value)
    if isinstance(answer, PrecisionError):
        assert repr(value) in str(answer)
        assert normalize_precision(answer.nearest) in Precision
    else:
        assert normalize_precision(answer) is answer
        assert normalize_precision(answer.value) is answer


@pytest.mark.case(4)
@pytest.mark.parametrize("use_amp", [None, True, False])
@pytest.mark.parametrize("value", INVALID)
def test_invalid_precision_is_rejected_for_any_use_amp(value: object, use_amp: bool | None) -> None:
    with pytest.raises(PrecisionError) as caught:
        compute_effective_precision(value, use_amp, True, True)  # type: ignore[arg-type]
    message = str(caught.value)
    assert repr(value) in message
    assert all(precision.value in message for precision in Precision)
    assert all(short in message for short in ("fp16", "half", "bf16", "double"))
    assert caught.value.value is value
    assert f"nearest is {caught.value.nearest!r}" in message


@pytest.mark.case(4)
@pytest.mark.parametrize(
    ("value", "nearest"),
    [("17", "16"), ("fp15", "fp16"), ("mixed", "16-mixed"), ("bf16mixed", "bf16-mixed"), (None, "32-true")],
)
def test_the_error_names_the_nearest_spelling(value: object, nearest: str) -> None:
    with pytest.raises(PrecisionError) as caught:
        normalize_precision(value)
    assert caught.value.nearest == nearest


def test_arguments_are_accepted_by_keyword() -> None:
    given = {"use_amp": True, "cuda_available": True, "use_gpu": True}
    assert compute_effective_precision(requested_precision="bf16", **given) == "bf16"


@pytest.mark.case(1)
def test_unused_gpu_gives_32() -> None:
    assert compute_effective_precision("16", True, True, False) == "32"


@pytest.mark.case(2)
def test_bf16_needs_native_support_else_16() -> None:
    assert compute_effective_precision("bf16", True, True, True) == "bf16"
    assert compute_effective_precision("bf16", True, True, True, bf16_supported=False) == "16"


@pytest.mark.case(3)
@pytest.mark.parametrize("requested", ["32-true", "16-mixed", "16-true", "64-true", "16_mixed", "Half"])
def test_full_spellings_are_unchanged_without_use_amp(requested: str) -> None:
    assert compute_effective_precision(requested, None, True, True) == requested
    assert compute_effective_precision(requested, None, False, False) == requested
    assert compute_effective_precision(requested, True, True, True) == "16"
    assert compute_effective_precision(requested, False, True, True) == "32"


@pytest.mark.case(3)
@pytest.mark.parametrize("requested", ["bf16-mixed", "bf16-true", "BF16_mixed", "bfloat16"])
def test_bf16_spellings_keep_bf16_with_use_amp(requested: str) -> None:
    assert compute_effective_precision(requested, None, True, True) == requested
    assert compute_effective_precision(requested, True, True, True) == "bf16"
    assert compute_effective_precision(requested, False, True, True) == "32"


@pytest.mark.case(5)
@pytest.mark.parametrize("requested", ["16", "bf16", "32"])
def test_mps_gives_32(requested: str) -> None:
    assert compute_effective_precision(requested, True, False, True, mps_available=True) == "32"


@pytest.mark.case(31)
def test_16_stays_16_without_use_amp() -> None:
    answer = compute_effective_precision("16", None, False, False)
    assert (answer, type(answer), len(answer)) == ("16", str, 2)


@pytest.mark.case(32)
def test_use_amp_turns_32_into_16() -> None:
    answer = compute_effective_precision("32", True, True, True)
    assert (answer, type(answer)) == ("16", str)


@pytest.mark.case(33)
def test_use_amp_without_a_gpu_gives_32() -> None:
    assert compute_effective_precision("16", True, False, True) == "32"


@pytest.mark.case(34)
def test_use_amp_false_gives_32_on_a_gpu() -> None:
    assert compute_effective_precision("16", False, True, True) == "32"


# (use_amp, cuda, use_gpu, bf16) to the result for 'bf16'; the results of '16' and '32' have no bf16.
TABLE = {
    (True, True, True, True): "bf16",
    (True, True, True, False): "16",
    (True, True, False, True): "32",
    (True, True, False, False): "32",
    (True, False, True, True): "32",
    (True, False, True, False): "32",
    (True, False, False, True): "32",
    (True, False, False, False): "32",
    (False, True, True, True): "32",
    (False, True, True, False): "32",
    (False, True, False, True): "32",
    (False, True, False, False): "32",
    (False, False, True, True): "32",
    (False, False, True, False): "32",
    (False, False, False, True): "32",
    (False, False, False, False): "32",
}


@pytest.mark.case(35)
@pytest.mark.parametrize("requested", ["bf16", "16", "32"])
@pytest.mark.parametrize("switches", list(itertools.product((True, False), repeat=4)))
def test_all_combinations_of_switches(switches: tuple[bool, bool, bool, bool], requested: str) -> None:
    use_amp, cuda, use_gpu, bf16 = switches
    expected = TABLE[switches] if requested == "bf16" else TABLE[switches].replace("bf16", "16")
    assert compute_effective_precision(requested, use_amp, cuda, use_gpu, bf16_supported=bf16) == expected


@pytest.mark.case(48)
@settings(deadline=None)
@given(
    st.sampled_from(EVERY_SPELLING),
    st.none() | st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_result_can_be_run_and_is_stable(
    known: tuple[object, Precision], use_amp: bool | None, cuda: bool, use_gpu: bool, bf16: bool, mps: bool
) -> None:
    requested = str(known[0])

    def ask(value: str) -> str:
        return compute_effective_precision(value, use_amp, cuda, use_gpu, bf16_supported=bf16, mps_available=mps)

    answer = ask(requested)
    assert ask(answer) == answer
    if use_amp is None:
        assert answer == requested
        return
    assert answer in ("16", "bf16", "32")
    assert answer == "32" or (use_amp and cuda and use_gpu)
    assert answer != "bf16" or bf16


def test_precision_needs_no_training_library() -> None:
    program = "import sys, strategies.precision; print(*{'torch', 'lightning', 'deepspeed', 'wandb'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == ""


def test_only_16_mixed_has_a_loss_scale() -> None:
    assert [p for p in Precision if AgreedPrecision(p, ()).has_loss_scale] == [Precision.FP16_MIXED]
