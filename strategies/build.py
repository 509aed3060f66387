"""Lightning's own objects for a choice of strategy and precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.plugins.precision import Precision as PrecisionPlugin
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from typing_extensions import override

from strategies.choice import DDP, StrategyChoice
from strategies.deepspeed_config import VARIANTS
from strategies.deterministic_ddp import DeterministicDDPStrategy
from strategies.loss_scale import DEFAULT_FLOOR, CountingGradScaler
from strategies.precision import Precision


@dataclass(frozen=True)
class PreflightRank:
    """Where a rank stands; the same meaning as torchrun's variables.

    Attributes:
        rank: global rank.
        world_size: number of ranks.
        local_rank: rank within the node, and the number of its device.
        local_world_size: ranks on this node.
        node_rank: rank of the node.
        main_address: host of rank zero's store.
        main_port: its port.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    main_address: str
    main_port: int


class FixedClusterEnvironment(ClusterEnvironment):
    """Tells Lightning what is known already, so that it neither guesses from the environment nor starts processes."""

    def __init__(self, place: PreflightRank) -> None:
        super().__init__()
        self._place = place

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return self._place.main_address

    @property
    @override
    def main_port(self) -> int:
        return self._place.main_port

    @staticmethod
    @override
    def detect() -> bool:
        return False

    @override
    def world_size(self) -> int:
        return self._place.world_size

    @override
    def set_world_size(self, size: int) -> None:
        if size != self._place.world_size:
            raise ValueError(f"Lightning counts {size} ranks, the launcher agreed on {self._place.world_size}")

    @override
    def global_rank(self) -> int:
        return self._place.rank

    @override
    def set_global_rank(self, rank: int) -> None:
        if rank != self._place.rank:
            raise ValueError(f"Lightning calls this rank {rank}, the launcher {self._place.rank}")

    @override
    def local_rank(self) -> int:
        return self._place.local_rank

    @override
    def node_rank(self) -> int:
        return self._place.node_rank


def build_strategy(
    choice: StrategyChoice,
    device_kind: str,
    place: PreflightRank,
    timeout: float,
    *,
    deepspeed: Mapping[str, Any] | None = None,
    pretend_fp16: bool = False,
    ddp: Mapping[str, Any] | None = None,
    on_unused: Callable[[tuple[str, ...]], None] | None = None,
) -> Strategy:
    """The strategy as Lightning's object.

    Args:
        choice: what was chosen.
        device_kind: 'cpu', 'cuda' or 'mps'.
        place: this rank's.
        timeout: seconds after which a collective fails; only used if Lightning itself makes a process group.
        deepspeed: DeepSpeed's whole config, for one of its variants.
        pretend_fp16: for tests: DeepSpeed takes fp16 on a CPU.
        ddp: the user's own arguments of Lightning's DDPStrategy.
        on_unused: see `DeterministicDDPStrategy`.
    """
    if choice.name in VARIANTS:
        return _deepspeed(choice, device_kind, place, timeout, deepspeed or {}, pretend_fp16)
    if choice.name != DDP:
        return SingleDeviceStrategy(device=_device(device_kind, place.local_rank))
    return DeterministicDDPStrategy(
        on_unused=on_unused,
        # Lightning takes this rank's by its local rank, and counts the node's ranks by them.
        parallel_devices=[_device(device_kind, n) for n in range(place.local_world_size)],
        cluster_environment=FixedClusterEnvironment(place),
        process_group_backend=choice.backend,
        timeout=timedelta(seconds=timeout),
        static_graph=choice.static_graph,
        find_unused_parameters=choice.find_unused_parameters,
        **{"gradient_as_bucket_view": choice.gradient_as_bucket_view, **(ddp or {})},
    )


def _deepspeed(
    choice: StrategyChoice,
    device_kind: str,
    place: PreflightRank,
    timeout: float,
    config: Mapping[str, Any],
    pretend_fp16: bool,
) -> Strategy:
    # Here, not above: Lightning's module of it takes its time, and most runs are without.
    from strategies.deepspeed_strategy import CpuDeepSpeed, SharedGroupDeepSpeed

    ranks = FixedClusterEnvironment(place)
    if device_kind == "cpu":
        return CpuDeepSpeed(
            config,
            cluster_environment=ranks,
            local_world_size=place.local_world_size,
            timeout=timeout,
            pretend_fp16=pretend_fp16,
        )
    return SharedGroupDeepSpeed(
        config,
        parallel_devices=[_device(device_kind, n) for n in range(place.local_world_size)],
        cluster_environment=ranks,
        process_group_backend=choice.backend or "nccl",
        timeout=timeout,
    )


def _device(kind: str, index: int) -> torch.device:
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, index)


def precision_plugin(
    precision: Precision, device_kind: str, floor: float = DEFAULT_FLOOR, *, strategy: str = ""
) -> PrecisionPlugin | None:
    """A plugin where Lightning's own choice would differ from the plan; None where its `precision` flag does it.

    In 16-mixed the scaler is to count what it skips. Lightning also turns 16-mixed on a CPU into bf16-mixed; torch has
    had a CPU GradScaler since 2.3, so that is not needed.

    Args:
        precision: the plan's.
        device_kind: 'cpu', 'cuda' or 'mps'.
        floor: a loss scale at or below it counts as collapsed.
        strategy: the plan's; DeepSpeed needs a plugin of its own.
    """
    if strategy in VARIANTS:
        from strategies.deepspeed_strategy import AccumulatesOnce

        # DeepSpeed casts and scales by itself; given here, Lightning does not turn fp16 on a CPU into bf16.
        return AccumulatesOnce(cast(Any, precision.value))
    if precision is Precision.FP16_MIXED and device_kind in ("cpu", "cuda"):
        return MixedPrecision("16-mixed", device_kind, CountingGradScaler(device_kind, floor=floor))
    return None
