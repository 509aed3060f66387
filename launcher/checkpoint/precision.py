"""In which precision a checkpoint was trained: its own record, or what its content shows."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strategies.precision import Precision, PrecisionError, normalize_precision

# The key of a checkpoint under which the launcher writes what it was trained with.
RECORD = "launcher"
# Where Lightning keeps the loss scale, and reads it back from: the name of its plugin, and that of versions before 1.6.
RESTORED_SCALER_KEYS = ("MixedPrecision", "native_amp_scaling_state")
# Lightning 1 kept it under its plugin's name of then, which Lightning 2 does not read.
SCALER_KEYS = (*RESTORED_SCALER_KEYS, "MixedPrecisionPlugin")
_TRUE = {
    "torch.float16": Precision.FP16_TRUE,
    "torch.bfloat16": Precision.BF16_TRUE,
    "torch.float64": Precision.FP64_TRUE,
}


@dataclass(frozen=True, slots=True)
class CheckpointPrecision:
    """What a checkpoint says of its precision.

    Attributes:
        precision: Lightning 2's name; None if the checkpoint does not say.
        notice: what the user should know about it.
    """

    precision: Precision | None
    notice: str | None = None


def record_of(precision: str, strategy: str, world_size: int) -> dict[str, Any]:
    """What a checkpoint is to say; plain values, which `weights_only` loads."""
    return {"precision": precision, "strategy": strategy, "world_size": world_size}


def precision_of(content: Mapping[str, Any]) -> CheckpointPrecision:
    """Read it from a loaded checkpoint.

    Args:
        content: of the file; its tensors are only asked for their dtypes.
    """
    shown = _shown(content)
    if RECORD not in content:
        return CheckpointPrecision(shown)
    found = content[RECORD]
    said = found.get("precision") if isinstance(found, Mapping) else found
    if said == "custom":
        return CheckpointPrecision(None)
    try:
        return CheckpointPrecision(normalize_precision(said))
    except PrecisionError:
        instead = f"its content shows {shown}" if shown else "its content does not show one"
        return CheckpointPrecision(
            shown, f"the checkpoint's record of its precision is damaged ({reprlib.repr(said)}); {instead}"
        )


def _shown(content: Mapping[str, Any]) -> Precision | None:
    """A saved loss scale means fp16; weights all in one half or double dtype mean that; fp32 may be any other."""
    if any(isinstance(content.get(key), Mapping) and content[key] for key in SCALER_KEYS):
        return Precision.FP16_MIXED
    weights = content.get("state_dict")
    values = weights.values() if isinstance(weights, Mapping) else ()
    dtypes = {str(v.dtype) for v in values if getattr(getattr(v, "dtype", None), "is_floating_point", False)}
    return _TRUE.get(next(iter(dtypes))) if len(dtypes) == 1 else None
