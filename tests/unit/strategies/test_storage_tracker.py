"""`strategies.storage_tracker`: live bytes after each op."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from strategies.storage_tracker import StorageTracker


def test_storage_counts_once_until_its_last_view_is_deleted() -> None:
    with StorageTracker() as tracker:
        tensor = torch.zeros(10)
        view = tensor.view(2, 5)[1]
        assert tracker.activations == 40
        del tensor
        assert tracker.activations == 40
        del view
        assert (tracker.activations, tracker.peak_activations) == (0, 40)


def test_peak_is_kept_until_reset() -> None:
    with StorageTracker() as tracker:
        kept = torch.zeros(5)
        for _ in range(3):
            torch.zeros(10)
        assert tracker.peak_activations == 60
        tracker.reset_peak()
        assert tracker.peak_activations == kept.nbytes


def test_ignored_storages_are_not_counted_and_gradients_are_separate() -> None:
    weight = torch.ones(4, requires_grad=True)
    tracker = StorageTracker()
    tracker.ignore([weight])
    with tracker:
        weight.detach().add_(1)
        assert tracker.activations == 0
        gradient = torch.zeros(4)
        tracker.count_as_gradient(gradient)
        tracker.count_as_gradient(gradient)
        assert (tracker.activations, tracker.gradients, tracker.peak_total) == (0, 16, 16)
        del gradient
    assert tracker.gradients == 0


def test_sizes_are_rounded_up_to_the_granularity() -> None:
    with StorageTracker(granularity=512) as tracker:
        kept = [torch.zeros(1), torch.zeros(129)]
        assert tracker.activations == 512 + 1024
    assert kept


def test_peak_matches_the_memory_tracker_of_torch() -> None:
    fake = FakeTensorMode()
    with fake:
        net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
        x = torch.zeros(8, 16)
    theirs = MemTracker()
    theirs.track_external(net, x)
    with fake, theirs:
        net(x).sum().backward()
    peak = (
        sum(theirs.get_tracker_snapshot("peak")[torch.device("cpu")].values()) // 2
    )  # "Total" stands beside the parts
    net.zero_grad()
    ours = StorageTracker()
    ours.ignore([*net.parameters(), x])
    with fake, ours:
        net(x).sum().backward()
    states = sum(p.nbytes for p in net.parameters()) + x.nbytes
    assert ours.peak_total + states == peak


def test_meta_tensor_is_not_counted() -> None:
    with StorageTracker() as tracker:
        shape = torch.zeros(1000, device="meta")
        assert tracker.activations == 0
        kept = torch.zeros(shape.numel())
        assert tracker.activations == 4000
    del kept
