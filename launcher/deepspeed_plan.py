"""DeepSpeed's config as part of the plan: everything filled, and every problem at once."""

from __future__ import annotations

from typing import Any

from launcher.config import RunConfig
from strategies.batch import BatchSplit
from strategies.choice import StrategyChoice
from strategies.deepspeed_config import VARIANTS, BatchAndClip, zero_config
from strategies.precision import AgreedPrecision, Precision

# What Lightning's DeepSpeed plugin knows.
_PRECISIONS = (
    Precision.FP32_TRUE,
    Precision.BF16_MIXED,
    Precision.FP16_MIXED,
    Precision.BF16_TRUE,
    Precision.FP16_TRUE,
)


def plan_deepspeed(
    config: RunConfig,
    strategy: StrategyChoice | None,
    precision: AgreedPrecision | None,
    batch: BatchSplit,
    device_kind: str,
) -> tuple[dict[str, Any] | None, list[str]]:
    """DeepSpeed's config for what was planned, None without DeepSpeed, and what stands in the way.

    Args:
        config: what the user asked for.
        strategy: what was chosen, None if nothing could be.
        precision: what was agreed on, None if nothing could be.
        batch: the split of a global batch.
        device_kind: 'cpu' or 'cuda'.
    """
    if strategy is None or strategy.name not in VARIANTS:
        return None, []
    problems: list[str] = []
    if precision is not None and precision.precision not in _PRECISIONS:
        known = ", ".join(p.value for p in _PRECISIONS)
        problems.append(f"DeepSpeed cannot train in {precision.precision.value}; it knows {known}")
    if config.trainer.gradient_clip_algorithm == "value" and config.trainer.gradient_clip_val:
        problems.append(
            "DeepSpeed clips gradients by their norm alone; remove `trainer.gradient_clip_algorithm: value`"
        )
    planned = BatchAndClip(
        world_size=batch.world_size,
        micro_batch_size=batch.micro_batch_size,
        accumulate=batch.accumulate,
        gradient_clip_val=float(config.trainer.gradient_clip_val or 0.0),
    )
    return zero_config(VARIANTS[strategy.name], device_kind, planned), problems
