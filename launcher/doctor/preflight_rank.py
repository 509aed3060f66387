"""One rank of a preflight: a matrix product, the clock, an all-reduce, an exchange with its neighbours.

`python -m launcher.doctor.preflight_rank PLACE`, where PLACE is a `PreflightRank` as JSON. What it has measured is in
its file after each part, so that a rank which dies in the middle leaves what it knew.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.agreement.handshake import Store
from launcher.core.atomic_write import write_file
from launcher.doctor.preflight_findings import RankResult, exchange_rounds
from launcher.hardware.topology import Topology
from launcher.process.parent_death import die_with_parent

if TYPE_CHECKING:
    import torch

# Side of the matrices: large enough that the device, and not the start of a kernel, is timed.
_SIDE = {"cpu": 512, "cuda": 8192}
_REPEATS = {"cpu": 20, "cuda": 60}
# DDP's bucket on a CPU; on GPUs as much as shows the links' full speed.
_BYTES = {"cpu": 25 * 2**20, "cuda": 256 * 2**20}
_COLLECTIVES = 5
_CLOCK_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class PreflightRank:
    """What crosses from the node to its ranks.

    Attributes:
        folder: for the results.
        rank: global rank.
        world_size: number of ranks.
        ranks_per_node: of each node.
        host: of rank zero.
        port: free there.
        timeout: seconds that a rank waits for the others.
        cpu: whether to leave GPUs alone.
    """

    folder: str
    rank: int
    world_size: int
    ranks_per_node: int
    host: str
    port: int
    timeout: float
    cpu: bool = False

    @property
    def local_rank(self) -> int:
        """Rank within the node."""
        return self.rank % self.ranks_per_node

    @property
    def leaders(self) -> list[int]:
        """The ranks that exchange: all of a single node, else the first of each: they share its network."""
        one_node = self.world_size == self.ranks_per_node
        return list(range(0, self.world_size, 1 if one_node else self.ranks_per_node))


def measure(place: PreflightRank, multiply: Callable[[torch.device], tuple[str, float]] | None = None) -> RankResult:
    """Measure everything, and leave it in the folder part by part.

    Args:
        place: this rank's.
        multiply: the matrix product, `time_product` if None; returns what it multiplied in and operations per second.
    """
    import socket

    import torch

    from launcher.agreement.process_group import GroupSettings, open_store, process_group
    from launcher.hardware.devices import detect_hardware

    hardware = detect_hardware("cpu" if place.cpu else "auto", place.local_rank)
    on_gpu = hardware.device.kind == "cuda"
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.ranks_per_node))
    host = socket.gethostname()
    result = RankResult(place.rank, host, hardware.device.name)
    _write(place, result)
    dtype, flops = (multiply or time_product)(device)
    result = dataclasses.replace(result, dtype=dtype, flops=flops)
    _write(place, result)
    if place.world_size == 1:
        return result
    topology = Topology(
        rank=place.rank, world_size=place.world_size, local_rank=place.local_rank,
        local_world_size=place.ranks_per_node, node_rank=place.rank // place.ranks_per_node, host=host,
        source="torchrun", master_addr=place.host, master_port=place.port,
    )  # fmt: skip
    store = open_store(topology, place.timeout)
    with process_group(store, topology, GroupSettings("nccl" if on_gpu else "gloo", "preflight", place.timeout)):
        offset = compare_clocks(store, place)
        if offset is not None:
            result = dataclasses.replace(result, clock_offset=offset[0], clock_error=offset[1])
        speed, exact = time_all_reduce(device, place)
        result = dataclasses.replace(result, all_reduce=speed, all_reduce_sum=exact)
        _write(place, result)
        result = dataclasses.replace(result, exchange=time_exchanges(device, place))
        _write(place, result)
        _meet(device)
    return result


def time_product(device: torch.device) -> tuple[str, float]:
    """Multiply square matrices in the fastest precision that the device has natively.

    Returns:
        What was multiplied in, and floating point operations per second.
    """
    import torch

    name = "fp32"
    if device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    side = _SIDE[device.type]
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times: list[float] = []
    for _ in range(_REPEATS[device.type]):
        _settle(device)
        began = time.perf_counter()
        torch.mm(one, other)
        _settle(device)
        times.append(time.perf_counter() - began)
    # A GPU is the rank's own, and its median shows a clock that heat has lowered; a CPU is shared with whoever comes.
    seconds = statistics.median(times) if device.type == "cuda" else min(times)
    return name, 2 * side**3 / seconds


def compare_clocks(store: Store, place: PreflightRank) -> tuple[float, float] | None:
    """Compare each node's clock with rank zero's over the store.

    Of several round trips the shortest counts, as in Cristian 1989, "Probabilistic clock synchronization": the answer
    was given within the round trip, so half of it is the most that its middle is off by.

    Returns:
        Seconds that this node's clock is ahead of rank zero's, and the most that this is off by; None on ranks that
        are not the first of their node.
    """
    others = range(place.ranks_per_node, place.world_size, place.ranks_per_node)
    if place.rank == 0:
        for rank in others:
            for number in range(_CLOCK_ROUNDS):
                store.get(f"preflight/ask/{rank}/{number}")
                store.set(f"preflight/answer/{rank}/{number}", repr(time.time()))
        return 0.0, 0.0
    if place.rank not in others:
        return None
    best: tuple[float, float] | None = None
    for number in range(_CLOCK_ROUNDS):
        asked = time.time()
        store.set(f"preflight/ask/{place.rank}/{number}", "")
        theirs = float(store.get(f"preflight/answer/{place.rank}/{number}"))
        heard = time.time()
        error = (heard - asked) / 2
        if best is None or error < best[1]:
            best = (asked + heard) / 2 - theirs, error
    return best


def time_all_reduce(device: torch.device, place: PreflightRank) -> tuple[float, bool]:
    """All-reduce a large tensor.

    Returns:
        Bus bandwidth in bytes per second, 2 (n - 1) / n of the tensor's size by the time (nccl-tests, PERFORMANCE.md),
        and whether the sum was right.
    """
    import torch
    import torch.distributed as dist

    values = torch.empty(_BYTES[device.type] // 4, device=device)
    best = float("inf")
    for _ in range(_COLLECTIVES):
        values.fill_(place.rank + 1)
        _meet(device)
        began = time.perf_counter()
        dist.all_reduce(values)
        _settle(device)
        best = min(best, time.perf_counter() - began)
    size = place.world_size
    # Whole numbers: exact in fp32 up to 5,000 ranks, in whatever order they are added.
    exact = bool((values == size * (size + 1) / 2).all())
    return 2 * (size - 1) / size * _BYTES[device.type] / best, exact


def time_exchanges(device: torch.device, place: PreflightRank) -> dict[int, float]:
    """Exchange a large tensor with both neighbours on the ring of `leaders`, one after the other.

    Returns:
        Partner to bytes per second in each direction; empty on the other ranks.
    """
    import torch

    leaders = place.leaders
    sent = torch.ones(_BYTES[device.type] // 4, device=device)
    received = torch.empty_like(sent)
    found: dict[int, float] = {}
    for pairs in exchange_rounds(len(leaders)):
        _meet(device)
        ranks = [(leaders[one], leaders[other]) for one, other in pairs]
        partner = next((b if a == place.rank else a for a, b in ranks if place.rank in (a, b)), None)
        if partner is not None:
            found[partner] = _BYTES[device.type] / min(_exchange(sent, received, partner) for _ in range(3))
    return found


def _exchange(sent: torch.Tensor, received: torch.Tensor, partner: int) -> float:
    import torch.distributed as dist

    _settle(sent.device)
    began = time.perf_counter()
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)])
    for work in works:
        work.wait()
    _settle(sent.device)
    return time.perf_counter() - began


def _meet(device: torch.device) -> None:
    """A barrier that works alike on both backends."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.zeros(1, device=device))
    _settle(device)


def _settle(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _write(place: PreflightRank, result: RankResult) -> None:
    write_file(Path(place.folder) / f"rank-{place.rank}.json", json.dumps(dataclasses.asdict(result)))


def main(words: Sequence[str]) -> None:
    """Be the rank of a place."""
    die_with_parent()
    measure(PreflightRank(**json.loads(words[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
