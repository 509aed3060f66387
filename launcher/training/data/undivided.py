"""Loaders that neither the launcher nor Lightning divides among the ranks, because no sampler decides their samples.

A dataset may divide its samples by rank itself, which cannot be detected; dividing them again would leave out most.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset


def find_undivided(loader: Any) -> str | None:
    """Why a loader is not divided; None if its sampler can be."""
    if not isinstance(loader, DataLoader):
        return f"{type(loader).__name__} is not a DataLoader"
    dataset = loader.dataset
    return f"the dataset {type(dataset).__name__} is iterable" if isinstance(dataset, IterableDataset) else None


def describe_undivided(world_size: int) -> str:
    """What the ranks read of such a loader, after its reason."""
    return f"each of the {world_size} ranks reads all of it, unless it divides its samples by rank itself"


def notify_undivided_data(
    owner: pl.LightningDataModule | pl.LightningModule, method: str, world_size: int, notice: Callable[[str], None]
) -> None:
    """Give a notice when `owner.<method>()` returns a loader that is not divided."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def checked() -> Any:
        loaders = original()
        combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)
        reason = next(filter(None, map(find_undivided, combined.flattened)), None)
        if loaders is not None and reason is not None:
            text = describe_undivided(world_size)
            notice(f"{method}: {reason}: {text}; use one rank to have each sample once")
        return loaders

    object.__setattr__(owner, method, checked)
