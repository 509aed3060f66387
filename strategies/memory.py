"""`estimate_memory`: bytes of one rank at the peak of a training step, by part. Pure.

A strategy gives the model states and the moments of a step that can be its peak; `strategies.trace` the activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from strategies.base import StrategyEntry, TrainingStep
from strategies.model_states import DEFAULT_SETTINGS, ModelShape, ZeroSettings
from strategies.precision import Precision
from strategies.sharding import DEFAULT_SHARDING, ShardOptions
from strategies.step_trace import StepTrace

Method = Literal["traced", "probed", "bound"]
# Memory of a CPU process while it trains, without tensors: scratch memory of matrix products, objects of autograd and
# Python. Ten families of models had 2 to 17 MiB, half of them at most 7 (`tests.benchmarks.oracle`).
PROCESS = 10 << 20


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of the rank that holds most, in the phase of the step that needs most.

    Attributes:
        parameters: weights and the module's buffers.
        optimizer_states: the optimizer's, and ZeRO's fp32 master copy.
        activations: allocated by forward and backward: saved for backward, the batch, temporaries of ops.
        buffers: of the strategy: DeepSpeed's buckets and gathered parameters; on a CPU also those of the process.
        host: bytes in host memory for each rank (offload).
        nvme: bytes on NVMe for each rank (offload).
        phase: 'forward', 'backward' or 'step'.
        method: how activations were found: 'traced' on fake tensors, 'probed' by a real step, or an analytic 'bound'.
        temporaries: allocated and freed by the optimizer's step.
    """

    parameters: int
    gradients: int
    optimizer_states: int
    activations: int
    buffers: int
    host: int
    nvme: int
    phase: str
    method: Method
    temporaries: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        allocated = self.activations + self.buffers + self.temporaries
        return self.parameters + self.gradients + self.optimizer_states + allocated


def estimate_memory(
    model: ModelShape,
    trace: StepTrace,
    candidate: StrategyEntry,
    world_size: int,
    precision: Precision,
    *,
    settings: ZeroSettings = DEFAULT_SETTINGS,
    accumulate: int = 1,
    method: Method = "traced",
    whole_process: bool = False,
    sharding: ShardOptions = DEFAULT_SHARDING,
) -> MemoryEstimate:
    """Bytes per rank, by part, at the step's peak.

    `trace` was traced in the types that the candidate computes in, and `method` is how. With `whole_process` the memory
    of a CPU process with gloo counts, instead of that of a GPU's allocator. `sharding` is how FSDP2 shards.
    """
    types = candidate.state_types(precision)
    step = TrainingStep(model, trace, world_size, types, accumulate, settings, whole_process, sharding)
    states = candidate.model_states(step, None if method == "bound" else trace.optimizer_states)
    moments = candidate.moments(step, states)
    most = max(moments, key=lambda moment: moment.total)
    own = PROCESS + trace.kernels if whole_process else 0
    return MemoryEstimate(
        states.parameters,
        most.gradients,
        states.optimizer_states,
        most.activations,
        most.buffers + own,
        states.host,
        states.nvme,
        most.phase,
        method,
        most.temporaries,
    )
