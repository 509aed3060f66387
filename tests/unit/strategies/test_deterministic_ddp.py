"""DDP's buckets are the same in every step. Distributed tests compare the sums of resumed runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from strategies.deterministic_ddp import DeterministicDistributedDataParallel


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _buckets(steps: int, **options: Any) -> list[list[int]]:
    """Sizes of the buckets of each step, in the order of exchange."""
    # 128, 512, 2048 and 512 weights: the size of a bucket identifies its layers.
    widths = (8, 16, 32, 64, 8)
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)))
    # Full with the last two layers.
    ddp = DeterministicDistributedDataParallel(model, bucket_cap_mb=2560 * 4 / 2**20, **options)
    seen: list[list[int]] = []

    # torch checks the annotations of a hook, which are strings here.
    def exchange(_, bucket):  # type: ignore[no-untyped-def]
        seen[-1].append(bucket.buffer().numel())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    ddp.register_comm_hook(None, exchange)
    for _ in range(steps):
        seen.append([])
        ddp(torch.ones(2, 8)).sum().backward()
    return seen


@pytest.mark.parametrize("static_graph", [False, True])
def test_first_step_has_the_final_buckets_last_layer_first(group: None, static_graph: bool) -> None:
    assert _buckets(4, static_graph=static_graph, gradient_as_bucket_view=True) == [[2560, 640]] * 4


def test_buckets_do_not_change_with_find_unused_parameters(group: None) -> None:
    first, *others = _buckets(3, find_unused_parameters=True)
    assert others == [first] * 2
    assert sum(first) == 3200


def test_model_with_another_layer_order_trains(group: None) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(4, 1), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    model = DeterministicDistributedDataParallel(Backwards())
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
