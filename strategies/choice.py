"""Choose the strategy, with the reasons and the candidates that were not taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from strategies.base import ChoiceRequest, Rejected, StrategyChoice, StrategyError
from strategies.registry import AUTO, DDP, SINGLE_DEVICE, find_strategy

__all__ = ["AUTO", "Rejected", "StrategyChoice", "StrategyError", "choose_strategy", "with_user_options"]


def choose_strategy(
    requested: str, *, world_size: int, device_kind: str, accumulate: int, model_has_static_graph: bool
) -> StrategyChoice:
    """Pick the strategy for `world_size` ranks.

    Args:
        requested: one of `strategies.registry.strategy_names()`.
        world_size: number of ranks.
        device_kind: 'cpu', 'cuda' or 'mps'.
        accumulate: micro batches per optimizer step.
        model_has_static_graph: whether the model declares `static_graph = True`: every step uses the same parameters.

    Raises:
        StrategyError: unknown name, or a strategy that these ranks cannot run.
    """
    is_auto = requested == AUTO
    entry = (SINGLE_DEVICE if world_size == 1 else DDP) if is_auto else find_strategy(requested)
    if device_kind == "mps" and entry.needs_process_group:
        raise StrategyError("Apple's GPU has no process group backend; use `devices: 1` or `accelerator: cpu`")
    return entry.choose(ChoiceRequest(world_size, device_kind, accumulate, model_has_static_graph, is_auto))


def with_user_options(choice: StrategyChoice, options: Mapping[str, Any]) -> StrategyChoice:
    """The choice with the user's arguments of DDP; only what the plan itself depends on is changed."""
    if not options or not find_strategy(choice.name).accepts_ddp_options:
        return choice
    views = bool(options.get("gradient_as_bucket_view", choice.gradient_as_bucket_view))
    reasons = [reason for reason in choice.reasons if views or not reason.startswith("gradient_as_bucket_view")]
    reasons.append(f"own options of DDP: {', '.join(options)}")
    return replace(choice, gradient_as_bucket_view=views, reasons=tuple(reasons))
