"""Callbacks that need the weights of the whole model on a rank, which FSDP2 shards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def list_weight_callbacks(kinds: Iterable[type[Any]]) -> list[str]:
    """The names of the classes of callbacks that copy, average or mask the weights of the whole model."""
    from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging

    weights = (ModelPruning, StochasticWeightAveraging, WeightAveraging)
    return [kind.__name__ for kind in kinds if issubclass(kind, weights)]


def describe_weight_callback(name: str) -> str:
    """Why FSDP2 cannot run a callback of this class."""
    return f"the callback {name} needs whole parameters, but FSDP2 shards them"
