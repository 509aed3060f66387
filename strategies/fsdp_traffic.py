"""What FSDP2's ranks send in an optimizer step, and how long they update. Pure.

The order of collectives is that of torch 2.13: `_fully_shard/_fsdp_param_group.py` and `_fsdp_collectives.py`. Each
group of parameters, a block or the root, is one message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from strategies.base import TrainingStep, estimate_update_time
from strategies.machine import BACKWARD_SHARE, CollectiveTraffic, MachineModel, Ring
from strategies.model_states import FP32, ModelShape
from strategies.sharding import ShardVariant

# Python time of FSDP2's hooks for a group and for each of its parameters, in one micro batch. Measured on one gloo rank
# against DDP with blocks of 4 to 12 tensors: 220 to 480 us a group in 32-true, 290 to 580 us in bf16-mixed.
_GROUP_SECONDS, _PARAMETER_SECONDS = 200e-6, 20e-6
# Elements/s that torch's fused AdamW updates on a host for one rank: 3.2 times as many as its loop (0.61e9 to 0.19e9 on
# one core), of which 0.08e9 are assumed as `strategies.zero` assumes a third of DeepSpeed's.
_HOST_ELEMENTS = 0.25e9


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """How the ranks of a run share states.

    Attributes:
        shards: the ranks that share one copy of the states.
        replicas: the ranks that hold the same part of them.
    """

    shards: Ring
    replicas: Ring

    @classmethod
    def of(cls, variant: ShardVariant, machine: MachineModel, shard_ranks: int | None) -> ShardLayout:
        """`shard_ranks` consecutive ranks share states under `hsdp`; None takes those of a node."""
        world, on_node = machine.world_size, min(machine.world_size, machine.ranks_per_node)
        if not variant.hybrid:
            return cls(Ring(world, on_node), Ring(1, 1))
        together = min(shard_ranks or on_node, world)
        return cls(Ring(together, min(together, on_node)), Ring(world // together, max(1, on_node // together)))


def find_layout_problem(variant: ShardVariant, machine: MachineModel, shard_ranks: int | None) -> str | None:
    """Why ranks of this layout cannot run a variant, or gain nothing by it; None if they can."""
    if not variant.hybrid:
        return None
    world, together = machine.world_size, shard_ranks or machine.ranks_per_node
    if world % together:
        if shard_ranks is not None:
            return f"fsdp.shard_ranks {shard_ranks} does not divide {world} ranks"
        return f"{world} ranks on nodes of up to {machine.ranks_per_node} are not as many on each node"
    if together == world:
        return "with one node it is the same as fsdp2" if shard_ranks is None else "all ranks share states, as in fsdp2"
    return None


@dataclass(frozen=True, slots=True)
class ShardTraffic:
    """One step of a variant on these ranks."""

    variant: ShardVariant
    step: TrainingStep
    machine: MachineModel

    def collectives(self, compute: float) -> Sequence[CollectiveTraffic]:
        """See `StrategyEntry.collectives`.

        Forward gathers weights in the type of the computation; backward gathers those that were freed, and reduces
        gradients in `reduce_dtype`. The root's are kept from forward to backward.
        """
        step, layout = self.step, self._layout
        width = step.types.compute_bytes or step.types.parameter_bytes
        wide = max(width, FP32) if step.sharding.reduce_dtype == "fp32" else width
        groups, freed, trained = self._sizes()
        weights, again, gradients = width * sum(groups), width * sum(freed), wide * sum(trained)
        passes, reducing, backward = step.accumulate, self._reducing, BACKWARD_SHARE * compute
        found = [CollectiveTraffic(passes * weights, passes * len(groups), compute - backward, layout.shards)]
        for number, volume, messages in (
            (reducing, again + gradients, len(freed) + len(trained)),
            (passes - reducing, again, len(freed)),
        ):
            hidden_by = backward * number / passes
            found.append(CollectiveTraffic(number * volume, number * messages, hidden_by, layout.shards))
        if self.variant.hybrid:
            part = gradients / layout.shards.ranks
            hidden_by = backward * reducing / passes
            found.append(CollectiveTraffic(2 * reducing * part, reducing * len(trained), hidden_by, layout.replicas))
        return [each for each in found if each.messages]

    def optimizer_time(self) -> tuple[float, float]:
        """See `StrategyEntry.optimizer_time`."""
        step, machine, ranks = self.step, self.machine, self._layout.shards.ranks
        groups, freed, trained = (sum(sizes) / ranks for sizes in self._sizes())
        if not self.variant.offload:
            return estimate_update_time(trained, step, machine), 0.0
        # Shards go to the device for each gather, in the type in which they are kept, and those of gradients back.
        moved = step.accumulate * (groups + freed) + self._reducing * trained
        return trained / _HOST_ELEMENTS, moved * step.types.parameter_bytes / machine.host_bandwidth

    @property
    def _layout(self) -> ShardLayout:
        return ShardLayout.of(self.variant, self.machine, self.step.sharding.shard_ranks)

    @property
    def _reducing(self) -> int:
        """Backward passes of a step that reduce gradients."""
        return self.step.accumulate if self.step.sharding.reduce_every_batch else 1

    def _sizes(self) -> tuple[list[int], list[int], list[int]]:
        """Elements of each group, of those gathered twice, and of gradients, with the rows that pad the last shard."""
        ranks, parameters = self._layout.shards.ranks, self.step.model.parameters

        def size(group: Iterable[int]) -> int:
            return ranks * sum(parameters[i].shard(ranks) for i in group)

        blocks, root = list_groups(self.step.model)
        freed = [size(group) for group in blocks] if self.variant.reshard else []
        groups = [size(group) for group in (*blocks, root) if group]
        trained = [size(i for i in group if parameters[i].trainable) for group in (*blocks, root)]
        return groups, freed, [each for each in trained if each]


def list_groups(model: ModelShape) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Indices of the parameters of each block, and of the root's."""
    if not model.blocks:
        return [], tuple(range(len(model.parameters)))
    *blocks, root = model.blocks
    return [group for group in blocks if group], root


def python_seconds(step: TrainingStep) -> float:
    """See `StrategyEntry.python_seconds`."""
    blocks, root = list_groups(step.model)
    groups = len(blocks) + bool(root)
    return step.accumulate * (groups * _GROUP_SECONDS + len(step.model.parameters) * _PARAMETER_SECONDS)
