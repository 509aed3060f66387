"""FSDP2 by torch's `fully_shard`: states are sharded over the ranks, and gathered block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from strategies.base import (
    BuildOptions,
    ChoiceRequest,
    Rejected,
    StrategyChoice,
    StrategyEntry,
    StrategyError,
    TrainingStep,
)
from strategies.machine import CollectiveTraffic, MachineModel
from strategies.precision_names import Precision
from strategies.sharding import ShardVariant
from strategies.step_trace import ModelProfile

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


class FullyShard(StrategyEntry):
    """One variant of FSDP2."""

    is_candidate = False
    is_sharded: ClassVar[bool] = True
    checkpoint_format: ClassVar[str] = "sharded"
    libraries: ClassVar[tuple[str, ...]] = ("torch.distributed.fsdp", "torch.distributed.checkpoint")

    def __init__(self, name: str, order: int, variant: ShardVariant, summary: str) -> None:
        self.name, self.order, self.variant, self.summary = name, order, variant, summary
        self.offload = "cpu" if variant.offload else None

    def choose(self, request: ChoiceRequest) -> StrategyChoice:
        """See `StrategyEntry`."""
        if request.world_size == 1 and not self.variant.offload:
            raise StrategyError(
                f"strategy {self.name} shards the model's states over the ranks, but there is one rank; start several "
                "(`devices: 2`, or torchrun), or use `strategy: auto`"
            )
        reasons = (
            f"{self.name}: requested",
            f"{request.backend} carries gradients and parameters of {request.device_kind} devices",
        )
        rejected = (Rejected("single_device", f"there are {request.world_size} ranks"),)
        return StrategyChoice(self.name, reasons, rejected if request.world_size > 1 else (), backend=request.backend)

    def obstacle(self, profile: ModelProfile, machine: MachineModel, precision: Precision) -> str | None:
        """See `StrategyEntry`."""
        if self.offload and machine.device_kind == "cpu":
            return "a CPU's memory is the host's: there is nowhere to offload to"
        if self.offload is None and machine.world_size == 1:
            return "one rank has no other rank to share states with"
        return None

    def collectives(self, step: TrainingStep, machine: MachineModel, compute: float) -> Sequence[CollectiveTraffic]:
        """See `StrategyEntry`."""
        return []

    def build(self, choice: StrategyChoice, options: BuildOptions) -> Strategy:
        """See `StrategyEntry`."""
        from strategies.fsdp_strategy import FullyShardedStrategy

        return FullyShardedStrategy(self.variant, choice, options)


FSDP2 = FullyShard("fsdp2", 12, ShardVariant(), "FSDP2: parameters, gradients and states are sharded")
FSDP2_GRAD_OP = FullyShard(
    "fsdp2_grad_op", 13, ShardVariant(reshard=False), "FSDP2 that keeps gathered parameters for the backward pass"
)
HSDP = FullyShard("hsdp", 14, ShardVariant(hybrid=True), "FSDP2 within each node, with replicas across nodes")
FSDP2_OFFLOAD = FullyShard("fsdp2_offload", 25, ShardVariant(offload=True), "FSDP2 with all states in host memory")
