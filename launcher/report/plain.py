"""Values of a plan or a config that another version, or a person, may have written. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.config.schema import WatchOptions

MEMORY_PARTS = ("parameters", "gradients", "optimizer_states", "activations", "buffers")
# What the report reads of a plan.
_PLAN: Mapping[str, Any] = {
    "precision": str, "precision_before": str, "precision_reasons": [str], "has_loss_scale": bool,
    "world_size": float, "num_nodes": float, "hosts": [str], "devices": dict, "device_kind": str,
    "strategy": {"name": str, "reasons": [str], "rejected": [{"name": str, "reason": str}]},
    "batch": {"global_batch_size": str}, "batch_reasons": [str], "notices": [str],
    "memory": {
        "limit_bytes": float, "method": str,
        "assessments": [{"name": str, "memory": dict.fromkeys(MEMORY_PARTS, float)}],
    },
}  # fmt: skip


def conform(value: Any, shape: Any) -> Any:
    """The value in this shape; what is missing or has another type is empty, and None for a number.

    Args:
        value: as read from JSON or YAML.
        shape: a type, a list with the shape of its items, or a mapping with the shape of each key.
    """
    if isinstance(shape, Mapping):
        given = conform(value, dict)
        return {key: conform(given.get(key), inner) for key, inner in shape.items()}
    if isinstance(shape, list):
        return [conform(item, shape[0]) for item in value] if isinstance(value, list | tuple) else []
    if shape is float:
        return float(value) if type(value) in (int, float) else None
    if shape is dict:
        return value if isinstance(value, Mapping) else {}
    return "" if value is None else shape(value)


def conform_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a plan that the report shows."""
    return conform(plan, _PLAN)


def read_watch_options(config: Mapping[str, Any]) -> WatchOptions:
    """The limits of the alerts; the default where the config has none."""
    limits = conform(config.get("watch"), {"floor": float, "slow_factor": float, "slow_share": float})
    return WatchOptions(**{name: limit for name, limit in limits.items() if limit is not None})
