"""Names of precisions: every spelling to Lightning 2's, and one process's short form."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from enum import StrEnum


class Precision(StrEnum):
    """Lightning 2's names for the precisions that the launcher can train in."""

    FP16_MIXED = "16-mixed"
    BF16_MIXED = "bf16-mixed"
    FP32_TRUE = "32-true"
    FP16_TRUE = "16-true"
    BF16_TRUE = "bf16-true"
    FP64_TRUE = "64-true"


AUTO = "auto"

# Looked up in lower case, without blanks, and with '-' for '_'.
_SPELLINGS: dict[str, Precision] = {
    spelling: precision
    for precision, spellings in (
        (Precision.FP16_MIXED, ("16", "fp16", "half", "float16", "16-mixed")),
        (Precision.FP16_TRUE, ("16-true",)),
        (Precision.BF16_MIXED, ("bf16", "bfloat16", "bf16-mixed")),
        (Precision.BF16_TRUE, ("bf16-true",)),
        (Precision.FP32_TRUE, ("32", "fp32", "float", "float32", "32-true")),
        (Precision.FP64_TRUE, ("64", "fp64", "double", "float64", "64-true")),
    )
    for spelling in spellings
}

# The type of the matrix products.
DTYPE: dict[Precision, str] = {
    Precision.FP16_MIXED: "fp16",
    Precision.FP16_TRUE: "fp16",
    Precision.BF16_MIXED: "bf16",
    Precision.BF16_TRUE: "bf16",
    Precision.FP32_TRUE: "fp32",
    Precision.FP64_TRUE: "fp64",
}

# Known elsewhere, but not supported for training here.
_REFUSED = {
    "fp8": "needs NVIDIA's Transformer Engine and a recipe for each layer, which the launcher does not set up",
    "nf4": "is a format for frozen weights, not for training",
    "int8": "is a format for frozen weights, not for training",
}
_REFUSED["8"] = _REFUSED["float8"] = _REFUSED["transformer-engine"] = _REFUSED["fp8"]


class PrecisionError(ValueError):
    """A precision that does not exist, or that some rank cannot run.

    Attributes:
        ranks: the ranks that cannot run it; empty if the value is no precision.
        nearest: what would work instead, if there is such a thing.
    """

    def __init__(self, message: str, *, value: object, ranks: Sequence[int] = (), nearest: str | None = None) -> None:
        super().__init__(message)
        self.value = value
        self.ranks = tuple(ranks)
        self.nearest = nearest


def normalize_precision(value: object) -> Precision:
    """Map any spelling of a precision to Lightning 2's name.

    Raises:
        PrecisionError: `value` is no spelling of a precision; carries the nearest one.
    """
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        key = str(value).strip().lower().replace("_", "-")
        if key in _SPELLINGS:
            return _SPELLINGS[key]
        if key in _REFUSED:
            raise PrecisionError(
                f"{value!r} {_REFUSED[key]}; nearest is 'bf16-mixed'", value=value, nearest=Precision.BF16_MIXED
            )
        close = difflib.get_close_matches(key, _SPELLINGS, n=1, cutoff=0.0)
        nearest = close[0] if close else Precision.FP32_TRUE.value
    else:
        nearest = Precision.FP32_TRUE.value
    valid = ", ".join([*Precision, "and their short forms", *(s for s in _SPELLINGS if s not in set(Precision))])
    raise PrecisionError(
        f"{value!r} is not a precision; valid are {valid}; nearest is {nearest!r}", value=value, nearest=nearest
    )


def compute_effective_precision(
    requested_precision: str,
    use_amp: bool | None,
    cuda_available: bool,
    use_gpu: bool,
    *,
    bf16_supported: bool = True,
    mps_available: bool = False,
) -> str:
    """The precision of one process in its caller's short spelling ('16', 'bf16', '32').

    Args:
        requested_precision: any spelling that `normalize_precision` takes.
        use_amp: None returns `requested_precision`; True uses mixed precision if available; False turns it off.
        cuda_available: whether a CUDA device can be used.
        use_gpu: whether the user wants one used.
        bf16_supported: whether that device computes bf16 natively.
        mps_available: whether this is an Apple GPU; Lightning has no autocast there, so it changes nothing.

    Raises:
        PrecisionError: `requested_precision` is no precision, for any `use_amp`.
    """
    del mps_available
    normalized = normalize_precision(requested_precision)
    if use_amp is None:
        return str(requested_precision)
    if not (use_amp and cuda_available and use_gpu):
        return "32"
    return "bf16" if DTYPE[normalized] == "bf16" and bf16_supported else "16"
