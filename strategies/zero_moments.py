"""The gradients, activations and buffers that are alive at each moment of a ZeRO step. Pure.

The order of events is DeepSpeed 0.19's: `runtime/zero/stage_1_and_2.py` (`reduce_independent_p_g_buckets_and_remove_
grads`, `reduce_ipg_grads`, `copy_grads_in_partition`, `step`), `runtime/zero/stage3.py` (`__add_grad_to_ipg_bucket`,
`__reduce_and_partition_ipg_grads`) and `partitioned_param_coordinator.py`. Sizes are bytes unless noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from strategies.model_states import FP32, ModelShape, ModelStates, ZeroSettings, owned_gradients, owned_parts
from strategies.step_trace import GradientArrival, Moment, StepTrace
from strategies.zero_reduction import Reduction, find_largest_pieces, find_offsets, find_reduction

# DeepSpeed computes a norm in fp64, on a copy of each piece (`runtime/zero/utils.py`: `get_norm_dtype`).
_NORM = 8
# Elements of offloaded states of stage 3 in one such copy (`stage3.py`: `_constant_buffered_norm2`).
_NORM_AT_ONCE = 250_000_000


@dataclass(frozen=True, slots=True)
class ZeroStep:
    """One step of ZeRO, from which its moments follow.

    Attributes:
        trace: of one micro batch, in the types that DeepSpeed computes in.
        states: of the rank that holds most.
        width: bytes of a parameter.
        offloads: whether optimizer states and gradients are in host memory.
        whole_process: count the memory of a CPU process: gloo's buffers, and of DeepSpeed's only the touched pages.
    """

    stage: int
    model: ModelShape
    trace: StepTrace
    states: ModelStates
    settings: ZeroSettings
    world_size: int
    width: int
    accumulate: int = 1
    offloads: bool = False
    whole_process: bool = False

    def moments(self) -> Iterator[Moment]:
        """Moments of the last micro batch of a step, which needs most; no optimizer step if nothing is trained."""
        if self.stage == 3:
            yield self._forward_3()
        else:
            yield Moment("forward", self._accumulated(), self.trace.forward, 0)
        late = self.stage == 1 and not self.settings.overlap_comm
        yield from self._late() if late else self._backward()
        yield from self._step()

    @property
    def _bucket(self) -> int:
        return self.settings.reduce_bucket_size * self.width

    @property
    def _all_gradients(self) -> int:
        return self.model.trainable_numel * self.width

    def _course(self) -> tuple[GradientArrival, ...]:
        """The backward pass; if it was not traced, gradients arrive in reverse order and all activations stay alive."""
        if self.trace.course:
            return self.trace.course
        peak, gradients, course = self.trace.backward, 0, list[GradientArrival]()
        for number, parameter in reversed(list(enumerate(self.model.parameters))):
            if parameter.trainable:
                course.append(GradientArrival(gradients, peak, peak, number))
                gradients += parameter.numel * self.width
        return (*course, GradientArrival(gradients, peak, peak, None))

    def _accumulated(self) -> int:
        """Gradients of earlier micro batches."""
        if self.accumulate == 1 or self.offloads:
            return 0
        return self._all_gradients if self.stage == 1 else self.states.gradients

    def _buckets(self) -> int:
        """DeepSpeed's contiguous buckets: complete on a GPU, on a CPU the pages that gradients were written to."""
        if not self.whole_process:
            return self.states.bucket
        sizes = (p.numel * self.width for p in self.model.parameters if p.trainable)
        return min(self._bucket, sum(size for size in sizes if size <= self._bucket))

    def _copies(self, content: Reduction) -> int:
        """Copies beside a bucket while it is reduced: DeepSpeed's of scattered pieces, and gloo's."""
        if self.world_size == 1:
            return 0
        if self.stage == 3:
            joined, sent = content.numel * self.width, content.numel * self.width
        else:
            joined, sent = content.joined * self.width, content.sent * self.width
        return joined + (sent if self.whole_process else 0)

    def _backward(self) -> Iterator[Moment]:
        """Gradients are copied to a bucket, which is reduced when the next one does not fit: stages 1 to 3."""
        places = find_offsets(self.model, self.world_size) if self.stage < 3 else {}
        kept = self.states.gradients if self.stage == 3 else self._accumulated()
        before, buckets, course = kept, self._buckets(), self._course()
        filled: list[tuple[int | None, int]] = []
        size = oversized = reduced = touched = 0
        # The norm of offloaded gradients is computed on the way, of others at the beginning of the step.
        norm = self._largest_norm() if self.offloads else 0
        for now, then in zip(course, (*course[1:], None), strict=True):
            touched = max(touched, size - oversized)
            made = buckets if self.stage == 3 else self._made(buckets, touched, begun=now.gradients > 0)
            beside = made + oversized + self._gathered(now.gradients)
            yield Moment("backward", kept, now.peak, beside)
            coming = 0 if then is None else then.gradients - now.gradients
            if filled and (then is None or size + coming > self._bucket):
                content = find_reduction(filled, places, self.width)
                yield Moment("backward", kept, now.live, beside + self._copies(content))
                reduced += size
                # In stage 1 the accumulated gradients are reduced, and freed as the rank's part is created.
                left = max(0, before - reduced) if self.stage == 1 else before
                kept = kept if self.stage == 3 else left + self._owned(reduced)
                yield Moment("backward", kept, now.live + norm, beside)
                filled, size, oversized = [], 0, 0
            if then is not None:
                filled.append((now.parameter, coming))
                size += coming
                oversized = coming if coming > self._bucket else oversized

    def _made(self, buckets: int, touched: int, *, begun: bool) -> int:
        """Stages 1 and 2 create a bucket at a step's first gradient; a process has the pages that it wrote to."""
        whole = buckets if begun else 0
        return min(whole, touched) if self.whole_process else whole

    def _owned(self, reduced: int) -> int:
        """What a rank keeps after so much was reduced: its buffer is allocated at once, pages when they are written."""
        if self.offloads:
            return 0
        return min(self.states.gradients, reduced) if self.whole_process else self.states.gradients

    def _largest_norm(self) -> int:
        """The largest copy for the norm of offloaded gradients, on any rank."""
        piece = max(find_largest_pieces(self.model, self.stage, self.world_size))
        return _NORM * (min(piece, _NORM_AT_ONCE) if self.stage == 3 else piece)

    def _norm(self) -> tuple[int, int]:
        """Gradients and the copy for the norm, on the rank with the largest sum."""
        pieces = find_largest_pieces(self.model, self.stage, self.world_size)
        kept = [self.states.gradients] * len(pieces)
        if self.stage < 3:
            parts = owned_parts(self.model, self.stage, self.world_size)
            owned = owned_gradients(self.model.trained_groups(), parts, self.world_size)
            kept = [elements * self.width for elements in owned]
        return max(((own, _NORM * piece) for own, piece in zip(kept, pieces, strict=True)), key=sum)

    def _late(self) -> Iterator[Moment]:
        """Stage 1 without a second stream: gradients stay until the pass is complete, and are then reduced in order."""
        course, buckets = self._course(), self._buckets()
        for arrival in course:
            # A bucket is created at the first gradient, but not written before the end.
            made = buckets if arrival.gradients and not self.whole_process else 0
            yield Moment("backward", max(arrival.gradients, self._accumulated()), arrival.peak, made)
        end, left, kept, reduced = course[-1].live, self._all_gradients, 0, 0
        places = find_offsets(self.model, self.world_size)
        norm = self._largest_norm() if self.offloads else 0
        order = [(i, self.model.parameters[i]) for group in self.model.groups for i in group]
        filled: list[tuple[int | None, int]] = []
        size = 0
        for number, parameter in [*((i, p.numel * self.width) for i, p in order if p.trainable), (None, 0)]:
            if filled and (number is None or size + parameter > self._bucket):
                yield Moment(
                    "backward", left + kept, end, buckets + self._copies(find_reduction(filled, places, self.width))
                )
                reduced += size
                kept = self._owned(reduced)
                yield Moment("backward", left + kept, end + norm, buckets)
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
        if self.world_size == 1 and not self.offloads:
            return self.states.gathered
        left = self.model.numel * self.width - gradients
        return max(self.states.gathered, min(left, self.settings.max_live_parameters * self.width))

    def _forward_3(self) -> Moment:
        """At its end all parameters are gathered, up to the limit; one fetch is copied out of the gathered buffer."""
        gathered = self._gathered(0)
        fetched = 0
        if gathered > self.states.gathered:
            largest = max((p.numel for p in self.model.parameters), default=0)
            fetched = min(self.settings.prefetch_bucket_size + largest, self.model.numel) * self.width
        return Moment("forward", self.states.gradients, self.trace.forward, self._buckets() + gathered + fetched)

    def _step(self) -> Iterator[Moment]:
        """The norm, then the groups one by one.

        A group's gradients are flattened, then cast to fp32 for the optimizer, beside those of later groups.
        """
        buffers = self._buckets() + self.states.gathered if self.stage == 3 else 0
        if self.offloads:
            yield Moment("step", 0, self.trace.inputs, buffers)
            return
        gradients = self.states.gradients
        owned, norm = self._norm()
        yield Moment("step", owned, self.trace.inputs + norm, buffers)
        parts = owned_parts(self.model, self.stage, self.world_size)
        for number, owned in enumerate(parts):
            part = min(owned, self.settings.sub_group_size) if self.stage == 3 else owned
            narrow = 0 if self.width == FP32 else part * self.width
            flat = part * FP32
            yield Moment("step", gradients, self.trace.inputs + narrow + flat, buffers)
            kept = 0 if number == len(parts) - 1 and self.stage < 3 else gradients
            temporary = part * self.model.optimizer.temporary_bytes_per_element
            yield Moment("step", kept, self.trace.inputs + flat + temporary, buffers)
