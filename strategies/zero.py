"""ZeRO by DeepSpeed: stages 1 to 3 (Rajbhandari et al. 2020), with and without offload (Ren et al. 2021, 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from strategies.base import (
    BuildOptions,
    ChoiceRequest,
    Rejected,
    StrategyChoice,
    StrategyEntry,
    StrategyError,
    TrainingStep,
    estimate_update_time,
)
from strategies.deepspeed_config import CPU, NOT_ELEMENTWISE, NVME, ZeroVariant
from strategies.machine import BACKWARD_SHARE, CollectiveTraffic, MachineModel
from strategies.model_states import ModelStates, StateTypes
from strategies.precision_names import Precision
from strategies.step_trace import ModelProfile, Moment
from strategies.zero_moments import ZeroStep
from strategies.zero_states import zero_states

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.plugins.precision import Precision as PrecisionPlugin
    from lightning.pytorch.strategies import Strategy

# Python time of DeepSpeed's hooks.
_HOOK_SECONDS = {1: 50e-6, 2: 50e-6, 3: 300e-6}
_NVME_BANDWIDTH = 3e9
_CPU_ADAM_ELEMENTS = 0.5e9  # elements/s that a host's CPU Adam updates for one rank
_SHARDED = ("the optimizer's states", "the gradients", "the parameters")


class Zero(StrategyEntry):
    """One variant of ZeRO, under Lightning's name."""

    is_sharded: ClassVar[bool] = True
    needs_deepspeed: ClassVar[bool] = True
    casts_module: ClassVar[bool] = True
    accepts_precision_plugin: ClassVar[bool] = False
    checkpoint_format: ClassVar[str] = "deepspeed"
    libraries: ClassVar[tuple[str, ...]] = ("deepspeed", "lightning.pytorch.strategies.deepspeed")
    collective_files: ClassVar[tuple[str, ...]] = ("deepspeed/comm/",)

    def __init__(self, name: str, order: int, variant: ZeroVariant, summary: str) -> None:
        self.name, self.order, self.variant, self.summary = name, order, variant, summary
        self.offload = variant.offload_optimizer
        self.hook_seconds = _HOOK_SECONDS[variant.stage]

    def choose(self, request: ChoiceRequest) -> StrategyChoice:
        """See `StrategyEntry`."""
        variant = self.variant
        if request.world_size == 1 and not variant.offloads:
            raise StrategyError(
                f"strategy {self.name} shards the model's states over the ranks, but there is one rank; start several "
                "(`devices: 2`, or torchrun), or use `strategy: auto`"
            )
        reasons = [
            f"{self.name}: requested",
            f"ZeRO stage {variant.stage}: each rank keeps 1/{request.world_size} of "
            + ", ".join(_SHARDED[: variant.stage]),
        ]
        if variant.offload_optimizer is not None:
            reasons.append(f"optimizer states are on {variant.offload_optimizer}")
        if variant.offload_parameters is not None:
            reasons.append(f"parameters are on {variant.offload_parameters}")
        reasons.append(f"{request.backend} carries gradients and parameters of {request.device_kind} devices")
        if request.device_kind == "cpu":
            reasons.append("DeepSpeed on CPUs is for debugging: it is slower than DDP and saves no memory that matters")
        rejected = (Rejected("single_device", f"there are {request.world_size} ranks"),)
        return StrategyChoice(
            self.name, tuple(reasons), rejected if request.world_size > 1 else (), backend=request.backend
        )

    def obstacle(self, profile: ModelProfile, machine: MachineModel, precision: Precision) -> str | None:
        """See `StrategyEntry`."""
        if precision is Precision.FP64_TRUE:
            return "DeepSpeed does not train in 64-true"
        if profile.zero_obstacle is not None:
            return profile.zero_obstacle
        optimizer = profile.model.optimizer.name
        if optimizer in NOT_ELEMENTWISE:
            return f"ZeRO does not take {optimizer}, which {NOT_ELEMENTWISE[optimizer]}"
        if self.offload and machine.device_kind == "cpu":
            return "a CPU's memory is the host's: there is nowhere to offload to"
        if self.offload is None and machine.world_size == 1:
            return "one rank has no other rank to share states with"
        return None

    def state_types(self, precision: Precision) -> StateTypes:
        """DeepSpeed casts the module in mixed precision too, and keeps fp32 states."""
        if precision in (Precision.FP16_TRUE, Precision.BF16_TRUE):
            return StateTypes(2, 1.0, 0.5)
        if precision in (Precision.FP16_MIXED, Precision.BF16_MIXED):
            return StateTypes(2)
        return super().state_types(precision)

    def model_states(self, step: TrainingStep, measured_optimizer: int | None = None) -> ModelStates:
        """See `StrategyEntry`; measured states are of a whole optimizer, and do not apply."""
        return zero_states(step.model, self.variant, step.world_size, step.types, step.settings)

    def moments(self, step: TrainingStep, states: ModelStates) -> Sequence[Moment]:
        """See `StrategyEntry`."""
        return list(ZeroStep(self.variant.stage, step, states, offloads=self.offload is not None).moments())

    def collectives(self, step: TrainingStep, machine: MachineModel, compute: float) -> Sequence[CollectiveTraffic]:
        """See `StrategyEntry`."""
        model, settings, accumulate = step.model, step.settings, step.accumulate
        backward = BACKWARD_SHARE * compute
        gradients = model.trainable_numel * step.types.parameter_bytes
        if self.variant.stage < 3:
            rounds = accumulate if self.variant.stage == 2 else 1
            buckets = math.ceil(model.trainable_numel / settings.reduce_bucket_size)
            return [
                CollectiveTraffic(rounds * gradients, rounds * buckets, backward * rounds / accumulate),
                # The updated parameters are gathered after the step, with nothing left to compute.
                CollectiveTraffic(gradients, buckets, 0.0),
            ]
        weights, tensors = model.numel * step.types.parameter_bytes, len(model.parameters)
        # Below the reuse distance the forward pass's parameters are still there in the backward pass.
        gathers = 1 if model.numel <= settings.max_live_parameters else 2
        rest = accumulate * ((gathers - 1) * weights + gradients)
        return [
            CollectiveTraffic(accumulate * weights, accumulate * tensors, compute - backward),
            CollectiveTraffic(rest, accumulate * tensors, backward),
        ]

    def optimizer_time(self, step: TrainingStep, machine: MachineModel) -> tuple[float, float]:
        """See `StrategyEntry`."""
        model, width = step.model, step.types.parameter_bytes
        owned = model.trainable_numel / machine.world_size
        if self.offload is None:
            return estimate_update_time(owned, step, machine), 0.0
        moved = 2 * owned * width / machine.host_bandwidth  # gradients down, weights up
        if self.variant.stage == 3:
            moved += 2 * step.accumulate * model.numel / machine.world_size * width / machine.host_bandwidth
        if self.offload == NVME:
            moved += 2 * owned * (4 + model.optimizer.state_bytes_per_element) / _NVME_BANDWIDTH
        return owned / _CPU_ADAM_ELEMENTS, moved

    def build(self, choice: StrategyChoice, options: BuildOptions) -> Strategy:
        """See `StrategyEntry`."""
        from strategies.deepspeed_strategy import CpuDeepSpeed, SharedGroupDeepSpeed
        from strategies.environment import FixedClusterEnvironment, devices_of

        config, ranks = options.deepspeed or {}, FixedClusterEnvironment(options.location)
        if options.device_kind == "cpu":
            return CpuDeepSpeed(
                config,
                cluster_environment=ranks,
                local_world_size=options.location.local_world_size,
                timeout=options.timeout,
                hooks=options.checkpoint,
                pretend_fp16=options.pretend_fp16,
            )
        return SharedGroupDeepSpeed(
            config,
            parallel_devices=devices_of(options),
            cluster_environment=ranks,
            process_group_backend=choice.backend or "nccl",
            timeout=options.timeout,
            hooks=options.checkpoint,
        )

    def precision_plugin(self, precision: Precision, device_kind: str, floor: float) -> PrecisionPlugin:
        """DeepSpeed casts and scales by itself. With a plugin, Lightning does not turn fp16 on a CPU into bf16."""
        from strategies.deepspeed_strategy import SingleScalingPrecision

        return SingleScalingPrecision(cast(Any, precision.value))

    def model_problem(self, model: LightningModule) -> str | None:
        """See `StrategyEntry`."""
        if model.automatic_optimization:
            return None
        return (
            f"{type(model).__name__} optimizes by hand (automatic_optimization is False), which {self.name} does not "
            "support: ZeRO steps by itself after the last backward of a batch; use `strategy: ddp`, or automatic "
            "optimization"
        )

    def model_notices(self, model: LightningModule) -> Sequence[str]:
        """See `StrategyEntry`."""
        from lightning.pytorch import LightningModule
        from lightning.pytorch.utilities.model_helpers import is_overridden

        hooks = (
            ("backward", "its engine runs the backward pass"),
            ("configure_gradient_clipping", "it clips by itself, by trainer.gradient_clip_val"),
        )
        return [
            f"{type(model).__name__}.{hook} has no effect under DeepSpeed: {instead}"
            for hook, instead in hooks
            if is_overridden(hook, model, LightningModule)
        ]


ZERO_1 = Zero("deepspeed_stage_1", 20, ZeroVariant(1), "ZeRO stage 1: optimizer states are sharded")
ZERO_2 = Zero("deepspeed_stage_2", 21, ZeroVariant(2), "ZeRO stage 2: gradients are sharded too")
ZERO_3 = Zero("deepspeed_stage_3", 22, ZeroVariant(3), "ZeRO stage 3: parameters are sharded too")
ZERO_2_OFFLOAD = Zero(
    "deepspeed_stage_2_offload", 30, ZeroVariant(2, CPU), "ZeRO stage 2 with optimizer states in host memory"
)
ZERO_3_OFFLOAD = Zero(
    "deepspeed_stage_3_offload", 31, ZeroVariant(3, CPU, CPU), "ZeRO stage 3 with all states in host memory"
)
ZERO_3_NVME = Zero(
    "deepspeed_stage_3_offload_nvme", 32, ZeroVariant(3, NVME, NVME), "ZeRO stage 3 with all states on NVMe"
)
