"""The ranks in the cost model, and what they exchange. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BACKWARD_SHARE = 2 / 3  # backward computes two products for each of forward's


@dataclass(frozen=True, slots=True)
class Ring:
    """Ranks that exchange with each other in a ring; several rings of this kind do so at the same time.

    Attributes:
        per_node: how many of its ranks are on the same node.
    """

    ranks: int
    per_node: int

    @property
    def crosses_nodes(self) -> bool:
        """Whether its ranks are on several nodes."""
        return self.ranks > self.per_node


@dataclass(frozen=True, slots=True)
class MachineModel:
    """The ranks: what they compute with and how they are connected.

    Attributes:
        device_kind: 'cpu', 'cuda' or 'mps'.
        flops: peak FLOP/s of one rank in the precision at hand.
        link_bandwidth: bytes/s to the ranks of the same node, one direction.
        node_bandwidth: bytes/s of one rank's share of its node's network, one direction.
        host_bandwidth: bytes/s to host memory, one direction.
        host_memory_bytes: host memory of one rank; None if not known.
        nvme_bytes: room on NVMe for one rank; None if not known.
        known: whether the numbers are this device's, or only typical ones.
        source: URL of the device's data sheet; None if the numbers are only typical ones.
    """

    device_kind: str
    world_size: int
    ranks_per_node: int
    memory_bytes: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    node_bandwidth: float
    host_bandwidth: float
    host_memory_bytes: int | None = None
    known: bool = True
    nvme_bytes: int | None = None
    source: str | None = None

    @property
    def num_nodes(self) -> int:
        """Nodes."""
        return -(-self.world_size // self.ranks_per_node)

    def ring(self, scope: Literal["world", "node", "across"] | Ring) -> Ring:
        """The ring of a scope; see `CollectiveTraffic`."""
        if isinstance(scope, Ring):
            return scope
        on_node = min(self.world_size, self.ranks_per_node)
        if scope == "across":
            return Ring(self.num_nodes, 1)
        return Ring(on_node if scope == "node" else self.world_size, on_node)


@dataclass(frozen=True, slots=True)
class CollectiveTraffic:
    """Collectives of one kind in an optimizer step.

    Attributes:
        volume: bytes that each rank sends, times N/(N-1) for a ring of N ranks.
        messages: how many there are.
        hidden_by: seconds of computing that run at the same time.
        scope: which ranks form a ring: all ('world'), those of a node ('node'), one of each node ('across'), or others.
    """

    volume: float
    messages: int
    hidden_by: float
    scope: Literal["world", "node", "across"] | Ring = "world"
