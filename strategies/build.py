"""Lightning's own objects for a choice of strategy and precision."""

from __future__ import annotations

from lightning.pytorch.plugins.precision import Precision as PrecisionPlugin
from lightning.pytorch.strategies import Strategy

from strategies.base import BuildOptions, StrategyChoice
from strategies.loss_scale import DEFAULT_FLOOR
from strategies.precision import Precision
from strategies.registry import DDP, find_strategy


def build_strategy(choice: StrategyChoice, options: BuildOptions) -> Strategy:
    """The strategy as Lightning's object."""
    return find_strategy(choice.name).build(choice, options)


def precision_plugin(
    precision: Precision, device_kind: str, floor: float = DEFAULT_FLOOR, *, strategy: str = DDP.name
) -> PrecisionPlugin | None:
    """A plugin where Lightning's own choice would differ from the plan, see `StrategyEntry.precision_plugin`."""
    return find_strategy(strategy).precision_plugin(precision, device_kind, floor)
