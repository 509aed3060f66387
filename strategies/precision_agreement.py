"""Agree on one precision for all ranks: from the request, their devices, and the precision of a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from strategies.deepspeed_precision import (
    disabled_dtypes,
    precision_blocks,
    precision_conflicts,
    requested_precision,
    without_precision,
)
from strategies.precision_names import AUTO, DTYPE, Precision, PrecisionError, normalize_precision
from strategies.repeated import RepeatedRecords, count_groups, select
from strategies.units import join_some

DeviceKind = Literal["cpu", "cuda", "mps"]
OnChange = Literal["notice", "error"]


@dataclass(frozen=True, slots=True)
class RankCapability:
    """The capability of one rank's device.

    Attributes:
        native_dtypes: those of fp16, bf16, fp32, fp64 that the device supports in hardware; emulation does not count.
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
        notices: for the user: mixed precision that is not available, a fallback, a change on resume.
        deepspeed_blocks: DeepSpeed's `fp16` and `bf16` blocks for this precision; None without a DeepSpeed config.
        changed_from: the checkpoint's precision, if it is different.
    """

    precision: Precision
    reasons: tuple[str, ...]
    notices: tuple[str, ...] = ()
    deepspeed_blocks: Mapping[str, Mapping[str, Any]] | None = None
    changed_from: Precision | None = None

    @property
    def has_loss_scale(self) -> bool:
        """Whether gradients are scaled, as the range of fp16 is too small; DeepSpeed does it in 16-true too."""
        if self.deepspeed_blocks is not None:
            return bool(self.deepspeed_blocks["fp16"]["enabled"])
        return self.precision is Precision.FP16_MIXED


def reconcile(
    request: object,
    capabilities: Iterable[RankCapability],
    *,
    use_amp: bool | None = None,
    fallback: bool = False,
    deepspeed_config: Mapping[str, Any] | None = None,
    checkpoint: object = None,
    on_change: OnChange = "notice",
    world_size: int | None = None,
) -> AgreedPrecision:
    """Agree on one precision that every rank can run.

    With `use_amp=True` mixed precision is used if every rank's device has it natively, 32-true otherwise. Any other
    explicit `request` must be met: the error names the ranks that cannot run it. 'auto' uses what the DeepSpeed config
    requests, else the checkpoint's precision if every rank can run it, else bf16-mixed if it is native on every rank,
    else 16-mixed if every rank is a CUDA device, else 32-true. What the DeepSpeed config disables is not used.

    Args:
        request: 'auto' or any spelling of a precision.
        capabilities: one record per rank, in any order.
        use_amp: True, False ('32-true') or None (decided by `request`).
        fallback: replace a request that cannot be met by the best precision that all ranks share.
        deepspeed_config: DeepSpeed's settings; `{}` if DeepSpeed is used without any.
        checkpoint: the precision of the checkpoint to resume from; None without a checkpoint, or if it does not
            record one.
        on_change: what to do if the agreed precision differs from the checkpoint's.
        world_size: expected number of ranks; None for the number of `capabilities`.

    Raises:
        PrecisionError: no such precision; a request that some rank cannot run (names ranks, hosts, devices and the
            best shared precision); conflicts with the DeepSpeed config (all of them); another precision than the
            checkpoint's with `on_change='error'`.
        ValueError: `capabilities` is empty, or a rank is missing or there twice.
    """
    ranks = _complete(capabilities, world_size)
    is_auto = isinstance(request, str) and request.strip().lower() == AUTO
    explicit = None if is_auto else normalize_precision(request)
    before = None if checkpoint is None else normalize_precision(checkpoint)
    source = f"precision {explicit} was requested"
    if explicit is None and deepspeed_config is not None:
        explicit = requested_precision(deepspeed_config)
        source = f"the DeepSpeed config requests {explicit}"
    disabled = disabled_dtypes(deepspeed_config) if is_auto and deepspeed_config is not None else frozenset[str]()
    if use_amp is not None or explicit is not None or before is None:
        agreed = _decide(_Request(explicit, request, source, use_amp, fallback), ranks, disabled)
    else:
        agreed = _keep_precision(before, ranks, disabled)
    if deepspeed_config is not None and fallback and use_amp is None and explicit not in (None, agreed.precision):
        # The fallback applies to a request in the DeepSpeed config too.
        deepspeed_config = without_precision(deepspeed_config)
    return _with_deepspeed(_with_change(agreed, before, on_change), deepspeed_config)


def _complete(capabilities: Iterable[RankCapability], world_size: int | None) -> Sequence[RankCapability]:
    if isinstance(capabilities, RepeatedRecords) and capabilities and world_size in (None, len(capabilities)):
        return capabilities  # complete by construction
    ranks = sorted(capabilities, key=lambda c: c.rank)
    if not ranks:
        raise ValueError("reconcile needs the capability of at least one rank, none was given")
    seen = {c.rank for c in ranks}
    if len(seen) < len(ranks):
        twice = [str(rank) for rank, count in Counter(c.rank for c in ranks).items() if count > 1]
        raise ValueError(f"reconcile needs one capability for each rank; there are several of rank {join_some(twice)}")
    if world_size is not None and seen != set(range(world_size)):
        missing = [str(rank) for rank in range(world_size) if rank not in seen]
        what = f"rank {join_some(missing)} is missing" if missing else f"there are ranks up to {ranks[-1].rank}"
        raise ValueError(f"reconcile needs the capability of {world_size} ranks; {what}")
    return ranks


@dataclass(frozen=True, slots=True)
class _Request:
    """The request: `explicit` is None for 'auto', `source` is for messages; see `reconcile`."""

    explicit: Precision | None
    given: object
    source: str
    use_amp: bool | None
    fallback: bool


def _decide(request: _Request, ranks: Sequence[RankCapability], disabled: frozenset[str]) -> AgreedPrecision:
    """The precision for a request on these ranks."""
    best, best_reason = _best_shared(ranks, disabled)
    explicit = request.explicit
    if request.use_amp is False:
        return AgreedPrecision(Precision.FP32_TRUE, ("use_amp is false: no mixed precision",))
    if request.use_amp:
        return _mixed_if_native(explicit, ranks, best, best_reason)
    if explicit is None:
        return AgreedPrecision(best, (f"precision auto: {best_reason}",))
    unable = _unable(explicit, ranks)
    if not unable:
        return AgreedPrecision(explicit, (f"{request.source}, and every rank can", *_cpu_note(explicit, ranks)))
    if request.fallback:
        notice = f"precision {explicit} is not possible on {_name(unable)}; falling back to {best} ({best_reason})"
        return AgreedPrecision(best, (notice,), (notice,))
    raise PrecisionError(
        f"{request.source}, but {_name(unable)} cannot run it natively; the best precision that all "
        f"{len(ranks)} ranks share is {best}: set `precision: {best}`, or `precision_fallback: true` to use it",
        value=request.given,
        ranks=[c.rank for c in unable],
        nearest=best,
    )


def _mixed_if_native(
    explicit: Precision | None, ranks: Sequence[RankCapability], best: Precision, best_reason: str
) -> AgreedPrecision:
    """Mixed precision if every device has it natively, 32-true with a notice otherwise."""
    wants_bf16 = explicit is None or DTYPE[explicit] == "bf16"
    if wants_bf16 and best is Precision.BF16_MIXED:
        return AgreedPrecision(best, (f"use_amp: {best_reason}",))
    not_cuda = select(ranks, lambda c: c.device_kind != "cuda")
    if not_cuda:
        notice = f"use_amp was requested, but {_not_native(not_cuda, ranks)}; training in 32-true"
        return AgreedPrecision(Precision.FP32_TRUE, (notice,), (notice,))
    if explicit is not None and wants_bf16:
        notice = f"use_amp with {explicit} was requested, but {best_reason}; training in 16-mixed"
        return AgreedPrecision(Precision.FP16_MIXED, (notice,), (notice,))
    return AgreedPrecision(Precision.FP16_MIXED, ("use_amp: every rank is a CUDA device",))


def _keep_precision(before: Precision, ranks: Sequence[RankCapability], disabled: frozenset[str]) -> AgreedPrecision:
    """'auto' on a resume: another machine should not change the loss curve."""
    unable = _unable(before, ranks)
    if not unable and DTYPE[before] not in disabled:
        reason = f"precision auto: the checkpoint was trained in {before}, and every rank can"
        return AgreedPrecision(before, (reason, *_cpu_note(before, ranks)))
    best, best_reason = _best_shared(ranks, disabled)
    why = f"{_name(unable)} cannot run" if unable else "the DeepSpeed config disables"
    reason = f"precision auto: not the checkpoint's {before}, which {why}; {best_reason}"
    return AgreedPrecision(best, (reason,))


def _with_change(agreed: AgreedPrecision, before: Precision | None, on_change: OnChange) -> AgreedPrecision:
    """Report that the checkpoint had another precision, or refuse it."""
    if before is None or before is agreed.precision:
        return agreed
    text = f"the checkpoint was trained in {before}, this run trains in {agreed.precision}"
    if on_change == "error":
        raise PrecisionError(
            f"{text} ({agreed.reasons[0]}), and on_precision_change is error; set `precision: {before}`, "
            "or `on_precision_change: notice`",
            value=agreed.precision.value,
            nearest=before,
        )
    scale = ""
    if agreed.precision is Precision.FP16_MIXED:
        scale = "; the loss scale starts at its initial value"
    elif before is Precision.FP16_MIXED:
        scale = "; its loss scale is no longer needed"
    return replace(agreed, notices=(*agreed.notices, text + scale), changed_from=before)


def _with_deepspeed(agreed: AgreedPrecision, config: Mapping[str, Any] | None) -> AgreedPrecision:
    if config is None:
        return agreed
    conflicts = precision_conflicts(agreed.precision, config)
    if conflicts:
        raise PrecisionError(
            f"the DeepSpeed config contradicts precision {agreed.precision} ({agreed.reasons[0]}):\n"
            + "\n".join(f"  {conflict}" for conflict in conflicts),
            value=agreed.precision.value,
        )
    return replace(agreed, deepspeed_blocks=precision_blocks(agreed.precision, config))


def _best_shared(ranks: Sequence[RankCapability], disabled: frozenset[str] = frozenset()) -> tuple[Precision, str]:
    """The rule of 'auto', without the disabled dtypes. One rank that lacks a capability decides for all."""
    without_bf16 = _unable_natively(Precision.BF16_MIXED, ranks)
    if not without_bf16 and "bf16" not in disabled:
        return Precision.BF16_MIXED, "every rank computes bf16 natively"
    not_cuda = select(ranks, lambda c: c.device_kind != "cuda")
    why = f"not native in bf16: {_name(without_bf16)}" if without_bf16 else "the DeepSpeed config disables bf16"
    if not not_cuda and "fp16" not in disabled:
        return Precision.FP16_MIXED, f"every rank is a CUDA device, but {why}"
    if not not_cuda or not without_bf16:
        return Precision.FP32_TRUE, f"the DeepSpeed config disables {' and '.join(sorted(disabled))}"
    return Precision.FP32_TRUE, _not_native(not_cuda, ranks)


def _not_native(unable: Sequence[RankCapability], ranks: Sequence[RankCapability]) -> str:
    if len(unable) == len(ranks):
        return f"mixed precision is native on no rank: {_name(unable, limit=2)}"
    return f"mixed precision is not native on {_name(unable)}"


def _unable(precision: Precision, ranks: Sequence[RankCapability]) -> Sequence[RankCapability]:
    """The ranks that cannot run a precision. On CPUs only all can: torch has autocast there, for debugging."""
    if precision is Precision.FP32_TRUE or _only_cpus(ranks):
        return []
    return _unable_natively(precision, ranks)


def _unable_natively(precision: Precision, ranks: Sequence[RankCapability]) -> Sequence[RankCapability]:
    """The ranks whose device does not support a precision in hardware."""
    if precision is Precision.FP16_MIXED:
        # Every CUDA device that torch supports has fp16; Lightning has no autocast for Apple's GPUs.
        return select(ranks, lambda c: c.device_kind != "cuda")
    no_autocast = "mps" if precision is Precision.BF16_MIXED else None
    return select(ranks, lambda c: DTYPE[precision] not in c.native_dtypes or c.device_kind == no_autocast)


def _only_cpus(ranks: Sequence[RankCapability]) -> bool:
    return all(c.device_kind == "cpu" for c, _ in count_groups(ranks))


def _cpu_note(precision: Precision, ranks: Sequence[RankCapability]) -> tuple[str, ...]:
    if precision is not Precision.FP32_TRUE and _only_cpus(ranks):
        return (f"on a CPU {precision} is for debugging: it computes the same numbers, but not faster",)
    return ()


def _name(ranks: Sequence[RankCapability], limit: int = 8) -> str:
    """'rank 3 (node7, Tesla V100)', at most `limit` of them."""
    named = ", ".join(f"rank {c.rank} ({c.host}, {c.device_name})" for c in ranks[:limit])
    return named if len(ranks) <= limit else f"{named} and {len(ranks) - limit} more"
