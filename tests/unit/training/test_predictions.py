"""What `launcher predict` reports at its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.training.evaluate import count_predictions, describe_predictions


@pytest.mark.parametrize(
    ("results", "counts"),
    [
        ([], (0, 0, 0)),
        ([torch.ones(4, 2), torch.ones(3)], (2, 7, 0)),
        ([torch.ones(4), torch.tensor(1.0)], (2, 4, 1)),
        ([["a", "b"], {"logits": torch.ones(4)}, None], (3, 0, 3)),
    ],
)
def test_batches_and_the_samples_of_tensors_are_counted(results: list[Any], counts: tuple[int, int, int]) -> None:
    assert count_predictions(iter(results)) == counts


@pytest.mark.parametrize(
    ("batches", "samples", "world_size", "text"),
    [
        (4, 16, 1, "predictions: 16 samples in 4 batches: runs/it/predictions/rank-0.pt"),
        (1, 1, 2, "predictions: 1 sample in 1 batch: runs/it/predictions/rank-0.pt and rank-1.pt"),
        (9, None, 8, "predictions: 9 batches: runs/it/predictions/rank-0.pt to rank-7.pt"),
    ],
)
def test_the_files_and_the_number_of_predictions_are_named(
    batches: int, samples: int | None, world_size: int, text: str
) -> None:
    assert describe_predictions(batches, samples, "runs/it/predictions", world_size) == text
