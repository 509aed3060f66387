"""Samples and tokens of a batch by the shapes of its tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.monitoring.batch_size import count_batch

_IDS = torch.ones(4, 16, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "samples", "tokens"),
    [
        (_IDS, 4, 64),
        ((_IDS, _IDS), 4, 64),
        ({"scale": torch.tensor(1.0), "input_ids": _IDS, "labels": torch.ones(4)}, 4, 64),
        ([torch.randn(8, 3, 32, 32), torch.ones(8, dtype=torch.long)], 8, 0),
        # Byte images and masks are no tokens.
        ((torch.ones(4, 16, dtype=torch.bool), torch.ones(4, 16, dtype=torch.uint8)), 4, 0),
        (torch.randn(4, 16), 4, 0),
        ({"a": [{"b": (torch.randn(5, 2),)}]}, 5, 0),
        ("text", 0, 0),
        (None, 0, 0),
        ({}, 0, 0),
    ],
)
def test_a_batch_is_counted(batch: Any, samples: int, tokens: int) -> None:
    assert count_batch(batch) == (samples, tokens)
