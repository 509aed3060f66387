"""DeepSpeed's `fp16` and `bf16` blocks: what they request, contradictions, and their content for a precision.

Lightning only adds keys to a DeepSpeed config: with bf16-mixed and a config that enables fp16, both would be enabled.
Keys, defaults and limits: deepspeed/runtime/precision_config.py of DeepSpeed 0.19.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from strategies.deepspeed_config import as_block
from strategies.precision_names import DTYPE, Precision, PrecisionError, normalize_precision

AUTO = "auto"
# DeepSpeed reads this name if `bf16` is missing.
_OLD_BF16 = "bfloat16"


@dataclass(frozen=True, slots=True)
class _Key:
    """One setting of a block: its default, and which values are valid."""

    default: object
    expected: str
    is_valid: Callable[[Any], bool]


def _is_number(value: object) -> bool:
    # Compared, not converted: an integer in JSON may be larger than any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_integer(value: object, minimum: int) -> bool:
    return _is_number(value) and float(value) == int(value) and value >= minimum  # type: ignore[arg-type, operator]


def _integer(default: int, minimum: int) -> _Key:
    return _Key(default, f"a whole number, at least {minimum}", lambda v: _is_integer(v, minimum))


def _boolean(default: bool) -> _Key:
    return _Key(default, "true or false", lambda v: isinstance(v, bool))


_FP16 = {
    "enabled": _boolean(default=False),
    "auto_cast": _boolean(default=False),
    "loss_scale": _Key(0, "a number, at least 0 (0: dynamic)", lambda v: _is_number(v) and v >= 0),
    # 2**127 is the largest power of two in fp32, which holds the scale.
    "initial_scale_power": _Key(16, "a whole number from 0 to 127", lambda v: _is_integer(v, 0) and v <= 127),
    "loss_scale_window": _integer(1000, 1),
    "hysteresis": _integer(2, 1),
    "consecutive_hysteresis": _boolean(default=False),
    "min_loss_scale": _integer(1, 1),
    "fp16_master_weights_and_grads": _boolean(default=False),
}
_BF16 = {
    "enabled": _boolean(default=False),
    "immediate_grad_update": _boolean(default=False),
    "check_grad_overflow": _boolean(default=True),
    "bf16_master_weights_and_grads": _boolean(default=False),
    "bf16_optimizer_states": _boolean(default=False),
}
_BLOCKS = {"fp16": _FP16, "bf16": _BF16, _OLD_BF16: _BF16}


def requested_precision(config: Mapping[str, Any]) -> Precision | None:
    """The precision that a DeepSpeed config requests by enabling one block; None if it enables none, or both."""
    fp16, bf16 = _enabled(config, "fp16"), _enabled(config, "bf16") or _enabled(config, _OLD_BF16)
    if fp16 == bf16:
        return None
    return Precision.FP16_MIXED if fp16 else Precision.BF16_MIXED


def disabled_dtypes(config: Mapping[str, Any]) -> frozenset[str]:
    """Those of fp16 and bf16 that a DeepSpeed config disables."""
    blocks = {"fp16": ("fp16",), "bf16": ("bf16", _OLD_BF16)}
    return frozenset(
        dtype for dtype, names in blocks.items() if any(_given(config, name, "enabled") is False for name in names)
    )


def precision_conflicts(precision: Precision, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Everything in a DeepSpeed config that is invalid or contradicts the agreed precision.

    One line each: dotted path, given value, expected value.
    """
    found: list[str] = []
    if precision is Precision.FP64_TRUE:
        found.append("DeepSpeed trains in fp16, bf16 or fp32; use `strategy: ddp` for 64-true")
    for name, keys in _BLOCKS.items():
        found += _broken(name, keys, config)
    if "bf16" in config and _OLD_BF16 in config:
        found.append(f"{_OLD_BF16}: DeepSpeed reads this old name only where bf16 is absent; remove it")
    if _enabled(config, "fp16") and (_enabled(config, "bf16") or _enabled(config, _OLD_BF16)):
        found.append("fp16.enabled and bf16.enabled are both true; DeepSpeed trains in one of them: set one to false")
    dtype = DTYPE[precision]
    for name, own in (("fp16", "fp16"), ("bf16", "bf16"), (_OLD_BF16, "bf16")):
        given = _given(config, name, "enabled")
        if given is True and dtype != own:
            found.append(f"{name}.enabled is true, and the precision is {precision}: set it to false or 'auto'")
        if given is False and dtype == own and name in config:
            found.append(f"{name}.enabled is false, and the precision is {precision}: set it to true or 'auto'")
    return (*found, *_other_dtypes(precision, config), *_unscalable(config))


def precision_blocks(precision: Precision, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """DeepSpeed's `fp16` and `bf16` blocks for a precision, with the user's settings; 'auto' becomes the default.

    One is enabled, none for 32-true. `config` has no conflict with the precision.
    """
    dtype = DTYPE[precision]
    blocks: dict[str, dict[str, Any]] = {}
    for name, keys, block in (("fp16", _FP16, "fp16"), ("bf16", _BF16, "bf16" if "bf16" in config else _OLD_BF16)):
        filled = {
            key: keys[key].default if value == AUTO else value for key, value in as_block(config.get(block)).items()
        }
        blocks[name] = {**filled, "enabled": dtype == name}
    return blocks


def without_precision(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its precision left to the plan."""
    released = {name: {**as_block(config.get(name)), "enabled": AUTO} for name in _BLOCKS if as_block(config.get(name))}
    return {**config, **released}


def _broken(name: str, keys: Mapping[str, _Key], config: Mapping[str, Any]) -> list[str]:
    if name not in config:
        return []
    if not isinstance(config[name], Mapping):
        return [f"{name} is {config[name]!r}; expected a block such as {{'enabled': true}}"]
    found: list[str] = []
    for key, value in as_block(config.get(name)).items():
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {close[0]}?" if close else f"valid are {', '.join(keys)}"
            found.append(f"{name}.{key} does not exist; {hint}")
        elif value != AUTO and not keys[key].is_valid(value):
            found.append(f"{name}.{key} is {value!r}; expected {keys[key].expected}, or 'auto'")
    return found


def _unscalable(config: Mapping[str, Any]) -> list[str]:
    """A dynamic scale that would start below its minimum."""
    power, floor = (_given(config, "fp16", key) for key in ("initial_scale_power", "min_loss_scale"))
    if _is_integer(power, 0) and _is_integer(floor, 1) and power <= 127 and floor > 2**power:
        return [f"fp16.min_loss_scale is {floor}, above the first scale of 2**{power}; lower it"]
    return []


def _other_dtypes(precision: Precision, config: Mapping[str, Any]) -> list[str]:
    """Other keys that set a dtype."""
    found: list[str] = []
    if _enabled(config, "amp"):
        found.append("amp.enabled: DeepSpeed no longer supports Apex AMP; remove the block")
    if _enabled(config, "torch_autocast"):
        found.append(f"torch_autocast.enabled is a second mixed precision beside {precision}; remove the block")
    dtype = DTYPE[precision]
    for path in ("data_types.grad_accum_dtype", "communication_data_type"):
        group, _, key = path.rpartition(".")
        value = _given(config, group, key) if group else config.get(key)
        if value is None or value == AUTO:
            continue
        try:
            asked = DTYPE[normalize_precision(value)]
        except PrecisionError:
            found.append(f"{path} is {value!r}; expected fp32, fp16 or bf16")
            continue
        if asked not in ("fp32", dtype):
            found.append(f"{path} is {value!r}, and the precision is {precision}: set it to fp32 or {dtype}")
    return found


def _given(config: Mapping[str, Any], block: str, key: str) -> Any:
    return as_block(config.get(block)).get(key)


def _enabled(config: Mapping[str, Any], block: str) -> bool:
    return _given(config, block, "enabled") is True
