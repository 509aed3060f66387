"""The rule by which all ranks get one precision, from what was asked, what they can, and what a checkpoint was in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from strategies.deepspeed_precision import (
    ordered_precision,
    precision_blocks,
    precision_conflicts,
    switched_off,
    without_orders,
)
from strategies.precision_names import AUTO, DTYPE, Precision, PrecisionError, normalize_precision
from strategies.repeated import RepeatedRecords, counted, where

DeviceKind = Literal["cpu", "cuda", "mps"]
OnChange = Literal["notice", "error"]


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
        notices: what the user should be told at once: a wish that was not granted, a fallback, a change on resume.
        deepspeed_blocks: DeepSpeed's `fp16` and `bf16` blocks for this precision; None without a DeepSpeed config.
        changed_from: the checkpoint's precision, where it is another one.
    """

    precision: Precision
    reasons: tuple[str, ...]
    notices: tuple[str, ...] = ()
    deepspeed_blocks: Mapping[str, Mapping[str, Any]] | None = None
    changed_from: Precision | None = None

    @property
    def has_loss_scale(self) -> bool:
        """Whether gradients are scaled, as fp16's range is too small for them; DeepSpeed does it in 16-true too."""
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

    `use_amp=True` is a wish: granted if every rank's device has it natively, 32-true otherwise. Any other explicit
    `request` is an order: granted, or refused by name of the ranks that cannot. 'auto' takes what the DeepSpeed config
    orders, else the checkpoint's precision if every rank can run it, else bf16-mixed if every rank is native in it,
    else 16-mixed if every rank is a CUDA device, else 32-true; what the DeepSpeed config switches off is not taken.

    Args:
        request: 'auto' or any spelling of a precision.
        capabilities: one record per rank, in any order.
        use_amp: True, False ('32-true') or None (no wish).
        fallback: turn an order that cannot be met into the best precision that all ranks share.
        deepspeed_config: DeepSpeed's own settings; `{}` where DeepSpeed is used without any.
        checkpoint: the precision that the checkpoint to resume from was trained in; None if there is none, or if it
            does not say.
        on_change: what to do if the agreed precision is not the checkpoint's.
        world_size: number of ranks that there should be; None takes as many as `capabilities` has.

    Raises:
        PrecisionError: no such precision; an order that some rank cannot run (names ranks, hosts, devices and the best
            shared precision); conflicts with the DeepSpeed config (all of them); another precision than the
            checkpoint's with `on_change='error'`.
        ValueError: `capabilities` is empty, lacks a rank or has one twice.
    """
    ranks = _complete(capabilities, world_size)
    is_auto = isinstance(request, str) and request.strip().lower() == AUTO
    order = None if is_auto else normalize_precision(request)
    before = None if checkpoint is None else normalize_precision(checkpoint)
    source = f"precision {order} was asked for"
    if order is None and deepspeed_config is not None:
        order = ordered_precision(deepspeed_config)
        source = f"the DeepSpeed config orders {order}"
    off = switched_off(deepspeed_config) if is_auto and deepspeed_config is not None else frozenset[str]()
    if use_amp is not None or order is not None or before is None:
        agreed = _decide(order, source, request, ranks, use_amp, fallback, off)
    else:
        agreed = _as_before(before, ranks, off)
    if deepspeed_config is not None and fallback and use_amp is None and order not in (None, agreed.precision):
        # The fallback was allowed to outweigh the order, wherever that stands.
        deepspeed_config = without_orders(deepspeed_config)
    return _with_deepspeed(_with_change(agreed, before, on_change), deepspeed_config)


def _complete(capabilities: Iterable[RankCapability], world_size: int | None) -> Sequence[RankCapability]:
    if isinstance(capabilities, RepeatedRecords) and capabilities and world_size in (None, len(capabilities)):
        return capabilities  # numbered from 0 as they are made
    ranks = sorted(capabilities, key=lambda c: c.rank)
    if not ranks:
        raise ValueError("reconcile needs the capability of at least one rank, none was given")
    seen = {c.rank for c in ranks}
    if len(seen) < len(ranks):
        twice = sorted({c.rank for n, c in enumerate(ranks[1:]) if c.rank == ranks[n].rank})
        raise ValueError(f"reconcile needs one capability for each rank; there are several of rank {_few(twice)}")
    if world_size is not None and seen != set(range(world_size)):
        missing = sorted(set(range(world_size)) - seen)
        what = f"rank {_few(missing)} is missing" if missing else f"there are ranks up to {ranks[-1].rank}"
        raise ValueError(f"reconcile needs the capability of {world_size} ranks; {what}")
    return ranks


def _few(numbers: list[int], limit: int = 8) -> str:
    text = ", ".join(map(str, numbers[:limit]))
    return text if len(numbers) <= limit else f"{text} and {len(numbers) - limit} more"


def _decide(
    order: Precision | None,
    source: str,
    request: object,
    ranks: Sequence[RankCapability],
    use_amp: bool | None,
    fallback: bool,
    off: frozenset[str],
) -> AgreedPrecision:
    """A wish, an order or 'auto', on these ranks."""
    best, best_reason = _best_shared(ranks, off)
    if use_amp is False:
        return AgreedPrecision(Precision.FP32_TRUE, ("use_amp is false: no mixed precision",))
    if use_amp:
        return _grant_wish(order, ranks, best, best_reason)
    if order is None:
        return AgreedPrecision(best, (f"precision auto: {best_reason}",))
    unable = _unable(order, ranks)
    if not unable:
        return AgreedPrecision(order, (f"{source}, and every rank can", *_cpu_note(order, ranks)))
    if fallback:
        notice = f"precision {order} is not possible on {_name(unable)}; falling back to {best} ({best_reason})"
        return AgreedPrecision(best, (notice,), (notice,))
    raise PrecisionError(
        f"{source}, but {_name(unable)} cannot run it natively; the best precision that all "
        f"{len(ranks)} ranks share is {best}: set `precision: {best}`, or `precision_fallback: true` to take it",
        value=request,
        ranks=[c.rank for c in unable],
        nearest=best,
    )


def _grant_wish(
    order: Precision | None, ranks: Sequence[RankCapability], best: Precision, best_reason: str
) -> AgreedPrecision:
    """Mixed precision if every device has it natively, 32-true with a notice otherwise."""
    wants_bf16 = order is None or DTYPE[order] == "bf16"
    if wants_bf16 and best is Precision.BF16_MIXED:
        return AgreedPrecision(best, (f"use_amp: {best_reason}",))
    not_cuda = where(ranks, lambda c: c.device_kind != "cuda")
    if not_cuda:
        notice = f"use_amp was wished for, but {_not_native(not_cuda, ranks)}; training in 32-true"
        return AgreedPrecision(Precision.FP32_TRUE, (notice,), (notice,))
    if order is not None and wants_bf16:
        notice = f"use_amp with {order} was wished for, but {best_reason}; training in 16-mixed"
        return AgreedPrecision(Precision.FP16_MIXED, (notice,), (notice,))
    return AgreedPrecision(Precision.FP16_MIXED, ("use_amp: every rank is a CUDA device",))


def _as_before(before: Precision, ranks: Sequence[RankCapability], off: frozenset[str]) -> AgreedPrecision:
    """'auto' on a resume: the loss curve should not bend because the machine is another one."""
    unable = _unable(before, ranks)
    if not unable and DTYPE[before] not in off:
        reason = f"precision auto: the checkpoint was trained in {before}, and every rank can"
        return AgreedPrecision(before, (reason, *_cpu_note(before, ranks)))
    best, best_reason = _best_shared(ranks, off)
    why = f"{_name(unable)} cannot run" if unable else "the DeepSpeed config switches off"
    reason = f"precision auto: not the checkpoint's {before}, which {why}; {best_reason}"
    return AgreedPrecision(best, (reason,))


def _with_change(agreed: AgreedPrecision, before: Precision | None, on_change: OnChange) -> AgreedPrecision:
    """Say that the checkpoint was in another precision, or refuse it."""
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
        scale = "; the loss scale starts afresh"
    elif before is Precision.FP16_MIXED:
        scale = "; its loss scale is not needed any more"
    return AgreedPrecision(
        agreed.precision, agreed.reasons, (*agreed.notices, text + scale), agreed.deepspeed_blocks, before
    )


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
    blocks = precision_blocks(agreed.precision, config)
    return AgreedPrecision(agreed.precision, agreed.reasons, agreed.notices, blocks, agreed.changed_from)


def _best_shared(ranks: Sequence[RankCapability], off: frozenset[str] = frozenset()) -> tuple[Precision, str]:
    """The 'auto' rule. One rank without a capability decides for all; `off` are dtypes that are not wanted."""
    without_bf16 = _unable_natively(Precision.BF16_MIXED, ranks)
    if not without_bf16 and "bf16" not in off:
        return Precision.BF16_MIXED, "every rank computes bf16 natively"
    not_cuda = where(ranks, lambda c: c.device_kind != "cuda")
    why = f"not native in bf16: {_name(without_bf16)}" if without_bf16 else "the DeepSpeed config switches bf16 off"
    if not not_cuda and "fp16" not in off:
        return Precision.FP16_MIXED, f"every rank is a CUDA device, but {why}"
    if not not_cuda or not without_bf16:
        return Precision.FP32_TRUE, f"the DeepSpeed config switches {' and '.join(sorted(off))} off"
    return Precision.FP32_TRUE, _not_native(not_cuda, ranks)


def _not_native(unable: Sequence[RankCapability], ranks: Sequence[RankCapability]) -> str:
    if len(unable) == len(ranks):
        return f"mixed precision is native to no rank: {_name(unable, limit=2)}"
    return f"mixed precision is not native to {_name(unable)}"


def _unable(order: Precision, ranks: Sequence[RankCapability]) -> Sequence[RankCapability]:
    """The ranks that cannot run `order`. A run on CPUs alone may: torch autocasts there, which is for debugging."""
    if order is Precision.FP32_TRUE or _only_cpus(ranks):
        return []
    return _unable_natively(order, ranks)


def _unable_natively(order: Precision, ranks: Sequence[RankCapability]) -> Sequence[RankCapability]:
    """The ranks whose device does not have `order` in hardware, as 'auto' and an order alike count it."""
    if order is Precision.FP16_MIXED:
        # Every CUDA device that torch still supports computes fp16; Lightning has no autocast for Apple's GPUs.
        return where(ranks, lambda c: c.device_kind != "cuda")
    no_autocast = "mps" if order is Precision.BF16_MIXED else None
    return where(ranks, lambda c: DTYPE[order] not in c.native_dtypes or c.device_kind == no_autocast)


def _only_cpus(ranks: Sequence[RankCapability]) -> bool:
    return all(c.device_kind == "cpu" for c, _ in counted(ranks))


def _cpu_note(order: Precision, ranks: Sequence[RankCapability]) -> tuple[str, ...]:
    if order is not Precision.FP32_TRUE and _only_cpus(ranks):
        return (f"on a CPU {order} is for debugging: it shows the same numbers, not the same speed",)
    return ()


def _name(ranks: Sequence[RankCapability], limit: int = 8) -> str:
    """'rank 3 (node7, Tesla V100)', at most `limit` of them."""
    named = ", ".join(f"rank {c.rank} ({c.host}, {c.device_name})" for c in ranks[:limit])
    return named if len(ranks) <= limit else f"{named} and {len(ranks) - limit} more"
