"""Reads the first batch of the user's training loader, and counts and changes its samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.data import DataLoader, IterableDataset

from launcher.config.schema import RunConfig
from launcher.user_code.classes import UserClasses, make_data, make_model
from strategies.fake_mode import FakeMode
from strategies.trace import PlannedTrainer, attach


def read_first_batch(
    config: RunConfig, classes: UserClasses, micro_batch_size: int | None, trainer: PlannedTrainer
) -> Any:
    """The training loader's first batch, read in this process, without the loader's workers.

    `prepare_data` is not called: it may download. Errors of the user's code are raised unchanged.
    """
    with torch.random.fork_rng(devices=[]):
        data = make_data(config, classes, micro_batch_size)
        if data is None:
            with FakeMode():
                source: Any = make_model(config, classes, micro_batch_size)
            attach(source, trainer)
        else:
            source = data
            source.trainer = trainer
        source.setup("fit")
        loader = source.train_dataloader()
        by_index = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if by_index and loader.batch_sampler is not None:
            indices = next(iter(loader.batch_sampler))
            return loader.collate_fn([loader.dataset[i] for i in indices])
        return next(iter(loader))


def count_samples(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor."""
    return next((len(leaf) for leaf in tree_iter(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def resize_batch(batch: Any, size: int, wanted: int) -> Any:
    """The batch with `wanted` samples: tensors with a row per sample are shortened or repeated."""

    def one(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size) or wanted == size:
            return leaf
        return leaf[torch.arange(wanted) % size]

    return tree_map(one, batch)
