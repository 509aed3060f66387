"""DDP: every rank has the whole model, and gradients are averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, ClassVar

from strategies.base import (
    BuildOptions,
    ChoiceRequest,
    Rejected,
    StrategyChoice,
    StrategyEntry,
    TrainingStep,
)
from strategies.machine import BACKWARD_SHARE, CollectiveTraffic, MachineModel
from strategies.precision_names import Precision
from strategies.step_trace import ModelProfile

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

# Arguments of Lightning's DDPStrategy and of DistributedDataParallel that a config may set. The plan decides the rest.
DDP_OPTIONS = (
    "ddp_comm_state",
    "ddp_comm_hook",
    "ddp_comm_wrapper",
    "model_averaging_period",
    "bucket_cap_mb",
    "broadcast_buffers",
    "gradient_as_bucket_view",
    "init_sync",
    "skip_all_reduce_unused_params",
)
_BUCKET = 25 << 20  # torch's bucket_cap_mb


class Distributed(StrategyEntry):
    """Lightning's DDPStrategy, with gradients summed in the same order in every step."""

    name = "ddp"
    summary = "each rank has the whole model"
    order = 10
    accepts_ddp_options: ClassVar[bool] = True
    finds_unused: ClassVar[bool] = False

    def choose(self, request: ChoiceRequest) -> StrategyChoice:
        """See `StrategyEntry`."""
        static, why_static = self._static_graph(request)
        why = f"{request.world_size} ranks, each with the whole model" if request.is_auto else "requested"
        reasons = (
            f"DDP: {why}",
            f"{request.backend} carries the gradients of {request.device_kind} devices",
            "gradient_as_bucket_view: saves a copy of all gradients",
            why_static,
        )
        rejected = (Rejected("single_device", f"there are {request.world_size} ranks"),)
        return StrategyChoice(
            self.name,
            reasons,
            rejected if request.world_size > 1 else (),
            backend=request.backend,
            gradient_as_bucket_view=True,
            static_graph=static,
            find_unused_parameters=self.finds_unused,
        )

    def _static_graph(self, request: ChoiceRequest) -> tuple[bool, str]:
        """Safe only if each step uses the same parameters and an all-reduce follows each backward pass."""
        if self.finds_unused:
            return False, "static_graph off: unused parameters may change from step to step"
        if not request.has_static_graph:
            return False, "static_graph off: the model does not declare `static_graph = True`"
        if request.accumulate > 1:
            skipped = request.accumulate - 1
            return False, f"static_graph off: {skipped} of {request.accumulate} backward passes skip the all-reduce"
        return True, "static_graph on: the model declares that every step uses the same parameters"

    def obstacle(self, profile: ModelProfile, machine: MachineModel, precision: Precision) -> str | None:
        """See `StrategyEntry`."""
        return "with one rank it only adds the cost of its buckets" if machine.world_size == 1 else None

    def collectives(self, step: TrainingStep, machine: MachineModel, compute: float) -> Sequence[CollectiveTraffic]:
        """See `StrategyEntry`."""
        gradients = step.model.trainable_numel * step.types.parameter_bytes
        # Only the backward pass of the last micro batch communicates.
        hidden_by = BACKWARD_SHARE * compute / step.accumulate
        return [CollectiveTraffic(2 * gradients, math.ceil(gradients / _BUCKET), hidden_by)]

    def build(self, choice: StrategyChoice, options: BuildOptions) -> Strategy:
        """See `StrategyEntry`."""
        from strategies.deterministic_ddp import DeterministicDDPStrategy
        from strategies.environment import FixedClusterEnvironment, devices_of

        return DeterministicDDPStrategy(
            on_unused=options.on_unused,
            # Lightning selects this rank's device by its local rank, and counts the node's ranks by this list.
            parallel_devices=devices_of(options),
            cluster_environment=FixedClusterEnvironment(options.location),
            process_group_backend=choice.backend,
            timeout=timedelta(seconds=options.timeout),
            static_graph=choice.static_graph,
            find_unused_parameters=choice.find_unused_parameters,
            **{"gradient_as_bucket_view": choice.gradient_as_bucket_view, **(options.ddp or {})},
        )


class DistributedUnused(Distributed):
    """DDP that searches every step for parameters without a gradient. Its choice is DDP's, with that option."""

    name = "ddp_find_unused_parameters_true"
    summary = "DDP for steps that use a part of the parameters"
    order = 11
    is_candidate: ClassVar[bool] = False
    finds_unused: ClassVar[bool] = True

    def choose(self, request: ChoiceRequest) -> StrategyChoice:
        """See `StrategyEntry`."""
        return replace(super().choose(request), name=Distributed.name)
