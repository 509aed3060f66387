"""Data modules as users write them. Sample i depends on i only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)


def table(size: int, width: int = 8, seed: int = 0) -> TensorDataset:
    """Samples of `width` numbers with their sum's sign and their sum."""
    x = torch.randn(size, width, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sum(1))


class Table(pl.LightningDataModule):
    """The usual data module."""

    def __init__(
        self, batch_size: int = 4, size: int = 32, workers: int = 0, shuffle: bool = False, drop_last: bool = False
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size, self.size, self.workers = batch_size, size, workers
        self.shuffle, self.drop_last = shuffle, drop_last

    def prepare_data(self) -> None:
        self.prepared = True

    def setup(self, stage: str) -> None:
        self.train, self.val = table(self.size), table(10, seed=1)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, self.batch_size, shuffle=self.shuffle, num_workers=self.workers,
                          drop_last=self.drop_last, persistent_workers=self.workers > 0)  # fmt: skip

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, self.batch_size)


class NoValidation(Table):
    """Without a `val_dataloader`."""

    def val_dataloader(self) -> Any:
        return []


class TwoValidations(Table):
    """Two validation loaders of different lengths."""

    def val_dataloader(self) -> Any:
        return [DataLoader(self.val, self.batch_size), DataLoader(table(6, seed=2), 2)]


class Split(Table):
    """`random_split` in `setup`, as many examples do."""

    def setup(self, stage: str) -> None:
        parts = random_split(table(40), [32, 8], generator=torch.Generator().manual_seed(3))
        self.train, self.val = parts[0], parts[1]


class Half(Table):
    """A `Subset` of the even samples."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train = Subset(self.train, range(0, len(self.train), 2))


class Weighted(Table):
    """A sampler that draws with weights."""

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(7)
        weights = torch.linspace(0.1, 1, len(self.train)).tolist()
        return DataLoader(self.train, self.batch_size, sampler=WeightedRandomSampler(weights, 24, generator=generator))


class OwnBatches(Table):
    """A user's batch sampler: short batches first."""

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_sampler=BatchSampler(SequentialSampler(self.train), 5, drop_last=False))


class SmallerBatches(BatchSampler):
    """A user's batch sampler class."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([index, index + 1] for index in range(0, len(self.sampler) - 1, 4))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.sampler) // 4  # type: ignore[arg-type]


class OwnBatchSampler(Table):
    """A `batch_sampler` of a class that Lightning creates again for the ranks."""

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_sampler=SmallerBatches(SequentialSampler(self.train), 2, False))


class Dicts(Dataset[dict[str, Any]]):
    """Samples like those of a tokenized data set."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = (torch.arange(1 + index % 5) * 7 + index) % 16
        return {"input_ids": tokens, "label": index % 2, "name": f"sample {index}"}


def padded(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate to the longest sample of the batch."""
    ids = torch.nn.utils.rnn.pad_sequence([each["input_ids"] for each in samples], batch_first=True)
    return {
        "input_ids": ids,
        "lengths": torch.tensor([len(each["input_ids"]) for each in samples]),
        "label": torch.tensor([each["label"] for each in samples]),
        "names": [each["name"] for each in samples],
    }


class Text(pl.LightningDataModule):
    """A dict for a batch, with a collate function."""

    def __init__(self, batch_size: int = 4, workers: int = 0) -> None:
        super().__init__()
        self.batch_size, self.workers = batch_size, workers

    def train_dataloader(self) -> Any:
        return DataLoader(Dicts(24), self.batch_size, collate_fn=padded, num_workers=self.workers)


@dataclass
class Pair:
    """A batch as a dataclass."""

    x: Tensor
    y: Tensor


class Pairs(Table):
    """Batches are dataclasses."""

    def train_dataloader(self) -> Any:
        def collate(rows: list[Any]) -> Pair:
            return Pair(*(torch.stack(column) for column in zip(*rows, strict=True)))

        return DataLoader(self.train, self.batch_size, collate_fn=collate)


class Stream(IterableDataset[Any]):
    """An endless source cut after some samples; each rank reads its share."""

    def __init__(self, size: int, sized: bool) -> None:
        self.size = size
        if sized:
            self.__class__ = _Sized

    def __iter__(self) -> Iterator[Any]:
        import torch.distributed as dist

        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        yield from list(table(self.size))[rank::ranks]


class _Sized(Stream):
    def __len__(self) -> int:
        return self.size


class Streamed(Table):
    """An iterable data set, with or without a length."""

    def __init__(self, batch_size: int = 4, size: int = 32, sized: bool = False) -> None:
        super().__init__(batch_size, size)
        self.sized = sized

    def train_dataloader(self) -> Any:
        return DataLoader(Stream(self.size, self.sized), self.batch_size)


class Combined(Table):
    """Several loaders at once."""

    def __init__(self, mode: str = "min_size", kind: str = "dict") -> None:
        super().__init__()
        self.mode, self.kind = mode, kind

    def train_dataloader(self) -> Any:
        short, long = DataLoader(table(16), 4), DataLoader(table(24, seed=5), 3)
        loaders: Any = {"a": short, "b": long} if self.kind == "dict" else [short, long]
        return loaders if self.mode == "none" else CombinedLoader(loaders, self.mode)


class WholeBatches(Table):
    """`batch_size=None`: the data set makes batches itself."""

    def train_dataloader(self) -> Any:
        rows = [(torch.full((2, 8), float(n)) / 10, torch.full((2,), float(n))) for n in range(8)]
        return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


class MyLoader(DataLoader[Any]):
    """A user's loader class with the usual constructor."""

    def __init__(self, *args: Any, note: str = "mine", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = note


class OwnLoader(Table):
    """Uses `MyLoader`."""

    def train_dataloader(self) -> Any:
        return MyLoader(self.train, self.batch_size, shuffle=self.shuffle)


class Moved(Table):
    """Changes each batch in the transfer hooks."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1, batch[1]]


class Growing(Table):
    """Other data in each epoch, reloaded."""

    def train_dataloader(self) -> Any:
        epoch = self.trainer.current_epoch if self.trainer else 0
        return DataLoader(table(16 + 8 * epoch), self.batch_size)


class Stateful(Table):
    """A data module with state in the checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {"seen": 5}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["seen"] == 5


class Shuffled(Table):
    """An explicit `RandomSampler` over a part of the samples."""

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(11)
        return DataLoader(self.train, self.batch_size, sampler=RandomSampler(self.train, generator=generator))
