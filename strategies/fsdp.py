"""FSDP2 by torch's `fully_shard`: states are sharded over the ranks, and gathered block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from strategies.fsdp_moments import ShardedStep
from strategies.fsdp_traffic import ShardTraffic, find_layout_problem, python_seconds
from strategies.machine import CollectiveTraffic, MachineModel
from strategies.model_states import ModelStates, StateTypes, fully_sharded_states
from strategies.precision_names import Precision
from strategies.sharding import ShardOptions, ShardVariant
from strategies.step_trace import ModelProfile, Moment, StepTrace

if TYPE_CHECKING:
    from lightning.pytorch.plugins.precision import Precision as PrecisionPlugin
    from lightning.pytorch.strategies import Strategy


class FullyShard(StrategyEntry):
    """One variant of FSDP2."""

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
        return profile.fsdp_obstacle

    def traces(self, profile: ModelProfile) -> tuple[StepTrace, StepTrace]:
        """See `StrategyEntry`. In mixed precision autocast runs over parameters that are gathered in its type."""
        return profile.gathered or profile.plain

    def state_types(self, precision: Precision) -> StateTypes:
        """See `StrategyEntry`."""
        types = super().state_types(precision)
        is_mixed = precision in (Precision.FP16_MIXED, Precision.BF16_MIXED)
        return replace(types, compute_bytes=2) if is_mixed else types

    def model_states(self, step: TrainingStep, measured_optimizer: int | None = None) -> ModelStates:
        """See `StrategyEntry`; measured states are of a whole optimizer, and do not apply."""
        return fully_sharded_states(step.model, self._shard_ranks(step), step.types, offloads=self.variant.offload)

    def moments(self, step: TrainingStep, states: ModelStates) -> Sequence[Moment]:
        """See `StrategyEntry`."""
        return list(ShardedStep(self.variant, step, states, self._shard_ranks(step)).moments())

    def _shard_ranks(self, step: TrainingStep) -> int:
        """Ranks that share the states."""
        return (step.sharding.shard_ranks if self.variant.hybrid else None) or step.world_size

    def collectives(self, step: TrainingStep, machine: MachineModel, compute: float) -> Sequence[CollectiveTraffic]:
        """See `StrategyEntry`."""
        return ShardTraffic(self.variant, step, machine).collectives(compute)

    def optimizer_time(self, step: TrainingStep, machine: MachineModel) -> tuple[float, float]:
        """See `StrategyEntry`."""
        return ShardTraffic(self.variant, step, machine).optimizer_time()

    def python_seconds(self, step: TrainingStep) -> float:
        """See `StrategyEntry`."""
        return python_seconds(step)

    def layout_problem(self, machine: MachineModel, sharding: ShardOptions) -> str | None:
        """See `StrategyEntry`."""
        return find_layout_problem(self.variant, machine, sharding.shard_ranks)

    def precision_plugin(self, precision: Precision, device_kind: str, floor: float) -> PrecisionPlugin | None:
        """Lightning's parallel strategy refuses 64-true by name, but works with the plugin."""
        if precision is Precision.FP64_TRUE:
            from lightning.pytorch.plugins.precision import DoublePrecision

            return DoublePrecision()
        return super().precision_plugin(precision, device_kind, floor)

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
