"""User training loaders, and the launcher's replacements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from launcher.training.data_order import DataOrder, place
from strategies.batch import BatchSplit


def keep(samples: list[int]) -> list[int]:
    return samples


def ordered(
    make: Callable[[], Any],
    *,
    micro: int | None = 4,
    world_size: int = 1,
    rank: int = 0,
    accumulate: int = 1,
    fixed: bool = True,
    distribute: bool = True,
    overfit: bool = False,
    at: tuple[int, int] = (0, 0),
    notices: list[str] | None = None,
    batches: list[tuple[str, int]] | None = None,
) -> Any:
    """The launcher's loaders for `make`'s, positioned at an epoch and a batch."""
    order = DataOrder(
        BatchSplit(world_size, micro, accumulate),
        rank=rank,
        seed=5,
        fixed_global_batch=fixed,
        distribute=distribute,
        notice=([] if notices is None else notices).append,
        on_batch=lambda owner, size: None if batches is None else batches.append((owner, size)),
    )
    made = order.apply(make, "Owner.train_dataloader", overfit=overfit)
    place(made if isinstance(made, CombinedLoader) else CombinedLoader(made, "max_size_cycle"), *at)
    return made


def shuffled(size: int = 24, batch_size: int = 4, **options: Any) -> Callable[[], DataLoader[Any]]:
    return lambda: DataLoader(range(size), batch_size, shuffle=True, collate_fn=keep, **options)  # type: ignore[arg-type]
