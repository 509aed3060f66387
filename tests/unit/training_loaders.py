"""Training loaders of a user's, and what the launcher makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from launcher.data_order import order_training_data
from strategies.batch import BatchSplit


class Owner:
    """Has a `train_dataloader`, as a LightningModule or LightningDataModule has."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def train_dataloader(self) -> Any:
        return self.make()


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
    resume: Sequence[Mapping[str, Any]] = (),
    notices: list[str] | None = None,
) -> Any:
    """What `make`'s loaders become."""
    owner: Any = Owner(make)
    order_training_data(
        owner,
        BatchSplit(world_size, micro, accumulate),
        rank=rank,
        seed=5,
        fixed_global_batch=fixed,
        resume_states=resume,
        notice=([] if notices is None else notices).append,
    )
    return owner.train_dataloader()


def shuffled(size: int = 24, batch_size: int = 4, **options: Any) -> Callable[[], DataLoader[Any]]:
    return lambda: DataLoader(range(size), batch_size, shuffle=True, collate_fn=keep, **options)  # type: ignore[arg-type]
