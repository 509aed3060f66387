"""`StepTrace`: what one training step allocates beside the model states. Plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.model_states import ModelShape


@dataclass(frozen=True, slots=True)
class GradientArrival:
    """What a gradient finds in the backward pass when it is done, or what the pass's end finds.

    Attributes:
        gradients: bytes of the gradients that came before it.
        peak: most bytes of activations since the one before it, its own until it is accumulated.
        live: bytes of activations at this moment, its own among them.
        parameter: whose gradient it is, as an index into the model's parameters; None at the end.
    """

    gradients: int
    peak: int
    live: int
    parameter: int | None


@dataclass(frozen=True, slots=True)
class Moment:
    """What is alive at once, beside parameters and optimizer states.

    Attributes:
        phase: 'forward', 'backward' or 'step'.
        gradients: kept by this rank.
        activations: with the batch and what ops and the optimizer hold for a moment.
        buffers: the strategy's.
    """

    phase: str
    gradients: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """Bytes together."""
        return self.gradients + self.activations + self.buffers


@dataclass(frozen=True, slots=True)
class StepTrace:
    """Bytes that live at the peaks of a training step's phases, parameters and optimizer states not counted.

    Attributes:
        batch_size: samples of the traced micro batch.
        forward: most activation bytes in the forward pass, the batch included.
        backward: most activation bytes in the backward pass, a gradient counted until it is accumulated.
        backward_with_gradients: most bytes of activations and accumulated gradients together, where gradients were
            freed before the backward pass.
        inputs: bytes of the batch, which is alive in every phase.
        step: bytes that the optimizer's step allocates and frees again, without the batch.
        optimizer_states: bytes of the optimizer's states.
        flops: floating point operations of forward and backward, matrix products and convolutions alone.
        course: the backward pass, gradient by gradient, and its end; the batch is counted. Empty where it was not seen.
        kernels: bytes of code that a CPU's library makes for the step's matrix products and keeps.
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


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """What was learned of the user's module: enough to assess every strategy on any number of ranks.

    Attributes:
        model: parameters and optimizer.
        plain: traces at two micro batch sizes, small and large, as one device or DDP computes; the same one twice where
            only one could be traced.
        sharded: the same as DeepSpeed computes: in mixed precision it casts the module instead of using autocast.
        method: 'traced', 'probed' or 'bound'.
        notes: what the user should know of how it was found.
        zero_obstacle: why DeepSpeed cannot train the module; None if nothing is known to stand in the way.
    """

    model: ModelShape
    plain: tuple[StepTrace, StepTrace]
    sharded: tuple[StepTrace, StepTrace]
    method: str
    notes: tuple[str, ...] = ()
    zero_obstacle: str | None = None


@dataclass(frozen=True, slots=True)
class Unprofiled:
    """A module of which nothing could be learned.

    Attributes:
        why: what its constructor raised, in one line.
    """

    why: str


def at_batch_size(small: StepTrace, large: StepTrace, batch_size: int) -> StepTrace:
    """The trace at another batch size, on the straight line through both.

    A peak is the largest of several moments that are each affine in the number of samples, so it is convex: between the
    two sizes the line is never too low; above the larger one it may be.

    Args:
        small: traced at a smaller batch size; may be the same as `large`, which then all grows in proportion.
        large: traced at a larger one.
        batch_size: samples.
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
    # A step that takes another way with another number of samples has no course in between.
    if [(c.gradients, c.parameter) for c in small.course] == [(c.gradients, c.parameter) for c in large.course]:
        course = tuple(
            GradientArrival(high.gradients, at(low.peak, high.peak), at(low.live, high.live), high.parameter)
            for low, high in zip(small.course, large.course, strict=True)
        )
    return StepTrace(
        batch_size=batch_size,
        step=large.step,
        optimizer_states=large.optimizer_states,
        course=course,
        kernels=large.kernels,
        **values,
    )
