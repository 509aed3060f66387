"""`strategies.build`: Lightning's objects for a choice."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from strategies.base import BuildOptions, RankLocation
from strategies.build import build_strategy, precision_plugin
from strategies.choice import choose_strategy
from strategies.deterministic_ddp import DeterministicDDPStrategy
from strategies.environment import FixedClusterEnvironment
from strategies.precision import Precision

LOCATION = RankLocation(
    rank=5, world_size=8, local_rank=1, local_world_size=4, node_rank=1, main_address="node0", main_port=29511
)
ALONE = RankLocation(0, 1, 0, 1, 0, "127.0.0.1", 0)


def test_cluster_environment_reports_the_agreed_location_and_ignores_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    known = FixedClusterEnvironment(LOCATION)
    assert (known.global_rank(), known.world_size(), known.local_rank(), known.node_rank()) == (5, 8, 1, 1)
    assert (known.main_address, known.main_port) == ("node0", 29511)


def test_lightning_starts_no_processes() -> None:
    assert FixedClusterEnvironment(LOCATION).creates_processes_externally
    assert not FixedClusterEnvironment.detect()


def test_world_size_or_rank_that_differs_from_the_agreement_is_an_error() -> None:
    known = FixedClusterEnvironment(LOCATION)
    known.set_world_size(8)
    known.set_global_rank(5)
    with pytest.raises(ValueError, match="counts 4 ranks, the launcher agreed on 8"):
        known.set_world_size(4)
    with pytest.raises(ValueError, match="calls this rank 0, the launcher 5"):
        known.set_global_rank(0)


def test_single_device_strategy_uses_the_local_device() -> None:
    choice = choose_strategy("auto", world_size=1, device_kind="cpu", accumulate=1, model_has_static_graph=True)
    strategy = build_strategy(choice, BuildOptions("cpu", ALONE, timeout=60))
    assert isinstance(strategy, SingleDeviceStrategy)
    assert strategy.root_device == torch.device("cpu")


@pytest.mark.parametrize(
    ("requested", "static", "find_unused"),
    [("auto", True, False), ("auto", False, False), ("ddp_find_unused_parameters_true", False, True)],
)
def test_ddp_receives_the_options_of_the_choice(requested: str, static: bool, find_unused: bool) -> None:
    choice = choose_strategy(requested, world_size=8, device_kind="cpu", accumulate=1, model_has_static_graph=static)
    strategy = build_strategy(choice, BuildOptions("cpu", LOCATION, timeout=77))
    assert isinstance(strategy, DeterministicDDPStrategy)
    assert strategy._ddp_kwargs == {
        "gradient_as_bucket_view": True,
        "static_graph": static,
        "find_unused_parameters": find_unused,
    }
    assert strategy.process_group_backend == "gloo"
    assert strategy._timeout == timedelta(seconds=77)


def test_ddp_uses_the_node_rank_count_and_the_local_device() -> None:
    choice = choose_strategy("ddp", world_size=8, device_kind="cuda", accumulate=1, model_has_static_graph=False)
    strategy = build_strategy(choice, BuildOptions("cuda", LOCATION, timeout=60))
    assert isinstance(strategy, DDPStrategy)
    assert strategy.parallel_devices == [torch.device("cuda", n) for n in range(4)]
    assert strategy.root_device == torch.device("cuda", 1)
    assert strategy.process_group_backend == "nccl"
    assert isinstance(strategy.cluster_environment, FixedClusterEnvironment)


def test_16_mixed_on_cpu_uses_a_gradient_scaler() -> None:
    plugin = precision_plugin(Precision.FP16_MIXED, "cpu")
    assert plugin is not None
    assert plugin.precision == "16-mixed"
    scaler = plugin.scaler
    assert scaler is not None
    assert scaler.is_enabled()
    weight = torch.ones(1, requires_grad=True)
    with plugin.forward_context():
        assert torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype is torch.float16
    scale = scaler.get_scale()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(weight.sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    # An overflow: no step, and half the scale.
    assert weight.item() == 1.0
    assert scaler.get_scale() == scale / 2


@pytest.mark.parametrize(
    ("precision", "kind"),
    [(p, k) for p in Precision for k in ("cpu", "cuda", "mps") if p is not Precision.FP16_MIXED or k == "mps"],
)
def test_no_plugin_is_created_if_lightning_matches_the_plan(precision: Precision, kind: str) -> None:
    assert precision_plugin(precision, kind) is None
