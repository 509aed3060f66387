"""The loss scale: a GradScaler that counts on the device, and reading the scale of any scaler.

Dynamic loss scaling: Micikevicius et al., "Mixed Precision Training", 2018, section 3.2.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from typing_extensions import override

_log = logging.getLogger(__name__)
# Below 1 torch warns that "something is likely wrong" (torch/amp/grad_scaler.py).
DEFAULT_FLOOR = 1.0
_COUNTS = ("skipped_steps", "overflows", "floor_steps")
_STATE = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
# The device has the scale as float32 and counts as int32: larger values would be infinite, or raise.
_COUNTED = ("growth_interval", "_growth_tracker")
_LARGEST, _LARGEST_COUNT = torch.finfo(torch.float32).max, torch.iinfo(torch.int32).max


class LossScaleError(ValueError):
    """Something scales the loss, but the scale cannot be read; `__cause__` is the error that it raised, if any."""


@dataclass(frozen=True, slots=True)
class LossScaleSample:
    """The loss scale at one moment.

    Attributes:
        scale: factor of the loss; 0, infinite or NaN if the training has failed.
        dynamic: whether overflows change it.
        skipped_steps: optimizer steps skipped because of an overflow; None if they are not counted.
        growth_tracker: steps since the scale last changed; None if they are not counted.
        floor_steps: consecutive steps, up to this one, with the scale at its floor; None if they are not counted.
    """

    scale: float
    dynamic: bool
    source: Literal["torch", "deepspeed", "other"]
    skipped_steps: int | None = None
    growth_tracker: int | None = None
    floor_steps: int | None = None


@dataclass(frozen=True, slots=True)
class LiveScale:
    """As `LossScaleSample`, with numbers that may still be on the device, as 0-dim tensors."""

    scale: float | Tensor
    dynamic: bool
    source: Literal["torch", "deepspeed", "other"]
    skipped_steps: int | Tensor | None = None
    growth_tracker: int | Tensor | None = None
    floor_steps: int | Tensor | None = None


class CountingGradScaler(torch.amp.GradScaler):
    """torch's GradScaler, which also counts skipped steps and overflows on the device without a host sync.

    Its state contains the counts, and a plain scaler loads that state.

    Args:
        device: kind of device, 'cuda' or 'cpu'.
        floor: a scale at or below it counts as collapsed.
        options: further arguments of `torch.amp.GradScaler`.
    """

    def __init__(self, device: str = "cuda", *, floor: float = DEFAULT_FLOOR, **options: Any) -> None:
        super().__init__(device, **options)
        self.floor = floor
        # Skipped steps that torch has already read on the host; a fused optimizer skips on the device.
        self.seen_skips = 0
        # Counts from a checkpoint, until the device is known.
        self._loaded = dict.fromkeys(_COUNTS, 0)
        self._counts: dict[str, Tensor] | None = None

    @classmethod
    def adopt(cls, scaler: torch.amp.GradScaler, floor: float = DEFAULT_FLOOR) -> CountingGradScaler:
        """A counting scaler with the settings and scale of an enabled plain one. Call it between two steps."""
        made = cls(scaler._device, floor=floor)
        made.load_state_dict(scaler.state_dict())
        return made

    @override
    def update(self, new_scale: float | Tensor | None = None) -> None:
        """As torch's, with counting. Adds no host sync."""
        if not self.is_enabled() or new_scale is not None or self._scale is None:
            super().update(new_scale)
            return
        found = [
            flag.to(self._scale.device, non_blocking=True)
            for state in self._per_optimizer_states.values()
            for flag in state["found_inf_per_device"].values()
        ]
        counts = self._on_device(self._scale.device)
        # Few small kernels, as this runs in every step.
        if len(found) == 1:
            counts["skipped_steps"].add_(found[0])
            counts["overflows"].add_(found[0])
        elif found:
            overflows = torch.stack(found).sum()
            counts["skipped_steps"].add_(overflows.clamp(max=1))
            counts["overflows"].add_(overflows)
        super().update()
        counts["floor_steps"].add_(1).mul_(self._scale <= self.floor)

    @override
    def _maybe_opt_step(
        self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        """As torch's, and count a skipped step."""
        if sum(found.item() for found in optimizer_state["found_inf_per_device"].values()):
            self.seen_skips += 1
            return None
        return optimizer.step(*args, **kwargs)

    def _on_device(self, device: torch.device) -> dict[str, Tensor]:
        if self._counts is None:
            # float64 counts exactly for any training. The copy to the device happens once.
            self._counts = {
                name: torch.full((), number, dtype=torch.float64, device=device)
                for name, number in self._loaded.items()
            }
        return self._counts

    def live(self) -> LiveScale:
        """Scale and counts, without waiting for the device."""
        counts: Any = self._loaded if self._counts is None else self._counts
        scale = self._init_scale if self._scale is None else self._scale
        tracker = self._init_growth_tracker if self._growth_tracker is None else self._growth_tracker
        return LiveScale(scale, True, "torch", counts["skipped_steps"], tracker, counts["floor_steps"])

    def counts(self) -> dict[str, int]:
        """Skipped steps, overflows (of all optimizers), consecutive steps at the floor. Waits for the device."""
        return {name: int(value) for name, value in (self._counts or self._loaded).items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the counts."""
        state = super().state_dict()
        return {**state, "counts": self.counts()} if state else state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved scale; if it is damaged or empty, log a warning and start again."""
        if not self.is_enabled():
            return  # as torch's: nothing is scaled
        problem = state_problem(state_dict)
        if problem is not None:
            _log.warning("the saved loss scale is not used: %s; it starts again at %g", problem, self._init_scale)
            return
        super().load_state_dict(state_dict)
        saved = state_dict.get("counts")
        counts = cast(Mapping[str, Any], saved) if isinstance(saved, Mapping) else {}
        # Only the scale must be valid; an invalid count starts at 0.
        self._loaded = {
            name: n if isinstance(n := counts.get(name), int) and 0 <= n <= _LARGEST_COUNT else 0 for name in _COUNTS
        }
        self._counts = None


def state_problem(state: Any) -> str | None:
    """What is wrong with the saved state of a GradScaler; None if it can be restored."""
    if not isinstance(state, Mapping):
        return f"it is a {type(state).__name__}, not a mapping"
    values = cast(Mapping[str, Any], state)
    missing = [key for key in _STATE if key not in values]
    if missing:
        return f"it lacks {', '.join(missing)}" if values else "it is empty"
    for key in _STATE:
        value = values[key]
        kind, largest = (int, _LARGEST_COUNT) if key in _COUNTED else (int | float, _LARGEST)
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value <= largest:
            return f"{key} is {reprlib.repr(value)}"
    if not values["scale"] or values["growth_factor"] <= 1 or not 0 < values["backoff_factor"] < 1:
        return "scale, growth_factor or backoff_factor is out of range"
    return None


def find_loss_scale(trainer: Any) -> LiveScale | None:
    """The loss scale of a Trainer, without waiting for the device; None if nothing scales the loss.

    A plain object with `strategy.precision_plugin.scaler` is enough.

    Raises:
        LossScaleError: the scaler raises an error, or returns something that is no number.
    """
    try:
        return _live_scale(trainer)
    except LossScaleError:
        raise
    except Exception as error:
        raise LossScaleError(f"reading the loss scale raised {type(error).__name__}: {error}") from error


def _live_scale(trainer: Any) -> LiveScale | None:
    strategy = getattr(trainer, "strategy", None)
    plugin = getattr(strategy, "precision_plugin", None)
    scaler = getattr(plugin, "scaler", None)
    if isinstance(scaler, CountingGradScaler):
        return scaler.live() if scaler.is_enabled() else None
    if isinstance(scaler, torch.amp.GradScaler):
        if not scaler.is_enabled():
            return None
        held = scaler._get_scale_async()
        return LiveScale(_call_get_scale(scaler) if held is None else held, True, "torch", None, scaler._growth_tracker)
    if scaler is not None:
        return LiveScale(_call_get_scale(scaler), True, "other")
    return _deepspeed_scale(strategy)


def read_loss_scale(trainer: Any) -> LossScaleSample | None:
    """The loss scale now, as Python numbers; None if nothing scales the loss. Waits for the device.

    Raises:
        LossScaleError: see `find_loss_scale`.
    """
    live = find_loss_scale(trainer)
    if live is None:
        return None
    counts = (live.skipped_steps, live.growth_tracker, live.floor_steps)
    return LossScaleSample(
        float(live.scale), live.dynamic, live.source, *(None if count is None else int(count) for count in counts)
    )


def _call_get_scale(scaler: Any) -> float:
    """The result of `get_scale()`, checked to be a number."""
    try:
        value = scaler.get_scale()
    except Exception as error:
        raise LossScaleError(f"{type(scaler).__name__}.get_scale() raised {type(error).__name__}: {error}") from error
    return _number(value, f"{type(scaler).__name__}.get_scale()")


def _number(value: Any, origin: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LossScaleError(f"{origin} is {value!r}, not a number")
    return float(value)


def _deepspeed_scale(strategy: Any) -> LiveScale | None:
    """The current scale of a DeepSpeed engine; `engine.loss_scale()` is the configured one.

    ZeRO's optimizers have a scaler, the others the scale itself (deepspeed/runtime/zero, runtime/fp16).
    """
    engine = getattr(strategy, "deepspeed_engine", None)
    optimizer = getattr(engine, "optimizer", None)
    if optimizer is None or not _is_fp16(engine):
        return None
    scaler = getattr(optimizer, "loss_scaler", None)
    value = getattr(optimizer, "cur_scale", getattr(scaler, "cur_scale", None))
    if value is None:
        return None
    settings = getattr(optimizer, "loss_scale_config", scaler)
    dynamic = bool(getattr(settings, "dynamic_loss_scale", getattr(settings, "dynamic", False)))
    skipped = getattr(engine, "skipped_steps", None)
    skipped = skipped if isinstance(skipped, int) else None
    return LiveScale(_number(value, "DeepSpeed's cur_scale"), dynamic, "deepspeed", skipped)


def _is_fp16(engine: Any) -> bool:
    enabled = getattr(engine, "fp16_enabled", None)
    return bool(enabled() if callable(enabled) else enabled)
