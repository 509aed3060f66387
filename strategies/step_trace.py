"""`StepTrace`: bytes that one training step allocates in addition to the model states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from strategies.model_states import ModelShape


@dataclass(frozen=True, slots=True)
class GradientArrival:
    """Memory in the backward pass at the moment when a gradient is complete, or at the end of the pass.

    Attributes:
        gradients: bytes of the earlier gradients.
        peak: most bytes of activations since the previous gradient; a gradient counts until it is accumulated.
        live: bytes of activations at this moment, with this gradient.
        parameter: whose gradient it is, as an index into the model's parameters; None at the end.
    """

    gradients: int
    peak: int
    live: int
    parameter: int | None


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """Memory of activations when a block of the model, or one of its gradients, is reached.

    Attributes:
        kind: in the forward pass 'enter' and 'leave' of a block, and 'loss' at its end; in the backward pass 'outputs'
            when it reaches a block, 'gradient' of a parameter, 'inputs' when a block is complete, and 'end'.
        index: of the block in the model's blocks, or of the parameter; None for the whole model.
        peak: most bytes of activations since the previous event; a gradient counts until it is accumulated.
        live: bytes of activations at this moment.
    """

    kind: str
    index: int | None
    peak: int
    live: int


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes that are alive at one moment, without parameters and optimizer states.

    Attributes:
        phase: 'forward', 'backward' or 'step'.
        activations: saved for backward, the batch and temporaries of ops.
        temporaries: of the optimizer's step: copies for the gradients' norm, flat gradients, the update itself.
    """

    phase: str
    gradients: int
    activations: int
    buffers: int
    temporaries: int = 0

    @property
    def total(self) -> int:
        """Bytes together."""
        return self.gradients + self.activations + self.buffers + self.temporaries


@dataclass(frozen=True, slots=True)
class StepTrace:
    """Bytes at the peaks of a training step's phases, without parameters and optimizer states.

    Attributes:
        batch_size: samples of the traced micro batch.
        forward: most activation bytes in the forward pass, the batch included.
        backward: most activation bytes in the backward pass, a gradient counted until it is accumulated.
        backward_with_gradients: most bytes of activations and accumulated gradients together, where gradients were
            freed before the backward pass.
        inputs: bytes of the batch, which is alive in every phase.
        step: bytes that the optimizer's step allocates and frees again, without the batch.
        optimizer_states: bytes of the optimizer's states.
        flops: floating point operations of matrix products and convolutions, forward and backward.
        course: the backward pass, gradient by gradient, and its end, with the batch. Empty if it was not traced.
        kernels: bytes of code that a CPU's library generates for the step's matrix products and keeps.
        events: both passes, block by block, with the batch. Empty if they were not traced.
    """

    batch_size: int
    forward: int
    backward: int
    backward_with_gradients: int
    inputs: int
    step: int
    optimizer_states: int
    flops: int
    course: tuple[GradientArrival, ...] = ()
    kernels: int = 0
    events: tuple[BlockEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Numbers of the user's module that suffice to assess every strategy on any number of ranks.

    Attributes:
        model: parameters and optimizer.
        plain: traces at two micro batch sizes, small and large, as one device or DDP computes; the same one twice if
            only one could be traced.
        sharded: the same for strategies that cast the module in mixed precision instead of using autocast.
        gathered: the same for strategies that cast the parameters and use autocast; None if it is `plain`.
        method: 'traced', 'probed' or 'bound'.
        notes: what the user should know about the method.
        zero_obstacle: why DeepSpeed cannot train the module; None if no reason is known.
        fsdp_obstacle: the same for FSDP2.
        checkpointed: traces the module again with activation checkpointing, and returns None if that fails. None if it
            was traced so already, or not at all.
        flops_per_sample: floating point operations of a sample, forward and backward, without activation checkpointing;
            None if no step was traced.
    """

    model: ModelShape
    plain: tuple[StepTrace, StepTrace]
    sharded: tuple[StepTrace, StepTrace]
    method: str
    notes: tuple[str, ...] = ()
    zero_obstacle: str | None = None
    fsdp_obstacle: str | None = None
    gathered: tuple[StepTrace, StepTrace] | None = None
    checkpointed: Callable[[], ModelProfile | None] | None = field(default=None, compare=False)
    flops_per_sample: float | None = None


@dataclass(frozen=True, slots=True)
class Unprofiled:
    """A module that could not be created, and the error of its constructor in one line."""

    why: str


def at_batch_size(small: StepTrace, large: StepTrace, batch_size: int) -> StepTrace:
    """The trace at another batch size, by linear interpolation.

    A peak is the maximum of several moments that are each affine in the number of samples, so it is convex: the line
    is never too low between the two sizes, but can be above the larger one.
    """
    if batch_size == large.batch_size:
        return large
    between = large.batch_size - small.batch_size

    def at(low: int, high: int) -> int:
        slope = (high - low) / between if between else high / max(large.batch_size, 1)
        return max(0, round(high + slope * (batch_size - large.batch_size)))

    values: dict[str, int] = {
        name: at(getattr(small, name), getattr(large, name))
        for name in ("forward", "backward", "backward_with_gradients", "inputs", "flops")
    }
    course: tuple[GradientArrival, ...] = ()
    # A step that runs other code with another number of samples cannot be interpolated.
    if [(c.gradients, c.parameter) for c in small.course] == [(c.gradients, c.parameter) for c in large.course]:
        course = tuple(
            GradientArrival(high.gradients, at(low.peak, high.peak), at(low.live, high.live), high.parameter)
            for low, high in zip(small.course, large.course, strict=True)
        )
    events: tuple[BlockEvent, ...] = ()
    if [(e.kind, e.index) for e in small.events] == [(e.kind, e.index) for e in large.events]:
        events = tuple(
            BlockEvent(high.kind, high.index, at(low.peak, high.peak), at(low.live, high.live))
            for low, high in zip(small.events, large.events, strict=True)
        )
    return StepTrace(
        batch_size=batch_size,
        step=large.step,
        optimizer_states=large.optimizer_states,
        course=course,
        kernels=large.kernels,
        events=events,
        **values,
    )
