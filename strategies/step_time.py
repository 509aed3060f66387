"""A cost model of one optimizer step: computing, bytes on the wire, the optimizer's memory traffic. Pure.

It ranks strategies; the seconds are not a forecast. Volumes: ZeRO (Rajbhandari et al. 2020), section 7, and ring
collectives (Patarasuk and Yuan 2009): an all-reduce of S bytes over N ranks sends 2 S (N-1)/N per rank, an all-gather
or a reduce-scatter S (N-1)/N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from strategies.base import StrategyEntry, TrainingStep
from strategies.machine import CollectiveTraffic, MachineModel

# Share of a GPU's peak that large models reach in training (Narayanan et al. 2021, table 1: 44 to 52 %).
_EFFICIENCY = 0.45
# Share of a link's peak that large collectives reach.
_LINK_EFFICIENCY = 0.7
# A step of Lightning's loop takes at least so long: 0.32 ms with a model of two parameters on a CPU. Shorter estimates
# only mean that the loop decides.
STEP_FLOOR = 0.3e-3
_LATENCY_IN_NODE = 10e-6
_LATENCY_ACROSS = 30e-6


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step, by part.

    Attributes:
        compute: forward and backward.
        communication: all collectives, overlapped or not.
        exposed: the part of them that computing does not hide.
        optimizer: the optimizer's step.
        overhead: Python work of the strategy.
        bytes_per_rank: bytes that a rank sends in one optimizer step.
        bytes_across_nodes: the part of them in rings whose ranks are on several nodes; 0 on one node.
    """

    compute: float
    communication: float
    exposed: float
    optimizer: float
    overhead: float
    bytes_per_rank: int
    bytes_across_nodes: int

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.exposed + self.optimizer + self.overhead

    @property
    def bytes_inside_nodes(self) -> int:
        """The part of a rank's bytes in rings within its node."""
        return self.bytes_per_rank - self.bytes_across_nodes


def step_time(strategy: StrategyEntry, step: TrainingStep, machine: MachineModel) -> StepTime:
    """Estimate one optimizer step; the step's types are those of `strategy`."""
    compute = step.accumulate * step.trace.flops / (machine.flops * _EFFICIENCY)
    collectives = strategy.collectives(step, machine, compute)
    spent = [_seconds(each, machine) for each in collectives]
    communication = sum(spent)
    # On a CPU the exchange takes the time of the cores that compute.
    hides = machine.device_kind != "cpu"
    exposed = sum(max(0.0, time - hides * each.hidden_by) for time, each in zip(spent, collectives, strict=True))
    optimizer, moved = strategy.optimizer_time(step, machine)
    crossing = [each for each in collectives if machine.ring(each.scope).crosses_nodes]
    return StepTime(
        compute,
        communication + moved,
        exposed + moved,
        optimizer,
        strategy.python_seconds(step),
        _sent(collectives, machine),
        _sent(crossing, machine),
    )


def _sent(collectives: Sequence[CollectiveTraffic], machine: MachineModel) -> int:
    """Bytes that a rank sends."""
    volumes: dict[int, float] = {}
    for each in collectives:
        ring = machine.ring(each.scope).ranks
        volumes[ring] = volumes.get(ring, 0) + each.volume
    return round(sum(volume * ((ring - 1) / ring) for ring, volume in volumes.items()))


def _seconds(collective: CollectiveTraffic, machine: MachineModel) -> float:
    """Time of ring collectives.

    A ring crosses each border between nodes once, and a node's ranks share its network. Rings of the same kind run at
    the same time, so each has the share of the network of its ranks on the node. The slower of the link inside and of
    that share decides.
    """
    ring = machine.ring(collective.scope)
    if ring.ranks == 1:
        return 0.0
    bandwidth, latency = machine.link_bandwidth, 0.0
    if ring.per_node > 1:
        latency = _LATENCY_IN_NODE * math.log2(ring.per_node)
    if ring.crosses_nodes:
        shared = machine.node_bandwidth * ring.per_node
        bandwidth = shared if ring.per_node == 1 else min(bandwidth, shared)
        latency += _LATENCY_ACROSS * math.log2(ring.ranks / ring.per_node)
    each = collective.volume * (ring.ranks - 1) / ring.ranks
    return each / (bandwidth * _LINK_EFFICIENCY) + collective.messages * latency
