"""The gathered parameters, gradients, activations and buffers that are alive at each moment of an FSDP2 step. Pure.

The order of events is that of torch 2.13's `fsdp/_fully_shard`: `_fsdp_param_group.py` (`unshard`, `wait_for_unshard`,
`post_backward`), `_fsdp_collectives.py` (`foreach_all_gather`, `foreach_reduce`) and `_fsdp_state.py`. Sizes are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from strategies.base import TrainingStep
from strategies.model_states import FP32, ModelStates, is_sharded
from strategies.sharding import ShardVariant
from strategies.step_trace import BlockEvent, Moment

_SUM_TYPES = {"fp32": FP32}


@dataclass
class ShardedStep:
    """One step of FSDP2, from which its moments follow; use it once.

    Attributes:
        states: of the rank that holds most.
        ranks: that share the states.
    """

    variant: ShardVariant
    step: TrainingStep
    states: ModelStates
    ranks: int
    _phase: str = "forward"
    _live: int = 0
    _sharded_gradients: int = 0
    _replica_gradients: int = 0
    # By block: gathered parameters, all-gather outputs, and gradients that are not sharded yet.
    _gathered: dict[int, int] = field(default_factory=dict[int, int])
    _buffers: dict[int, int] = field(default_factory=dict[int, int])
    _whole_gradients: dict[int, int] = field(default_factory=dict[int, int])
    # A block's calls in the forward pass, and the positions of those that the backward pass has not reached.
    _order: list[int] = field(default_factory=list[int])
    _positions: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    _copied: int | None = None
    _in_backward: set[int] = field(default_factory=set[int])
    _reduce_input: int = 0
    _all_reduced: int = 0

    def moments(self) -> Iterator[Moment]:
        """Moments of the last micro batch of a step, which needs most."""
        events = self.step.trace.events or tuple(self._assumed_events())
        loss = next(number for number, event in enumerate(events) if event.kind == "loss")
        yield from self._forward(events[: loss + 1])
        yield from self._backward(events[loss + 1 :])
        yield Moment("step", self._sharded_gradients, self.step.trace.inputs, 0, self._optimizer_temporaries())

    def _forward(self, events: tuple[BlockEvent, ...]) -> Iterator[Moment]:
        """The gradients of the last step are freed between the passes."""
        accumulates = self.step.accumulate > 1
        if self._is_deferred:
            self._whole_gradients = {block: self._whole_gradient(block) for block in range(len(self._blocks))}
            self._sharded_gradients = self._replicas
        else:
            self._sharded_gradients = self.states.gradients
        self._live = self.step.trace.inputs
        yield from self._gather(self._root)
        for event in events:
            yield self._moment(event.peak)
            self._live = event.live
            if event.kind == "enter" and event.index is not None:
                yield from self._gather(event.index)
            elif event.kind == "leave" and event.index is not None:
                if self.variant.reshard:
                    self._gathered.pop(event.index, None)
                self._record_call(event.index)
        self._record_call(self._root)
        self._drop_copied()
        if not accumulates:
            self._sharded_gradients = 0

    def _backward(self, events: tuple[BlockEvent, ...]) -> Iterator[Moment]:
        self._phase = "backward"
        yield from self._reach(self._root)
        for event in events:
            yield self._moment(event.peak)
            self._live = event.live
            if event.index is None:
                continue
            if event.kind == "outputs" and event.index not in self._in_backward:
                yield from self._reach(event.index)
            elif event.kind == "gradient":
                self._add_gradient(event.index)
            elif event.kind == "inputs":
                yield from self._reduce(event.index)
        # The root, then blocks whose inputs have no gradient, or that the backward pass did not reach.
        for block in (self._root, *range(self._root)):
            yield from self._reduce(block)
            self._buffers.pop(block, None)
        self._reduce_input = self._all_reduced = 0
        yield from self._reduce_replicas()

    @cached_property
    def _blocks(self) -> tuple[tuple[int, ...], ...]:
        """Sharded parameters by block; those outside of all blocks are last."""
        parameters, types = self.step.model.parameters, self.step.types
        blocks = self.step.model.blocks or (tuple(range(len(parameters))),)
        return tuple(tuple(i for i in block if is_sharded(parameters[i], types)) for block in blocks)

    @cached_property
    def _block_of(self) -> dict[int, int]:
        """Block of each sharded parameter."""
        return {index: number for number, block in enumerate(self._blocks) for index in block}

    @cached_property
    def _replicas(self) -> int:
        """Gradients of the parameters that are not sharded."""
        width = self.step.types.parameter_bytes
        trained = self._trained(range(len(self.step.model.parameters)))
        return width * sum(self.step.model.parameters[i].numel for i in trained if i not in self._block_of)

    @property
    def _root(self) -> int:
        return len(self._blocks) - 1

    @property
    def _is_deferred(self) -> bool:
        """Gradients are summed over the ranks only once per step."""
        return self.step.accumulate > 1 and not self.step.sharding.reduce_every_batch

    @property
    def _width(self) -> int:
        """Bytes of an element of a gathered parameter."""
        return self.step.types.compute_bytes or self.step.types.parameter_bytes

    @property
    def _sum_width(self) -> int:
        """Bytes of an element of a gradient while it is summed; fp32 does not narrow wider types."""
        return max(self._width, _SUM_TYPES.get(self.step.sharding.reduce_dtype, 0))

    def _shard(self, block: int, *, trainable: bool = False) -> int:
        """Elements of the block's parameters on one rank."""
        parameters = (self.step.model.parameters[i] for i in self._blocks[block])
        return sum(p.shard(self.ranks) for p in parameters if p.trainable or not trainable)

    def _moment(self, activations: int, extra: int = 0) -> Moment:
        gradients = self._sharded_gradients + self._replica_gradients + sum(self._whole_gradients.values())
        held = sum(self._gathered.values()) + sum(self._buffers.values()) + self._reduce_input + self._all_reduced
        return Moment(self._phase, gradients, activations, held + extra)

    def _gather(self, block: int) -> Iterator[Moment]:
        """`unshard` and `wait_for_unshard`: one collective into a buffer, from which the parameters are copied."""
        if block in self._gathered:
            return
        yield from self._start_gathering(block)
        self._gathered[block] = self._shard(block) * self.ranks * self._width
        yield self._moment(self._live, self._largest_cast(block) if self.ranks == 1 else 0)
        if self._phase == "forward":
            self._drop_copied()
        if self._phase == "forward" and self.ranks > 1:
            self._copied = block  # freed by the next block, so that its all-gather overlaps this copy
        else:
            self._buffers.pop(block, None)

    def _start_gathering(self, block: int) -> Iterator[Moment]:
        """The all-gather; one rank has nothing to gather."""
        if self.ranks == 1 or block in self._buffers or block in self._gathered:
            return
        shard = self._shard(block)
        self._buffers[block] = shard * self.ranks * self._width
        # Shards of another type, or of host memory, are copied first. gloo gathers into a tensor of its own.
        copied = shard * self._width if self._casts or (self.variant.offload and not self.step.whole_process) else 0
        if self._casts and self.variant.offload and not self.step.whole_process:
            copied += self._largest(block) * self.step.types.parameter_bytes
        yield self._moment(self._live, copied + (self._buffers[block] if self.step.whole_process else 0))

    @property
    def _casts(self) -> bool:
        return self._width != self.step.types.parameter_bytes

    def _largest(self, block: int) -> int:
        parameters = self.step.model.parameters
        return max((parameters[i].shard(self.ranks) for i in self._blocks[block]), default=0)

    def _largest_cast(self, block: int) -> int:
        return self._largest(block) * self._width if self._casts else 0

    def _drop_copied(self) -> None:
        if self._copied is not None:
            self._buffers.pop(self._copied, None)
        self._copied = None

    def _record_call(self, block: int) -> None:
        self._positions.setdefault(block, []).append(len(self._order))
        self._order.append(block)

    def _reach(self, block: int) -> Iterator[Moment]:
        """`pre_backward`: gathers the block, and starts to gather the one that ran before it."""
        self._in_backward.add(block)
        yield from self._gather(block)
        if self._positions.get(block):
            position = self._positions[block].pop()
            if position:
                yield from self._start_gathering(self._order[position - 1])

    def _add_gradient(self, parameter: int) -> None:
        if parameter not in self._block_of:
            self._replica_gradients += self.step.model.parameters[parameter].numel * self.step.types.parameter_bytes
            return
        if self._is_deferred:
            return  # added to the one of earlier micro batches
        block = self._block_of[parameter]
        self._whole_gradients[block] = self._whole_gradients.get(block, 0) + self._gradient(parameter)

    def _gradient(self, parameter: int) -> int:
        return self.step.model.parameters[parameter].numel * self._width

    def _whole_gradient(self, block: int) -> int:
        """Gradients of earlier micro batches, which are kept in the type in which they are summed."""
        return sum(self.step.model.parameters[i].numel * self._sum_width for i in self._trained(self._blocks[block]))

    def _reduce(self, block: int) -> Iterator[Moment]:
        """`post_backward`: frees the parameters, and sums the gradients into the shard's."""
        self._gathered.pop(block, None)
        self._in_backward.discard(block)
        self._reduce_input = 0
        trained = self._trained(self._blocks[block])
        if block not in self._whole_gradients or not trained:
            return
        shard = self._shard(block, trainable=True)
        self._reduce_input = shard * self.ranks * self._sum_width
        yield self._moment(self._live)
        # `foreach_reduce` keeps a reference to the last gradient until it returns.
        whole = self._whole_gradients.pop(block, 0)
        last = min(whole, self._gradient(trained[-1])) if self.ranks > 1 else 0
        output, own = shard * self._sum_width, shard * self.step.types.parameter_bytes
        sent = self._reduce_input if self.step.whole_process and self.ranks > 1 else 0
        yield self._moment(self._live, last + output + sent)
        is_cast = self._sum_width != self.step.types.parameter_bytes
        if is_cast:
            yield self._moment(self._live, last + output + own)
        if self.variant.hybrid and is_cast:
            self._all_reduced += output
        if self.step.accumulate == 1 or self._is_deferred:
            self._sharded_gradients += 0 if self.variant.offload else own

    def _reduce_replicas(self) -> Iterator[Moment]:
        """Gradients of parameters that are not sharded are averaged in one flat tensor."""
        if self._replicas:
            yield self._moment(self._live, 2 * self._replicas)
        self._sharded_gradients += self._replicas if self.step.accumulate == 1 else 0
        self._replica_gradients = 0

    def _optimizer_temporaries(self) -> int:
        """Those of the whole model's step, by the share of the parameters that this rank updates."""
        trained = [p for p in self.step.model.parameters if p.trainable]
        if self.variant.offload or not sum(p.numel for p in trained):
            return 0
        own = [p.shard(self.ranks) if is_sharded(p, self.step.types) else p.numel for p in trained]
        share = max(max(own) / max(p.numel for p in trained), sum(own) / sum(p.numel for p in trained))
        return math.ceil(self.step.trace.step * share)

    def _assumed_events(self) -> Iterator[BlockEvent]:
        """The events if they were not traced: blocks run in their order, and all activations stay alive."""
        forward, backward = self.step.trace.forward, self.step.trace.backward
        blocks = list(enumerate(self._blocks))[:-1]
        for number, _ in blocks:
            yield BlockEvent("enter", number, forward, forward)
            yield BlockEvent("leave", number, forward, forward)
        yield BlockEvent("loss", None, forward, forward)
        for number, block in reversed(blocks):
            yield BlockEvent("outputs", number, backward, backward)
            yield from (BlockEvent("gradient", i, backward, backward) for i in self._trained(block))
            yield BlockEvent("inputs", number, backward, backward)
        yield from (BlockEvent("gradient", i, backward, backward) for i in self._trained(self._blocks[-1]))
        yield BlockEvent("end", None, backward, backward)

    def _trained(self, block: Iterable[int]) -> list[int]:
        return [i for i in block if self.step.model.parameters[i].trainable]
