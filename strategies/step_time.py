"""A cost model of one optimizer step: computing, bytes on the wire, the optimizer's memory traffic. Pure.

It ranks strategies; it does not promise seconds. Volumes: ZeRO (Rajbhandari et al. 2020), section 7, and ring
collectives (Patarasuk and Yuan 2009): an all-reduce of S bytes over N ranks sends 2 S (N-1)/N per rank, an all-gather
or a reduce-scatter S (N-1)/N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from strategies.candidates import Candidate
from strategies.model_states import ModelShape, ZeroSettings
from strategies.step_trace import StepTrace

# Share of a GPU's peak that large models reach in training (Narayanan et al. 2021, table 1: 44 to 52 %).
_EFFICIENCY = 0.45
# Share of a link's peak that large collectives reach.
_LINK_EFFICIENCY = 0.7
_BACKWARD_SHARE = 2 / 3  # backward computes two products for each of forward's
_DDP_BUCKET = 25 << 20  # torch's bucket_cap_mb
_LATENCY_IN_NODE = 10e-6
_LATENCY_ACROSS = 30e-6
# Python work that DeepSpeed's hooks add for each parameter tensor in each micro batch.
_HOOK_SECONDS = {1: 50e-6, 2: 50e-6, 3: 300e-6}
_NVME_BANDWIDTH = 3e9
_CPU_ADAM_ELEMENTS = 0.5e9  # elements/s that a host's CPU Adam updates for one rank


@dataclass(frozen=True, slots=True)
class MachineModel:
    """What computes and what connects.

    Attributes:
        device_kind: 'cpu', 'cuda' or 'mps'.
        world_size: number of ranks.
        ranks_per_node: ranks on one node.
        memory_bytes: device memory of one rank.
        flops: peak FLOP/s of one rank in the precision at hand.
        memory_bandwidth: bytes/s of device memory.
        link_bandwidth: bytes/s to the ranks of the same node, one direction.
        node_bandwidth: bytes/s of one rank's share of its node's network, one direction.
        host_bandwidth: bytes/s to host memory, one direction.
        host_memory_bytes: host memory of one rank; None if not known.
        nvme_bytes: room on NVMe for one rank; None if not known.
        source: address of what the device's numbers are from; None if they are only typical ones.
        known: whether the numbers are this device's, or only typical ones.
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


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step, and where they go.

    Attributes:
        compute: forward and backward.
        communication: all collectives, overlapped or not.
        exposed: what of them computing does not hide.
        optimizer: the optimizer's step.
        overhead: Python work of the strategy.
        bytes_per_rank: bytes that a rank sends in one optimizer step.
        bytes_across_nodes: bytes that leave a node in one optimizer step; 0 on one node.
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


def step_time(
    model: ModelShape,
    trace: StepTrace,
    candidate: Candidate,
    machine: MachineModel,
    *,
    parameter_bytes: int,
    accumulate: int,
    settings: ZeroSettings = ZeroSettings(),  # noqa: B008 -- frozen
) -> StepTime:
    """Estimate one optimizer step.

    Args:
        model: parameters and optimizer.
        trace: of one micro batch.
        candidate: the strategy.
        machine: the ranks.
        parameter_bytes: width of this candidate's parameters and gradients.
        accumulate: micro batches per optimizer step.
        settings: DeepSpeed's buckets.
    """
    compute = accumulate * trace.flops / (machine.flops * _EFFICIENCY)
    backward = _BACKWARD_SHARE * compute
    weights = model.numel * parameter_bytes
    gradients = model.trainable_numel * parameter_bytes
    tensors = len(model.parameters)
    hidden: list[tuple[float, float]] = []  # seconds of a collective, seconds of computing that can hide it
    sent = 0.0
    if candidate.stage == 0:
        if candidate.name != "single_device":
            sent = 2 * gradients
            last = backward / accumulate  # only the last micro batch's backward communicates
            hidden.append((_seconds(2 * gradients, math.ceil(gradients / _DDP_BUCKET), machine), last))
    elif candidate.stage < 3:
        rounds = accumulate if candidate.stage == 2 else 1
        buckets = math.ceil(model.trainable_numel / settings.reduce_bucket_size)
        sent = rounds * gradients + gradients
        hidden.append((_seconds(rounds * gradients, rounds * buckets, machine), backward * rounds / accumulate))
        # The updated parameters are gathered after the step, with nothing left to compute.
        hidden.append((_seconds(gradients, buckets, machine), 0.0))
    else:
        # Up to the reuse distance the forward pass's parameters are still there in the backward pass.
        gathers = 1 if model.numel <= settings.max_live_parameters else 2
        sent = accumulate * (gathers * weights + gradients)
        hidden.append((_seconds(accumulate * weights, accumulate * tensors, machine), compute - backward))
        rest = accumulate * ((gathers - 1) * weights + gradients)
        hidden.append((_seconds(rest, accumulate * tensors, machine), backward))
    communication = sum(seconds for seconds, _ in hidden)
    exposed = sum(max(0.0, seconds - within) for seconds, within in hidden)
    share = (machine.world_size - 1) / machine.world_size
    optimizer, moved = _optimizer(model, candidate, machine, parameter_bytes, accumulate)
    return StepTime(
        compute,
        communication + moved,
        exposed + moved,
        optimizer,
        _HOOK_SECONDS.get(candidate.stage, 0.0) * tensors * accumulate,
        round(sent * share),
        round(sent * share) if machine.num_nodes > 1 else 0,
    )


def _seconds(volume: float, messages: int, machine: MachineModel) -> float:
    """Of ring collectives that send `volume` bytes, times (N-1)/N, from each rank.

    A ring crosses each border between nodes once, and a node's ranks share its network: the slower of the link inside
    and the network between nodes decides.
    """
    if machine.world_size == 1:
        return 0.0
    each = volume * (machine.world_size - 1) / machine.world_size
    bandwidth = machine.link_bandwidth
    latency = _LATENCY_IN_NODE * math.log2(max(min(machine.world_size, machine.ranks_per_node), 2))
    if machine.num_nodes > 1:
        bandwidth = min(bandwidth, machine.node_bandwidth * machine.ranks_per_node)
        latency += _LATENCY_ACROSS * math.log2(machine.num_nodes)
    return each / (bandwidth * _LINK_EFFICIENCY) + messages * latency


def _optimizer(
    model: ModelShape, candidate: Candidate, machine: MachineModel, parameter_bytes: int, accumulate: int
) -> tuple[float, float]:
    """Seconds of the optimizer's step, and of moving states to and from host memory or NVMe."""
    owned = model.trainable_numel / (machine.world_size if candidate.stage else 1)
    if not candidate.offload:
        # Weight and states are read and written, the gradient read.
        touched = 2 * (4 + model.optimizer.state_bytes_per_element) + 4
        return owned * touched / machine.memory_bandwidth, 0.0
    moved = 2 * owned * parameter_bytes / machine.host_bandwidth  # gradients down, weights up
    if candidate.stage == 3:
        moved += 2 * accumulate * model.numel / machine.world_size * parameter_bytes / machine.host_bandwidth
    if candidate.offload == "nvme":
        moved += 2 * owned * (4 + model.optimizer.state_bytes_per_element) / _NVME_BANDWIDTH
    return owned / _CPU_ADAM_ELEMENTS, moved
