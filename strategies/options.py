"""Limits and settings of a comparison. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from strategies.machine import MachineModel
from strategies.model_states import DEFAULT_SETTINGS, ZeroSettings
from strategies.sharding import DEFAULT_SHARDING, ShardOptions


@dataclass(frozen=True, slots=True)
class ComparisonOptions:
    """Limits of a comparison.

    Attributes:
        memory_share: share of the device's memory that a rank may use, in (0, 1].
        settings: DeepSpeed's buckets.
        obstacles: name of a candidate to why these ranks cannot run it, for reasons not visible here.
        sharding: how FSDP2 shards, and whether blocks' activations are computed again.
        offers_checkpointing: activation checkpointing is off by request, so that messages may propose it.
    """

    memory_share: float = 0.92
    settings: ZeroSettings = DEFAULT_SETTINGS
    obstacles: Mapping[str, str] = field(default_factory=dict[str, str])
    sharding: ShardOptions = DEFAULT_SHARDING
    offers_checkpointing: bool = False

    def limit(self, machine: MachineModel) -> int:
        """Bytes that a rank may use."""
        return int(machine.memory_bytes * self.memory_share)

    def sharding_on(self, machine: MachineModel) -> ShardOptions:
        """How FSDP2 shards on these ranks: without a number of its own, `hsdp` shards within a node."""
        shard_ranks = self.sharding.shard_ranks or min(machine.ranks_per_node, machine.world_size)
        return replace(self.sharding, shard_ranks=shard_ranks)


DEFAULT_OPTIONS = ComparisonOptions()
