"""Mixed precision: its names, and the rule by which all ranks get the same one.

Works without torch, Lightning or DeepSpeed: what a device can do comes in as a `RankCapability`.
"""

from strategies.precision_agreement import AgreedPrecision, DeviceKind, RankCapability, reconcile
from strategies.precision_names import (
    AUTO,
    Precision,
    PrecisionError,
    compute_effective_precision,
    normalize_precision,
)

__all__ = [
    "AUTO",
    "AgreedPrecision",
    "DeviceKind",
    "Precision",
    "PrecisionError",
    "RankCapability",
    "compute_effective_precision",
    "normalize_precision",
    "reconcile",
]
