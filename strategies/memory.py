"""`estimate_memory`: bytes of one rank at the peak of a training step, by part. Pure.

Model states by `strategies.model_states`, activations by `strategies.trace`; this puts them on one line of time: what
is alive together in the forward pass, in the backward pass and in the optimizer's step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from strategies.candidates import Candidate
from strategies.model_states import ModelShape, StateTypes, ZeroSettings, model_states
from strategies.precision import Precision
from strategies.step_trace import StepTrace
from strategies.zero_moments import Moment, ZeroStep

Method = Literal["traced", "probed", "bound"]
_HALF = (Precision.FP16_TRUE, Precision.BF16_TRUE)
# Of a CPU's process beside its tensors, once it trains: matrix products' scratch memory, autograd's and Python's
# objects. Ten families of models had 2 to 17 MiB, half of them at most 7 (`tests.benchmarks.oracle`).
PROCESS = 10 << 20
_MIXED = (Precision.FP16_MIXED, Precision.BF16_MIXED)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of the rank that holds most, in the phase of the step that needs most.

    Attributes:
        parameters: weights and the module's buffers.
        gradients: what is alive of them in that phase.
        optimizer_states: the optimizer's, and ZeRO's fp32 master copy.
        activations: what the step allocates: saved for backward, the batch, temporaries of ops and optimizer.
        buffers: the strategy's own: DeepSpeed's buckets and gathered parameters; on a CPU what a process has itself.
        host: bytes in host memory for each rank (offload); on a CPU these are the device's.
        nvme: bytes on NVMe for each rank (offload).
        phase: 'forward', 'backward' or 'step'.
        method: how activations were found: 'traced' on fake tensors, 'probed' by a real step, or an analytic 'bound'.
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

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.parameters + self.gradients + self.optimizer_states + self.activations + self.buffers


def state_types(candidate: Candidate, precision: Precision) -> StateTypes:
    """How wide a candidate keeps its states in a precision.

    Without ZeRO mixed precision is autocast over fp32 parameters, and a true half keeps everything in half; DeepSpeed
    casts the module in both, and keeps fp32 states.
    """
    if precision in _HALF:
        return StateTypes(2, 1.0 if candidate.stage else 0.5, 0.5)
    if precision in _MIXED and candidate.stage:
        return StateTypes(2)
    return StateTypes(8, 2.0, 2.0) if precision is Precision.FP64_TRUE else StateTypes()


def estimate_memory(
    model: ModelShape,
    trace: StepTrace,
    candidate: Candidate,
    world_size: int,
    precision: Precision,
    *,
    settings: ZeroSettings = ZeroSettings(),  # noqa: B008 -- frozen
    accumulate: int = 1,
    method: Method = "traced",
    whole_process: bool = False,
) -> MemoryEstimate:
    """Bytes per rank, by part, at the step's peak.

    Args:
        model: parameters and optimizer.
        trace: activations of one micro batch, traced in the types that this candidate computes in.
        candidate: the strategy.
        world_size: number of ranks.
        precision: Lightning's name.
        settings: DeepSpeed's buckets.
        accumulate: micro batches per optimizer step.
        method: how `trace` was found.
        whole_process: count what a CPU's process has with gloo, instead of what a GPU's allocator has.
    """
    measured = trace.optimizer_states if candidate.stage == 0 and method != "bound" else None
    types = state_types(candidate, precision)
    states = model_states(model, candidate, world_size, types, settings, unsharded_optimizer_bytes=measured)
    if candidate.stage:
        zero = ZeroStep(
            candidate.stage,
            model,
            trace,
            states,
            settings,
            world_size,
            types.parameter_bytes,
            accumulate,
            offloads=candidate.offload is not None,
            whole_process=whole_process,
        )
        moments = list(zero.moments())
    else:
        moments = _unsharded(candidate, trace, states.gradients, accumulate)
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
    )


def _unsharded(candidate: Candidate, trace: StepTrace, gradients: int, accumulate: int) -> list[Moment]:
    """The phases of a step with whole states on each rank."""
    step = Moment("step", gradients, trace.step + trace.inputs, 0)
    forward = Moment("forward", gradients, trace.forward, 0)
    if candidate.name == "single_device" and accumulate == 1:
        # Lightning frees the last step's gradients between forward and backward; the peak was only seen as a sum.
        both = trace.backward_with_gradients
        first = min(gradients, both)
        return [forward, Moment("backward", first, both - first, 0), step]
    # DDP's buckets have their final form before there are gradients (`strategies.deterministic_ddp`), and stay.
    return [forward, Moment("backward", gradients, trace.backward, 0), step]
