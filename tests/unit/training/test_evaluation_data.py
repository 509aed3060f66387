"""Each sample is evaluated once on any number of ranks, in equal numbers of batches."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from launcher.training.data.evaluation import SharedOnce, SharedSource, _can_share, share_evaluation_data
from launcher.training.data.undivided import notify_undivided_data
from launcher.training.data.workers import start_unplaced_worker


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 300))
def test_each_sample_is_used_once_in_equal_numbers_of_batches(world: int, batch_size: int, size: int) -> None:
    assume(_can_share(DataLoader(range(size), batch_size=batch_size), world))  # type: ignore[arg-type]
    ranks = [list(SharedOnce(size, batch_size, world, rank)) for rank in range(world)]
    assert sorted(n for rank in ranks for batch in rank for n in batch) == list(range(size))
    assert {len(SharedOnce(size, batch_size, world, n)) for n in range(world)} == {len(rank) for rank in ranks}
    assert len({len(rank) for rank in ranks}) == 1
    assert all(1 <= len(batch) <= batch_size for rank in ranks for batch in rank)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from range(6)


class Own(DataLoader[Any]):
    pass


X = TensorDataset(torch.arange(17))


def shared(loaders: Any, world: int = 2) -> Any:
    class Data(pl.LightningDataModule):
        def test_dataloader(self) -> Any:
            return loaders

    owner = Data()
    share_evaluation_data(owner, "test_dataloader", world, 1)
    return owner.test_dataloader()


def test_default_loaders_are_shared_and_not_changed_by_lightning() -> None:
    first, second = shared([DataLoader(X, batch_size=4), DataLoader(X, batch_size=3, shuffle=True)])
    assert [batch[0].tolist() for batch in first] == [[1, 3], [5, 7, 9], [11, 13, 15]]
    assert len(second) == 3

    seen: list[int] = []

    class Model(pl.LightningModule):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            seen.extend(batch[0].tolist())

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.test(Model(), first, verbose=False)
    assert seen == [1, 3, 5, 7, 9, 11, 13, 15]
    assert not trainer._data_connector._requires_distributed_sampler(first)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Endless(), batch_size=2),
        DataLoader(X, batch_size=None),
        DataLoader(X, batch_size=4, drop_last=True),
        DataLoader(X, batch_size=4, sampler=RandomSampler(X, replacement=True)),
        DataLoader(X, batch_size=4, sampler=RandomSampler(X, num_samples=5)),
        DataLoader(X, batch_sampler=[[0], [1]]),
    ],
)
def test_other_loaders_are_not_changed(loader: DataLoader[Any]) -> None:
    assert shared(loader) is loader


def test_loader_with_fewer_samples_than_batches_is_not_changed() -> None:
    loader = DataLoader(TensorDataset(torch.arange(3)), batch_size=1)
    assert shared(loader, world=2) is loader
    assert shared(DataLoader(TensorDataset(torch.arange(0)), batch_size=1)) is not None


class Demanding(DataLoader[Any]):
    """A class that Lightning cannot create again: its constructor takes other arguments."""

    def __init__(self, numbers: Any, note: str) -> None:
        super().__init__(numbers, 4, False, None)
        self.note = note


@pytest.mark.parametrize("loader", [Demanding(X, "mine"), DataLoader(X, 4, False, None), Own(X, 3, shuffle=True)])
def test_loader_that_lightning_cannot_recreate_is_distributed(
    loader: DataLoader[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, barebones=True)
    monkeypatch.setattr(type(trainer._accelerator_connector), "is_distributed", True)
    monkeypatch.setattr(type(trainer), "distributed_sampler_kwargs", {"num_replicas": 2, "rank": 1})
    source = SharedSource("val_dataloader", trainer)
    source.instance = [loader]
    (made,) = source.dataloader()
    assert type(made) is type(loader)
    assert vars(made).get("note") == vars(loader).get("note")
    assert made.batch_size == loader.batch_size
    assert isinstance(made.sampler, DistributedSampler)
    assert made.batch_sampler.sampler is made.sampler
    assert (made.sampler.num_replicas, made.sampler.rank) == (2, 1)
    assert made.sampler.shuffle is isinstance(loader.sampler, RandomSampler)
    assert len([row for (batch,) in made for row in batch]) == 9
    assert not isinstance(loader.sampler, DistributedSampler), "the user's own is as it was"


def test_the_workers_of_evaluation_loaders_ignore_ctrl_c() -> None:
    source = SharedSource("val_dataloader", pl.Trainer(accelerator="cpu", logger=False, barebones=True))
    source.instance = [DataLoader(X, num_workers=1), DataLoader(Endless(), num_workers=1)]
    for made in source.dataloader():
        assert made.worker_init_fn.func is start_unplaced_worker


@pytest.mark.parametrize("method", ["val_dataloader", "test_dataloader", "predict_dataloader"])
@pytest.mark.parametrize(("loaders", "reason"), [
    (DataLoader(X), None),
    (None, None),
    ([DataLoader(X), DataLoader(X, batch_sampler=[[0]])], None),
    (DataLoader(Endless()), "the dataset Endless is iterable"),
    ([DataLoader(X), DataLoader(Endless())], "the dataset Endless is iterable"),
    (CombinedLoader([DataLoader(X), range(3)], "sequential"), "range is not a DataLoader"),
])  # fmt: skip
def test_loaders_that_each_rank_reads_completely_are_reported(loaders: Any, reason: str | None, method: str) -> None:
    owner, notices = pl.LightningDataModule(), []  # type: ignore[var-annotated]
    setattr(owner, method, lambda: loaders)
    notify_undivided_data(owner, method, 2, notices.append)
    assert getattr(owner, method)() is loaders
    expected = f"{method}: {reason}: each of the 2 ranks reads all of it, unless it divides its samples by rank itself"
    assert [text.startswith(expected) for text in notices] == ([] if reason is None else [True])
