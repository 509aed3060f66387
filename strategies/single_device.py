"""One rank on one device."""

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
from strategies.model_states import ModelStates
from strategies.precision_names import Precision
from strategies.step_trace import ModelProfile, Moment

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


class SingleDevice(StrategyEntry):
    """Lightning's SingleDeviceStrategy."""

    name = "single_device"
    summary = "one rank, one device"
    order = 0
    needs_process_group: ClassVar[bool] = False

    def choose(self, request: ChoiceRequest) -> StrategyChoice:
        """See `StrategyEntry`."""
        if request.world_size > 1:
            raise StrategyError(
                f"strategy single_device was requested, but there are {request.world_size} ranks; "
                "use `strategy: auto`, or one rank"
            )
        rejected = (Rejected("ddp", "with one rank it only adds the cost of its buckets"),)
        return StrategyChoice(self.name, ("one rank: no gradient exchange needed",), rejected)

    def obstacle(self, profile: ModelProfile, machine: MachineModel, precision: Precision) -> str | None:
        """See `StrategyEntry`."""
        return f"there are {machine.world_size} ranks" if machine.world_size > 1 else None

    def moments(self, step: TrainingStep, states: ModelStates) -> Sequence[Moment]:
        """See `StrategyEntry`."""
        forward, backward, update = super().moments(step, states)
        if step.accumulate == 1:
            # Lightning frees the last step's gradients between forward and backward; only the peak of the sum is known.
            both = step.trace.backward_with_gradients
            first = min(states.gradients, both)
            backward = Moment("backward", first, both - first, 0)
        return [forward, backward, update]

    def collectives(self, step: TrainingStep, machine: MachineModel, compute: float) -> Sequence[CollectiveTraffic]:
        """See `StrategyEntry`."""
        return ()

    def build(self, choice: StrategyChoice, options: BuildOptions) -> Strategy:
        """See `StrategyEntry`."""
        from lightning.pytorch.strategies import SingleDeviceStrategy

        from strategies.environment import device_of

        return SingleDeviceStrategy(device=device_of(options.device_kind, options.location.local_rank))
