"""User training data with other loaders than one plain DataLoader; a sample contains its number."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, WeightedRandomSampler

from tests.support.toy import Noisy, NoisyNumbers, Numbers


class OwnLoader(DataLoader[Any]):
    """A loader of a library, whose attributes do not show its arguments."""

    def __init__(self, graphs: int, batch_size: int, **options: Any) -> None:
        super().__init__(NoisyNumbers(graphs), batch_size, **options)


class LoadersData(pl.LightningDataModule):
    """Loaders of a `kind`.

    Args:
        kind: one of the branches below.
        batch_size: samples that a rank takes at once, of each loader.
        workers: of each loader.
        own_share: divide the batch by the number of ranks, as some users do.
    """

    def __init__(self, kind: str = "own", batch_size: int = 4, workers: int = 0, own_share: bool = False) -> None:
        super().__init__()
        self.kind, self.batch_size, self.workers, self.own_share = kind, batch_size, workers, own_share

    def train_dataloader(self) -> Any:
        size = self.batch_size
        if self.own_share and self.trainer is not None:
            size //= self.trainer.world_size
        options: dict[str, Any] = {"num_workers": self.workers}
        one = DataLoader(Numbers(40), size, shuffle=True, **options)
        other = DataLoader(Numbers(24), size, shuffle=True, **options)
        if self.kind == "own":
            return OwnLoader(40, size, shuffle=True, **options)
        if self.kind == "weighted":
            return DataLoader(NoisyNumbers(40), size, sampler=WeightedRandomSampler([1.0, 2.0] * 20, 40), **options)
        if self.kind == "subset":
            data = Subset(ConcatDataset([NoisyNumbers(20), NoisyNumbers(30)]), list(range(45))[::-1])
            return DataLoader(data, size, shuffle=True, **options)
        return {"dict": {"a": one, "b": other}, "min_size": CombinedLoader([one, other], "min_size")}.get(
            self.kind, CombinedLoader({"a": one, "b": other}, "max_size_cycle")
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Numbers(8), batch_size=4)


class Loaders(Noisy):
    """Trains on all loaders together."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = list(batch.values()) if isinstance(batch, dict) else batch
        if isinstance(parts[0], Tensor):
            parts = [parts]
        index, x = (torch.cat([part[n] for part in parts]) for n in (0, 1))
        return super().training_step((index, x), batch_idx)
