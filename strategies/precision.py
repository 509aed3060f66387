"""Names of mixed precision, and the rule by which all ranks get the same one.

Nothing here imports torch or Lightning: what a device can do comes in as a `RankCapability`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

DeviceKind = Literal["cpu", "cuda", "mps"]


class Precision(StrEnum):
    """Lightning 2's names for the precisions that the launcher can train in."""

    FP16_MIXED = "16-mixed"
    BF16_MIXED = "bf16-mixed"
    FP32_TRUE = "32-true"
    FP16_TRUE = "16-true"
    BF16_TRUE = "bf16-true"
    FP64_TRUE = "64-true"


AUTO = "auto"

# Lower case, blanks stripped and '_' read as '-', before the look-up.
_SPELLINGS: dict[str, Precision] = {
    "16": Precision.FP16_MIXED,
    "fp16": Precision.FP16_MIXED,
    "half": Precision.FP16_MIXED,
    "float16": Precision.FP16_MIXED,
    "16-mixed": Precision.FP16_MIXED,
    "16-true": Precision.FP16_TRUE,
    "bf16": Precision.BF16_MIXED,
    "bfloat16": Precision.BF16_MIXED,
    "bf16-mixed": Precision.BF16_MIXED,
    "bf16-true": Precision.BF16_TRUE,
    "32": Precision.FP32_TRUE,
    "fp32": Precision.FP32_TRUE,
    "float": Precision.FP32_TRUE,
    "float32": Precision.FP32_TRUE,
    "32-true": Precision.FP32_TRUE,
    "64": Precision.FP64_TRUE,
    "fp64": Precision.FP64_TRUE,
    "double": Precision.FP64_TRUE,
    "float64": Precision.FP64_TRUE,
    "64-true": Precision.FP64_TRUE,
}

_DTYPE: dict[Precision, str] = {
    Precision.FP16_MIXED: "fp16",
    Precision.FP16_TRUE: "fp16",
    Precision.BF16_MIXED: "bf16",
    Precision.BF16_TRUE: "bf16",
    Precision.FP32_TRUE: "fp32",
    Precision.FP64_TRUE: "fp64",
}


class PrecisionError(ValueError):
    """A precision that does not exist, or that some rank cannot run.

    Attributes:
        value: what was asked for, as given.
        ranks: the ranks that stand in the way; empty when the value itself is no precision.
        nearest: what would work instead, if there is such a thing.
    """

    def __init__(self, message: str, *, value: object, ranks: Sequence[int] = (), nearest: str | None = None) -> None:
        super().__init__(message)
        self.value = value
        self.ranks = tuple(ranks)
        self.nearest = nearest


@dataclass(frozen=True, slots=True)
class RankCapability:
    """What one rank's device computes.

    Attributes:
        rank: global rank.
        host: name of the machine.
        device_kind: kind of device the rank trains on.
        device_name: the vendor's name of the device.
        native_dtypes: those of fp16, bf16, fp32, fp64 that the device computes in hardware; emulation does not count.
    """

    rank: int
    host: str
    device_kind: DeviceKind
    device_name: str
    native_dtypes: frozenset[str]


@dataclass(frozen=True, slots=True)
class AgreedPrecision:
    """One precision for all ranks, and why.

    Attributes:
        precision: what every rank trains in.
        reasons: in plain words, for the plan.
        notices: what the user should be told at once: a wish that was not granted, a fallback.
    """

    precision: Precision
    reasons: tuple[str, ...]
    notices: tuple[str, ...] = ()

    @property
    def has_loss_scale(self) -> bool:
        """Whether a gradient scaler is in play: fp16's range is too small for gradients."""
        return self.precision is Precision.FP16_MIXED


def normalize_precision(value: object) -> Precision:
    """Map any spelling of a precision to Lightning 2's name.

    Args:
        value: a string in any case ('fp16', 'BF16_mixed', ...), 16, 32, 64, or a `Precision`.

    Raises:
        PrecisionError: `value` is no spelling of a precision; carries the nearest one.
    """
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        key = str(value).strip().lower().replace("_", "-")
        if key in _SPELLINGS:
            return _SPELLINGS[key]
        close = difflib.get_close_matches(key, _SPELLINGS, n=1, cutoff=0.0)
        nearest = close[0] if close else Precision.FP32_TRUE.value
    else:
        nearest = Precision.FP32_TRUE.value
    valid = ", ".join([*Precision, "and their short forms", *(s for s in _SPELLINGS if s not in set(Precision))])
    raise PrecisionError(
        f"{value!r} is not a precision; valid are {valid}; nearest is {nearest!r}", value=value, nearest=nearest
    )


def compute_effective_precision(
    requested: str,
    use_amp: bool | None,
    cuda_available: bool,
    use_gpu: bool,
    *,
    bf16_supported: bool = True,
    mps_available: bool = False,
) -> str:
    """The precision of one process in its caller's short spelling ('16', 'bf16', '32').

    Args:
        requested: any spelling that `normalize_precision` takes.
        use_amp: None leaves `requested` as it is; True wishes for mixed precision; False turns it off.
        cuda_available: whether a CUDA device can be used.
        use_gpu: whether the user wants one used.
        bf16_supported: whether that device computes bf16 natively.
        mps_available: whether this is an Apple GPU; Lightning has no autocast there, so it changes nothing.

    Raises:
        PrecisionError: `requested` is no precision, whatever `use_amp` says.
    """
    del mps_available
    normalized = normalize_precision(requested)
    if use_amp is None:
        return str(requested)
    if not (use_amp and cuda_available and use_gpu):
        return "32"
    return "bf16" if _DTYPE[normalized] == "bf16" and bf16_supported else "16"


def reconcile(
    request: object, capabilities: Iterable[RankCapability], *, use_amp: bool | None = None, fallback: bool = False
) -> AgreedPrecision:
    """Agree on one precision that every rank can run.

    `use_amp=True` is a wish: granted if every rank's device has it natively, 32-true otherwise. Any other explicit
    `request` is an order: granted, or refused by name of the ranks that cannot. 'auto' takes bf16-mixed if every rank
    is native in it, else 16-mixed if every rank is a CUDA device, else 32-true.

    Args:
        request: 'auto' or any spelling of a precision.
        capabilities: one record per rank, in any order.
        use_amp: True, False ('32-true') or None (no wish).
        fallback: turn an order that cannot be met into the best precision that all ranks share.

    Raises:
        PrecisionError: no such precision, or an order that some rank cannot run; names ranks, hosts, devices and the
            best shared precision.
        ValueError: `capabilities` is empty.
    """
    ranks = sorted(capabilities, key=lambda c: c.rank)
    if not ranks:
        raise ValueError("reconcile needs the capability of at least one rank, none was given")
    is_auto = isinstance(request, str) and request.strip().lower() == AUTO
    order = None if is_auto else normalize_precision(request)
    best, best_reason = _best_shared(ranks)
    if use_amp is False:
        return AgreedPrecision(Precision.FP32_TRUE, ("use_amp is false: no mixed precision",))
    if use_amp:
        return _grant_wish(order, ranks, best, best_reason)
    if order is None:
        return AgreedPrecision(best, (f"precision auto: {best_reason}",))
    unable = _unable(order, ranks)
    if not unable:
        return AgreedPrecision(
            order, (f"precision {order} was asked for, and every rank can", *_cpu_note(order, ranks))
        )
    if fallback:
        notice = f"precision {order} is not possible on {_name(unable)}; falling back to {best} ({best_reason})"
        return AgreedPrecision(best, (notice,), (notice,))
    raise PrecisionError(
        f"precision {order} was asked for, but {_name(unable)} cannot run it natively; the best precision that all "
        f"{len(ranks)} ranks share is {best}: set `precision: {best}`, or `precision_fallback: true` to take it",
        value=request,
        ranks=[c.rank for c in unable],
        nearest=best,
    )


def _grant_wish(
    order: Precision | None, ranks: list[RankCapability], best: Precision, best_reason: str
) -> AgreedPrecision:
    """Mixed precision if every device has it natively, 32-true with a notice otherwise."""
    wants_bf16 = order is None or _DTYPE[order] == "bf16"
    if wants_bf16 and best is Precision.BF16_MIXED:
        return AgreedPrecision(best, (f"use_amp: {best_reason}",))
    not_cuda = [c for c in ranks if c.device_kind != "cuda"]
    if not_cuda:
        notice = f"use_amp was wished for, but {_not_native(not_cuda, ranks)}; training in 32-true"
        return AgreedPrecision(Precision.FP32_TRUE, (notice,), (notice,))
    if order is not None and wants_bf16:
        notice = f"use_amp with {order} was wished for, but {best_reason}; training in 16-mixed"
        return AgreedPrecision(Precision.FP16_MIXED, (notice,), (notice,))
    return AgreedPrecision(Precision.FP16_MIXED, ("use_amp: every rank is a CUDA device",))


def _best_shared(ranks: list[RankCapability]) -> tuple[Precision, str]:
    """The 'auto' rule. One rank without a capability decides for all."""
    without_bf16 = _unable_natively(Precision.BF16_MIXED, ranks)
    if not without_bf16:
        return Precision.BF16_MIXED, "every rank computes bf16 natively"
    not_cuda = [c for c in ranks if c.device_kind != "cuda"]
    if not not_cuda:
        return Precision.FP16_MIXED, f"every rank is a CUDA device, but not native in bf16: {_name(without_bf16)}"
    return Precision.FP32_TRUE, _not_native(not_cuda, ranks)


def _not_native(unable: list[RankCapability], ranks: list[RankCapability]) -> str:
    if len(unable) == len(ranks):
        return f"mixed precision is native to no rank: {_name(unable, limit=2)}"
    return f"mixed precision is not native to {_name(unable)}"


def _unable(order: Precision, ranks: list[RankCapability]) -> list[RankCapability]:
    """The ranks that cannot run `order`. A run on CPUs alone may: torch autocasts there, which is for debugging."""
    if order is Precision.FP32_TRUE or all(c.device_kind == "cpu" for c in ranks):
        return []
    return _unable_natively(order, ranks)


def _unable_natively(order: Precision, ranks: list[RankCapability]) -> list[RankCapability]:
    """The ranks whose device does not have `order` in hardware, as 'auto' and an order alike count it."""
    if order is Precision.FP16_MIXED:
        # Every CUDA device that torch still supports computes fp16; Lightning has no autocast for Apple's GPUs.
        return [c for c in ranks if c.device_kind != "cuda"]
    no_autocast = "mps" if order is Precision.BF16_MIXED else None
    return [c for c in ranks if _DTYPE[order] not in c.native_dtypes or c.device_kind == no_autocast]


def _cpu_note(order: Precision, ranks: list[RankCapability]) -> tuple[str, ...]:
    if order is not Precision.FP32_TRUE and all(c.device_kind == "cpu" for c in ranks):
        return (f"on a CPU {order} is for debugging: it shows the same numbers, not the same speed",)
    return ()


def _name(ranks: list[RankCapability], limit: int = 8) -> str:
    """'rank 3 (node7, Tesla V100)', at most `limit` of them."""
    named = ", ".join(f"rank {c.rank} ({c.host}, {c.device_name})" for c in ranks[:limit])
    return named if len(ranks) <= limit else f"{named} and {len(ranks) - limit} more"
