"""`estimate_memory`: bytes of one rank at the peak of a training step, by part. Pure.

Model states by `strategies.model_states`, activations by `strategies.trace`; this puts them on one line of time: what
is alive together in the forward pass, in the backward pass and in the optimizer's step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from strategies.candidates import Candidate
from strategies.model_states import FP32, ModelShape, ModelStates, StateTypes, ZeroSettings, model_states
from strategies.precision import Precision
from strategies.step_trace import StepTrace

Method = Literal["traced", "probed", "bound"]
_HALF = (Precision.FP16_TRUE, Precision.BF16_TRUE)
_MIXED = (Precision.FP16_MIXED, Precision.BF16_MIXED)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of the rank that holds most, in the phase of the step that needs most.

    Attributes:
        parameters: weights and the module's buffers.
        gradients: what is alive of them in that phase.
        optimizer_states: the optimizer's, and ZeRO's fp32 master copy.
        activations: what the step allocates: saved for backward, the batch, temporaries of ops and optimizer.
        buffers: the strategy's own: DeepSpeed's buckets and gathered parameters.
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
    over_gloo: bool = False,
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
        over_gloo: whether gloo carries the tensors, which ZeRO's collectives then copy.
    """
    measured = trace.optimizer_states if candidate.stage == 0 and method != "bound" else None
    states = model_states(
        model,
        candidate,
        world_size,
        state_types(candidate, precision),
        settings,
        accumulate_batches=accumulate,
        unsharded_optimizer_bytes=measured,
    )
    phases = _phases(model, trace, candidate, world_size, precision, states, settings, accumulate)
    if over_gloo and candidate.stage and world_size > 1:
        width = state_types(candidate, precision).parameter_bytes
        phases = _with_copies(phases, _gloo_copies(model, candidate, settings, width))
    phase, (gradients, activations, buffers) = max(phases.items(), key=lambda item: sum(item[1]))
    return MemoryEstimate(
        states.parameters,
        gradients,
        states.optimizer_states,
        activations,
        buffers,
        states.host,
        states.nvme,
        phase,
        method,
    )


def _phases(
    model: ModelShape,
    trace: StepTrace,
    candidate: Candidate,
    world_size: int,
    precision: Precision,
    states: ModelStates,
    settings: ZeroSettings,
    accumulate: int,
) -> dict[str, tuple[int, int, int]]:
    """Gradients, activations and strategy buffers that are alive together in each phase."""
    whole = states.gradients
    if candidate.name == "single_device":
        # Lightning frees the last step's gradients between forward and backward.
        both = trace.backward_with_gradients
        grown = (whole, trace.backward, 0) if accumulate > 1 else _split_peak(both, whole)
        return {"forward": (whole, trace.forward, 0), "backward": grown, "step": (whole, trace.step + trace.inputs, 0)}
    if candidate.stage == 0:
        # The buckets have their final form before there are gradients (`strategies.steady_ddp`), and stay.
        return {
            "forward": (whole, trace.forward, 0),
            "backward": (whole, trace.backward, 0),
            "step": (whole, trace.step + trace.inputs, 0),
        }
    types = state_types(candidate, precision)
    step = trace.inputs
    oversized = _oversized(model, settings) * types.parameter_bytes
    # With several ranks a full bucket is copied to be reduced.
    copied = min(settings.reduce_bucket_size, model.trainable_numel) * types.parameter_bytes if world_size > 1 else 0
    if not candidate.offload:
        step += _zero_step(model, candidate, world_size, states, types)
    if candidate.stage < 3:
        return {
            "forward": (0, trace.forward, 0),
            "backward": (whole, trace.backward, states.bucket + copied + oversized),
            "step": (whole, step, 0),
        }
    gathered = states.gathered
    if world_size > 1 or candidate.offload:
        gathered = max(gathered, min(model.numel, settings.max_live_parameters) * types.parameter_bytes)
    return {
        "forward": (whole, trace.forward, states.bucket + gathered),
        "backward": (whole, trace.backward, states.bucket + copied + oversized + gathered),
        "step": (whole, step, states.bucket + states.gathered),
    }


def _gloo_copies(model: ModelShape, candidate: Candidate, settings: ZeroSettings, width: int) -> dict[str, int]:
    """What gloo makes beside the tensors, by phase: none of it is seen by torch's dispatcher.

    A reduction to one rank has a buffer of its whole size (gloo's `reduce.cc`), a reduce-scatter is an all-reduce of a
    copy, and an all-gather goes through a flat copy of all ranks' parts (torch's `ProcessGroupGloo.cpp`).
    """
    reduced = max(min(settings.reduce_bucket_size, model.trainable_numel), _oversized(model, settings)) * width
    if candidate.stage < 3:
        return {"forward": 0, "backward": reduced, "step": 0}
    largest = max((p.numel for p in model.parameters), default=0)
    gathered = max(largest, min(settings.prefetch_bucket_size, model.numel)) * width
    return {"forward": gathered, "backward": max(gathered, reduced), "step": 0}


def _with_copies(phases: dict[str, tuple[int, int, int]], copies: dict[str, int]) -> dict[str, tuple[int, int, int]]:
    return {name: (g, a, buffers + copies[name]) for name, (g, a, buffers) in phases.items()}


def _oversized(model: ModelShape, settings: ZeroSettings) -> int:
    """Elements of the largest gradient if no bucket takes it: it stays whole while the next one is made.

    DeepSpeed's `stage_1_and_2.py`, `extra_large_param_to_reduce`, and `stage3.py`, `__add_grad_to_ipg_bucket`.
    """
    largest = max((p.numel for p in model.parameters if p.trainable), default=0)
    return largest if largest > settings.reduce_bucket_size else 0


def _split_peak(both: int, whole: int) -> tuple[int, int, int]:
    """Gradients and activations of a peak that was only seen as their sum."""
    gradients = min(whole, both)
    return gradients, both - gradients, 0


def _zero_step(model: ModelShape, candidate: Candidate, world_size: int, states: ModelStates, types: StateTypes) -> int:
    """What ZeRO's step and the optimizer allocate for the largest group, its gradients flat and in fp32."""
    elements = states.flat // FP32
    narrow = elements * types.parameter_bytes if types.parameter_bytes != FP32 else 0
    # The flat gradient in its own width is gone when the optimizer computes, unless another group follows; of several
    # ranks in stages 1 and 2 it was seen to stay.
    temporary = elements * model.optimizer.temporary_bytes_per_element
    temporary = narrow + temporary if world_size > 1 and candidate.stage < 3 else max(narrow, temporary)
    kept = elements * types.parameter_bytes if candidate.stage < 3 and len(model.trained_groups()) > 1 else 0
    return states.flat + temporary + kept
