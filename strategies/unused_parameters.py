"""The error for parameters without a gradient under DDP. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from strategies.base import StrategyError
from strategies.units import join_some


class UnusedParametersError(StrategyError):
    """DDP found parameters without a gradient."""

    def __init__(self, names: Sequence[str], where: str) -> None:
        many = len(names) != 1
        super().__init__(
            f"{describe_parameters(names)} got no gradient in {where}, and DDP would continue with gradients that are "
            f"not summed over the ranks; set `strategy: ddp_find_unused_parameters_true`, or freeze "
            f"{'them' if many else 'it'} with requires_grad_(False)"
        )
        self.names = tuple(names)


def describe_parameters(names: Sequence[str]) -> str:
    """The names of parameters in a message: all of a few, the first of many."""
    if not names:
        return "some parameters"
    return f"parameter{'' if len(names) == 1 else 's'} {join_some(names)}"
