"""DeepSpeed's config as part of the plan: complete, with all problems. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.agreement.facts import Agreement
from launcher.config.schema import RunConfig
from launcher.planning.deepspeed_limits import assumed_folders, find_missing_tools, find_obstacles
from strategies.batch import BatchSplit
from strategies.choice import StrategyChoice
from strategies.deepspeed_config import BatchAndClip, ZeroVariant, as_block, zero_config
from strategies.deepspeed_merge import merge_config
from strategies.deepspeed_precision import precision_blocks
from strategies.precision import AgreedPrecision
from strategies.registry import find_requested, list_zero_variants


@dataclass(frozen=True, slots=True)
class DeepSpeedPlan:
    """DeepSpeed's part of a plan: its complete config (None without DeepSpeed), why there is no plan, and notices."""

    config: dict[str, Any] | None
    problems: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def deepspeed_settings(config: RunConfig) -> Mapping[str, Any] | None:
    """The user's settings of DeepSpeed, `{}` if there are none; None if DeepSpeed does not train."""
    requested = find_requested(config.strategy)
    if requested is None or not requested.needs_deepspeed:
        return None
    return as_block(config.deepspeed_config)


def plan_deepspeed(
    config: RunConfig,
    strategy: StrategyChoice | None,
    precision: AgreedPrecision | None,
    batch: BatchSplit,
    agreement: Agreement,
) -> DeepSpeedPlan:
    """DeepSpeed's complete config for the planned strategy, precision and batch, and all problems."""
    name = config.strategy if strategy is None else strategy.name
    variant = list_zero_variants().get(name)
    if variant is None:
        return DeepSpeedPlan(None, tuple(_unused_settings(config)))
    user = as_block(config.deepspeed_config)
    problems: list[str] = []
    if config.trainer.gradient_clip_algorithm == "value" and config.trainer.gradient_clip_val:
        problems.append("DeepSpeed clips gradients only by their norm; remove `trainer.gradient_clip_algorithm: value`")
    hardware = agreement.facts[0].hardware
    planned = zero_config(
        variant,
        hardware.device.kind if hardware else "cpu",
        BatchAndClip(
            world_size=batch.world_size,
            micro_batch_size=batch.micro_batch_size,
            accumulate=batch.accumulate,
            gradient_clip_val=float(config.trainer.gradient_clip_val or 0.0),
        ),
    )
    clip_is_set = config.trainer.gradient_clip_val is not None
    merged, conflicts = merge_config(user, planned, name, clip_is_set=clip_is_set)
    problems += [f"deepspeed_config.{conflict}" for conflict in conflicts]
    agreed = None if precision is None else precision.precision
    problems += map(str, find_obstacles(name, agreement, agreed, user))
    missing = find_missing_tools(agreement) if variant.offloads else None
    notices = [f"DeepSpeed's own CPU Adam cannot be compiled: {'; '.join(missing)}"] if missing else []
    if folders := assumed_folders(name, agreement, user):
        notices.append(f"not checked on the nodes: {name} assumes that {' and '.join(folders)} exists and has room")
    if strategy is None:
        return DeepSpeedPlan(None, tuple(problems))
    blocks = {} if precision is None else precision.deepspeed_blocks or precision_blocks(precision.precision, user)
    return DeepSpeedPlan({**merged, **blocks}, tuple(problems), tuple(notices))


def _unused_settings(config: RunConfig) -> list[str]:
    """The problem of DeepSpeed settings in a run without it."""
    if config.deepspeed_config is None:
        return []
    zero = as_block(config.deepspeed_config).get("zero_optimization")
    suggested = "deepspeed_stage_2"
    if isinstance(zero, Mapping):
        devices = [as_block(zero.get(name)).get("device") for name in ("offload_optimizer", "offload_param")]
        given = ZeroVariant(zero.get("stage", 2), *(None if device == "none" else device for device in devices))
        suggested = next((name for name, variant in list_zero_variants().items() if variant == given), suggested)
    advice = f"use `strategy: {suggested}`, or remove it"
    return [f"deepspeed_config was given, but the strategy is {config.strategy}; {advice}"]
