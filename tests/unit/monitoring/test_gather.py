"""`launcher.monitoring.gather` in one process; `tests/distributed/test_amp_ranks.py` has several."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.monitoring import gather as sample_exchange
from launcher.monitoring.gather import Gathered, SampleExchange
from launcher.monitoring.samples import ABSENT, FIELDS, RankSample

VALUES: dict[str, Any] = {
    "has_scale": 1.0,
    "scale": 1024.0,
    "skipped_steps": 3,
    "growth_tracker": 17,
    "floor_steps": 0,
    "loss_not_finite": True,
    "step_seconds": 0.5,
    "data_seconds": 0.125,
    "own_seconds": 0.25,
    "peak_memory": 2**40 + 1,
}
SAMPLE = RankSample(0, 1024.0, 3, 17, 0, True, 0.5, 0.125, 0.25, 2**40 + 1)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A real process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=20))
    yield
    dist.destroy_process_group()


class Work:
    """A collective that completes when a test sets `over`."""

    def __init__(self) -> None:
        self.over = False
        self.waited = 0

    def is_completed(self) -> bool:
        return self.over

    def wait(self) -> None:
        self.waited += 1


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """Three ranks, this one is rank zero: a collective runs until a test completes it."""
    begun: list[Work] = []

    def all_gather(vectors: list[torch.Tensor], vector: torch.Tensor, group: Any, async_op: bool) -> Work:
        assert (group, async_op) == ("the ranks", True)
        for place, other in enumerate(vectors):
            other.copy_(vector)
            other[FIELDS.index("peak_memory")] = place
        begun.append(Work())
        return begun[-1]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: {"the ranks": 3}[group])
    monkeypatch.setattr(dist, "get_rank", lambda group: {"the ranks": 0}[group])
    monkeypatch.setattr(dist, "get_backend", lambda group: {"the ranks": "gloo"}[group])
    monkeypatch.setattr(dist, "all_gather", all_gather)
    return begun


def test_one_rank_receives_its_sample_at_once() -> None:
    exchange = SampleExchange()
    assert (exchange.world_size, exchange.rank, exchange.take()) == (1, 0, [])
    exchange.send(7, 2, VALUES)
    assert exchange.take() == [Gathered(7, 2, (SAMPLE,))]
    assert exchange.take() == []


@pytest.mark.usefixtures("one_rank")
def test_a_group_of_one_needs_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_gather", pytest.fail)
    exchange = SampleExchange()
    exchange.send(7, None, VALUES)
    assert exchange.take(wait=True) == [Gathered(7, None, (SAMPLE,))]


def test_tensors_and_numbers_give_the_same_sample() -> None:
    exchange = SampleExchange()
    tensors = {
        **VALUES,
        "scale": torch.tensor(1024.0),
        "skipped_steps": torch.tensor([3.0], dtype=torch.float64),
        "growth_tracker": torch.tensor(17, dtype=torch.int32),
        "loss_not_finite": torch.tensor(True),
        "floor_steps": torch.tensor(0.0, requires_grad=True),
    }
    exchange.send(7, 2, tensors)
    assert exchange.take() == [Gathered(7, 2, (SAMPLE,))]


def test_a_sample_is_as_it_was_when_it_was_sent() -> None:
    scale = torch.tensor(1024.0)
    exchange = SampleExchange()
    exchange.send(1, 0, {**VALUES, "scale": scale})
    scale.fill_(1.0)
    ((_, _, (sample,)),) = [(g.step, g.epoch, g.samples) for g in exchange.take()]
    assert sample.scale == 1024.0


@pytest.mark.case(38)
def test_missing_values_are_absent_and_not_zero() -> None:
    exchange = SampleExchange()
    exchange.send(1, 0, {"has_scale": 0.0, "step_seconds": 0.5, "loss_not_finite": 0.0})
    (gathered,) = exchange.take()
    sample = gathered.samples[0]
    assert (sample.scale, sample.skipped_steps, sample.growth_tracker, sample.floor_steps) == (None,) * 4
    vector = sample_exchange._pack({}, torch.device("cpu"))
    assert (vector.dtype, vector.tolist()) == (torch.float64, [ABSENT] * len(FIELDS))


def test_rank_zero_gets_all_ranks_samples_in_their_order(works: list[Work]) -> None:
    exchange = SampleExchange("the ranks")
    assert (exchange.world_size, exchange.rank) == (3, 0)
    exchange.send(5, 1, VALUES)
    works[0].over = True
    (gathered,) = exchange.take()
    assert (gathered.step, gathered.epoch) == (5, 1)
    assert [(sample.rank, sample.scale, sample.peak_memory) for sample in gathered.samples] == [
        (rank, 1024.0, rank) for rank in range(3)
    ]
    assert works[0].waited == 1


def test_samples_are_not_waited_for_before_they_arrive(works: list[Work]) -> None:
    exchange = SampleExchange("the ranks")
    for step in (5, 10, 15):
        exchange.send(step, 0, VALUES)
    assert exchange.take() == []
    works[1].over = True
    # In order: the second is not reported before the first.
    assert exchange.take() == []
    works[0].over = True
    assert [gathered.step for gathered in exchange.take()] == [5, 10]
    assert [work.waited for work in works] == [1, 1, 0]
    assert [gathered.step for gathered in exchange.take(wait=True)] == [15]
    assert works[2].waited == 1


def test_dropped_samples_are_never_waited_for(works: list[Work]) -> None:
    exchange = SampleExchange("the ranks")
    exchange.send(5, 0, VALUES)
    exchange.drop()
    assert exchange.take(wait=True) == []
    assert works[0].waited == 0


@pytest.mark.case(39)
def test_another_rank_takes_part_and_reads_nothing(works: list[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda group: 2)
    exchange = SampleExchange("the ranks")
    exchange.send(5, 0, VALUES)
    assert len(works) == 1
    works[0].over = True
    assert exchange.take() == [Gathered(5, 0, ())]
    assert works[0].waited == 1


def test_a_rank_outside_of_the_group_sends_nothing(works: list[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_gather", lambda *_, **__: None)
    exchange = SampleExchange("the ranks")
    exchange.send(5, 0, VALUES)
    assert exchange.take(wait=True) == []


@pytest.mark.parametrize(("backend", "kind"), [("gloo", "cpu"), ("nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cuda")])
@pytest.mark.usefixtures("works")
def test_the_collective_works_where_its_backend_does(monkeypatch: pytest.MonkeyPatch, backend: str, kind: str) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    device = SampleExchange("the ranks")._device({})
    assert device == torch.device("cuda", 3) if kind == "cuda" else device == torch.device("cpu")


def test_on_one_rank_the_vector_is_on_the_device_of_the_tensors() -> None:
    exchange = SampleExchange()
    assert exchange._device({"scale": 1.0, "skipped_steps": torch.empty((), device="meta")}) == torch.device("meta")
    assert exchange._device({"scale": 1.0}) == torch.device("cpu")
