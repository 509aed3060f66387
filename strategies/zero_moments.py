"""The gradients, activations and buffers that are alive at each moment of a ZeRO step. Pure.

The order of events is DeepSpeed 0.19's: `runtime/zero/stage_1_and_2.py` (`reduce_independent_p_g_buckets_and_remove_
grads`, `reduce_ipg_grads`, `copy_grads_in_partition`, `step`), `runtime/zero/stage3.py` (`__add_grad_to_ipg_bucket`,
`__reduce_and_partition_ipg_grads`) and `partitioned_param_coordinator.py`. Sizes are bytes unless noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from strategies.base import TrainingStep
from strategies.model_states import FP32, ModelStates
from strategies.step_trace import GradientArrival, Moment
from strategies.zero_reduction import Reduction, find_largest_pieces, find_offsets, find_reduction
from strategies.zero_states import owned_gradients, owned_parts

# DeepSpeed computes a norm in fp64, on a copy of each piece (`runtime/zero/utils.py`: `get_norm_dtype`).
_NORM = 8
# Elements of offloaded states of stage 3 in one such copy (`stage3.py`: `_constant_buffered_norm2`).
_NORM_AT_ONCE = 250_000_000


@dataclass(frozen=True, slots=True)
class ZeroStep:
    """One step of ZeRO, from which its moments follow.

    Attributes:
        states: of the rank that holds most.
        offloads: whether optimizer states and gradients are in host memory.
    """

    stage: int
    step: TrainingStep
    states: ModelStates
    offloads: bool

    def moments(self) -> Iterator[Moment]:
        """Moments of the last micro batch of a step, which needs most; no optimizer step if nothing is trained."""
        if self.stage == 3:
            yield self._forward_3()
        else:
            yield Moment("forward", self._accumulated(), self.step.trace.forward, 0)
        is_deferred = self.stage == 1 and not self.step.settings.overlap_comm
        yield from self._deferred_backward() if is_deferred else self._backward()
        yield from self._optimizer_moments()

    @property
    def _width(self) -> int:
        """Bytes of a parameter."""
        return self.step.types.parameter_bytes

    @property
    def _bucket(self) -> int:
        return self.step.settings.reduce_bucket_size * self._width

    @property
    def _all_gradients(self) -> int:
        return self.step.model.trainable_numel * self._width

    def _course(self) -> tuple[GradientArrival, ...]:
        """The backward pass; if it was not traced, gradients arrive in reverse order and all activations stay alive."""
        if self.step.trace.course:
            return self.step.trace.course
        peak, gradients, course = self.step.trace.backward, 0, list[GradientArrival]()
        for number, parameter in reversed(list(enumerate(self.step.model.parameters))):
            if parameter.trainable:
                course.append(GradientArrival(gradients, peak, peak, number))
                gradients += parameter.numel * self._width
        return (*course, GradientArrival(gradients, peak, peak, None))

    def _accumulated(self) -> int:
        """Gradients of earlier micro batches."""
        if self.step.accumulate == 1 or self.offloads:
            return 0
        return self._all_gradients if self.stage == 1 else self.states.gradients

    def _buckets(self) -> int:
        """DeepSpeed's contiguous buckets: complete on a GPU, on a CPU the pages that gradients were written to."""
        if not self.step.whole_process:
            return self.states.bucket
        sizes = (p.numel * self._width for p in self.step.model.parameters if p.trainable)
        return min(self._bucket, sum(size for size in sizes if size <= self._bucket))

    def _reduction_copies(self, content: Reduction) -> int:
        """Copies while a bucket is reduced: DeepSpeed's of scattered pieces, and gloo's."""
        if self.step.world_size == 1:
            return 0
        if self.stage == 3:
            joined, sent = content.numel * self._width, content.numel * self._width
        else:
            joined, sent = content.joined * self._width, content.sent * self._width
        return joined + (sent if self.step.whole_process else 0)

    def _backward(self) -> Iterator[Moment]:
        """Gradients are copied to a bucket, which is reduced when the next one does not fit: stages 1 to 3."""
        places = find_offsets(self.step.model, self.step.world_size) if self.stage < 3 else {}
        kept = self.states.gradients if self.stage == 3 else self._accumulated()
        before, buckets, course = kept, self._buckets(), self._course()
        filled: list[tuple[int | None, int]] = []
        size = oversized = reduced = touched = 0
        # The norm of offloaded gradients is computed on the way, of others at the beginning of the step.
        norm = self._largest_norm() if self.offloads else 0
        for now, then in zip(course, (*course[1:], None), strict=True):
            touched = max(touched, size - oversized)
            allocated = buckets if self.stage == 3 else self._bucket_bytes(buckets, touched, begun=now.gradients > 0)
            buffers = allocated + oversized + self._gathered(now.gradients)
            yield Moment("backward", kept, now.peak, buffers)
            incoming = 0 if then is None else then.gradients - now.gradients
            if filled and (then is None or size + incoming > self._bucket):
                content = find_reduction(filled, places, self._width)
                yield Moment("backward", kept, now.live, buffers + self._reduction_copies(content))
                reduced += size
                # In stage 1 the accumulated gradients are reduced, and freed as the rank's part is created.
                left = max(0, before - reduced) if self.stage == 1 else before
                kept = kept if self.stage == 3 else left + self._kept_gradients(reduced)
                yield Moment("backward", kept, now.live, buffers, norm)
                filled, size, oversized = [], 0, 0
            if then is not None:
                filled.append((now.parameter, incoming))
                size += incoming
                oversized = incoming if incoming > self._bucket else oversized

    def _bucket_bytes(self, buckets: int, touched: int, *, begun: bool) -> int:
        """Stages 1 and 2 create a bucket at a step's first gradient; a process has the pages that it wrote to."""
        whole = buckets if begun else 0
        return min(whole, touched) if self.step.whole_process else whole

    def _kept_gradients(self, reduced: int) -> int:
        """Gradients kept after `reduced` bytes: the buffer is allocated at once, its pages when they are written."""
        if self.offloads:
            return 0
        return min(self.states.gradients, reduced) if self.step.whole_process else self.states.gradients

    def _largest_norm(self) -> int:
        """The largest copy for the norm of offloaded gradients, on any rank."""
        piece = max(find_largest_pieces(self.step.model, self.stage, self.step.world_size))
        return _NORM * (min(piece, _NORM_AT_ONCE) if self.stage == 3 else piece)

    def _norm(self) -> tuple[int, int]:
        """Gradients and the copy for the norm, on the rank with the largest sum."""
        pieces = find_largest_pieces(self.step.model, self.stage, self.step.world_size)
        kept = [self.states.gradients] * len(pieces)
        if self.stage < 3:
            parts = owned_parts(self.step.model, self.stage, self.step.world_size)
            owned = owned_gradients(self.step.model.trained_groups(), parts, self.step.world_size)
            kept = [elements * self._width for elements in owned]
        return max(((own, _NORM * piece) for own, piece in zip(kept, pieces, strict=True)), key=sum)

    def _deferred_backward(self) -> Iterator[Moment]:
        """Stage 1 without a second stream: gradients stay until the pass is complete, and are then reduced in order."""
        course, buckets = self._course(), self._buckets()
        for arrival in course:
            # A bucket is created at the first gradient, but not written before the end.
            allocated = buckets if arrival.gradients and not self.step.whole_process else 0
            yield Moment("backward", max(arrival.gradients, self._accumulated()), arrival.peak, allocated)
        end, left, kept, reduced = course[-1].live, self._all_gradients, 0, 0
        places = find_offsets(self.step.model, self.step.world_size)
        norm = self._largest_norm() if self.offloads else 0
        order = [(i, self.step.model.parameters[i]) for group in self.step.model.groups for i in group]
        filled: list[tuple[int | None, int]] = []
        size = 0
        for number, parameter in [*((i, p.numel * self._width) for i, p in order if p.trainable), (None, 0)]:
            if filled and (number is None or size + parameter > self._bucket):
                content = find_reduction(filled, places, self._width)
                yield Moment("backward", left + kept, end, buckets + self._reduction_copies(content))
                reduced += size
                kept = self._kept_gradients(reduced)
                yield Moment("backward", left + kept, end, buckets, norm)
                # A gradient larger than a bucket is freed when the rank has its copy.
                left -= size if size > self._bucket else 0
                filled, size = [], 0
            if number is not None:
                filled.append((number, parameter))
                size += parameter
                left -= parameter if parameter <= self._bucket else 0

    def _gathered(self, gradients: int) -> int:
        """Gathered parameters of stage 3 after so many gradients: those of finished layers are released."""
        if self.stage < 3:
            return 0
        if self.step.world_size == 1 and not self.offloads:
            return self.states.gathered
        left = self.step.model.numel * self._width - gradients
        return max(self.states.gathered, min(left, self.step.settings.max_live_parameters * self._width))

    def _forward_3(self) -> Moment:
        """At its end all parameters are gathered, up to the limit; one fetch is copied out of the gathered buffer."""
        gathered = self._gathered(0)
        fetched = 0
        if gathered > self.states.gathered:
            largest = max((p.numel for p in self.step.model.parameters), default=0)
            fetched = min(self.step.settings.prefetch_bucket_size + largest, self.step.model.numel) * self._width
        return Moment("forward", self.states.gradients, self.step.trace.forward, self._buckets() + gathered + fetched)

    def _optimizer_moments(self) -> Iterator[Moment]:
        """The norm, then the groups one by one.

        A group's gradients are flattened, then cast to fp32 for the optimizer, while those of later groups stay.
        """
        buffers = self._buckets() + self.states.gathered if self.stage == 3 else 0
        if self.offloads:
            yield Moment("step", 0, self.step.trace.inputs, buffers)
            return
        gradients = self.states.gradients
        owned, norm = self._norm()
        yield Moment("step", owned, self.step.trace.inputs, buffers, norm)
        parts = owned_parts(self.step.model, self.stage, self.step.world_size)
        for number, owned in enumerate(parts):
            part = min(owned, self.step.settings.sub_group_size) if self.stage == 3 else owned
            narrow = 0 if self._width == FP32 else part * self._width
            flat = part * FP32
            yield Moment("step", gradients, self.step.trace.inputs, buffers, narrow + flat)
            kept = 0 if number == len(parts) - 1 and self.stage < 3 else gradients
            temporary = part * self.step.model.optimizer.temporary_bytes_per_element
            yield Moment("step", kept, self.step.trace.inputs, buffers, flat + temporary)
