"""Names of precisions, and the agreement of all ranks on one.

Needs no torch, Lightning or DeepSpeed: a `RankCapability` describes a device.
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
