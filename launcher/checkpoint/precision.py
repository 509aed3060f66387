"""The precision that a checkpoint was trained in: from its record, or from its content."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strategies.precision import Precision, PrecisionError, normalize_precision

# The key of the launcher's record in a checkpoint: precision, strategy and number of ranks.
RECORD = "launcher"
# The keys from which Lightning restores the loss scale: its plugin's name, and the key of versions before 1.6.
RESTORED_SCALER_KEYS = ("MixedPrecision", "native_amp_scaling_state")
# Lightning 1 used another plugin name, which Lightning 2 does not read.
SCALER_KEYS = (*RESTORED_SCALER_KEYS, "MixedPrecisionPlugin")
_TRUE = {
    "torch.float16": Precision.FP16_TRUE,
    "torch.bfloat16": Precision.BF16_TRUE,
    "torch.float64": Precision.FP64_TRUE,
}


@dataclass(frozen=True, slots=True)
class CheckpointPrecision:
    """The precision of a checkpoint, None if it is not known, and a notice for the user about it."""

    precision: Precision | None
    notice: str | None = None


def make_record(precision: str, strategy: str, world_size: int) -> dict[str, Any]:
    """The launcher's record in a checkpoint; plain values, which `weights_only` loads."""
    return {"precision": precision, "strategy": strategy, "world_size": world_size}


def read_precision(content: Mapping[str, Any]) -> CheckpointPrecision:
    """The precision of a loaded checkpoint; of its tensors only the dtypes are read."""
    shown = _shown(content)
    if RECORD not in content:
        return CheckpointPrecision(shown)
    found = content[RECORD]
    recorded = found.get("precision") if isinstance(found, Mapping) else found
    if recorded == "custom":
        return CheckpointPrecision(None)
    try:
        return CheckpointPrecision(normalize_precision(recorded))
    except PrecisionError:
        instead = f"its content shows {shown}" if shown else "its content does not show one"
        return CheckpointPrecision(
            shown, f"the checkpoint's record of its precision is damaged ({reprlib.repr(recorded)}); {instead}"
        )


def _shown(content: Mapping[str, Any]) -> Precision | None:
    """16-mixed if there is a loss scale, otherwise the dtype of the weights if it is half or double precision."""
    if any(isinstance(content.get(key), Mapping) and content[key] for key in SCALER_KEYS):
        return Precision.FP16_MIXED
    weights = content.get("state_dict")
    values = weights.values() if isinstance(weights, Mapping) else ()
    dtypes = {str(v.dtype) for v in values if getattr(getattr(v, "dtype", None), "is_floating_point", False)}
    return _TRUE.get(next(iter(dtypes))) if len(dtypes) == 1 else None
