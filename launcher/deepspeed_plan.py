"""DeepSpeed's config as part of the plan: everything filled, and every problem at once. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.agreement import Agreement, RankFacts, hosts_of
from launcher.config import RunConfig
from launcher.hardware import BUILD_TOOLS
from strategies.alike import where
from strategies.batch import BatchSplit
from strategies.choice import StrategyChoice
from strategies.deepspeed_config import NVME, VARIANTS, BatchAndClip, ZeroVariant, zero_config
from strategies.deepspeed_merge import merge_config
from strategies.deepspeed_precision import precision_blocks
from strategies.precision import AgreedPrecision


@dataclass(frozen=True, slots=True)
class DeepSpeedPlan:
    """DeepSpeed's part of a plan.

    Attributes:
        config: DeepSpeed's whole config; None without DeepSpeed.
        problems: what stands in the way.
        notices: what the user should be told at once.
    """

    config: dict[str, Any] | None
    problems: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def deepspeed_settings(config: RunConfig) -> Mapping[str, Any] | None:
    """The user's own settings where DeepSpeed trains, `{}` if there are none; None without DeepSpeed.

    Args:
        config: a file of settings is read in already, see `launcher.deepspeed_source`.
    """
    if config.strategy not in VARIANTS:
        return None
    return config.deepspeed_config if isinstance(config.deepspeed_config, Mapping) else {}


def plan_deepspeed(
    config: RunConfig,
    strategy: StrategyChoice | None,
    precision: AgreedPrecision | None,
    batch: BatchSplit,
    agreement: Agreement,
) -> DeepSpeedPlan:
    """DeepSpeed's whole config for what was planned, and what stands in the way.

    Args:
        config: what the user asked for.
        strategy: what was chosen, None if nothing could be.
        precision: what was agreed on, with DeepSpeed's blocks for it; None if nothing could be.
        batch: the split of a global batch.
        agreement: what the ranks are and have.
    """
    name = config.strategy if strategy is None else strategy.name
    if name not in VARIANTS:
        return DeepSpeedPlan(None, tuple(_needless_settings(config)))
    user = config.deepspeed_config if isinstance(config.deepspeed_config, Mapping) else {}
    problems: list[str] = []
    if config.trainer.gradient_clip_algorithm == "value" and config.trainer.gradient_clip_val:
        problems.append(
            "DeepSpeed clips gradients by their norm alone; remove `trainer.gradient_clip_algorithm: value`"
        )
    variant = VARIANTS[name]
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
    lacking = _without_tools(agreement)
    if lacking and NVME in (variant.offload_optimizer, variant.offload_parameters):
        problems.append(f"{name} compiles DeepSpeed's async_io at its first start, but {lacking}")
    notices = [f"DeepSpeed's own CPU Adam cannot be compiled: {lacking}"] if lacking and variant.offloads else []
    if strategy is None:
        return DeepSpeedPlan(None, tuple(problems))
    blocks = {} if precision is None else precision.deepspeed_blocks or precision_blocks(precision.precision, user)
    return DeepSpeedPlan({**merged, **blocks}, tuple(problems), tuple(notices))


def _without_tools(agreement: Agreement) -> str:
    """Which hosts lack what DeepSpeed compiles its ops with, and the packages; empty if none does."""
    tools = dict.fromkeys(tool for fact, _ in agreement.kinds() for tool in _lacking(fact))
    if not tools:
        return ""
    install = " and ".join(BUILD_TOOLS[tool] for tool in tools)
    hosts = some(hosts_of(where(agreement.facts, lambda fact: bool(_lacking(fact)))))
    return f"{' and '.join(tools)} not on the PATH of {hosts}; install {install}"


def some(names: Sequence[str], limit: int = 8) -> str:
    """At most `limit` of the names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _lacking(fact: RankFacts) -> list[str]:
    versions = fact.hardware.versions if fact.hardware else {}
    return [tool for tool in BUILD_TOOLS if versions.get(tool, "unknown") is None]


def _needless_settings(config: RunConfig) -> list[str]:
    """Settings for DeepSpeed in a run without it."""
    if config.deepspeed_config is None:
        return []
    zero = config.deepspeed_config.get("zero_optimization") if isinstance(config.deepspeed_config, Mapping) else None
    meant = "deepspeed_stage_2"
    if isinstance(zero, Mapping):
        parts = [zero.get(name) for name in ("offload_optimizer", "offload_param")]
        devices = [part.get("device") if isinstance(part, Mapping) else None for part in parts]
        asked = ZeroVariant(zero.get("stage", 2), *(None if device == "none" else device for device in devices))
        meant = next((name for name, variant in VARIANTS.items() if variant == asked), meant)
    advice = f"use `strategy: {meant}`, or remove it"
    return [f"deepspeed_config was given, but the strategy is {config.strategy}; {advice}"]
