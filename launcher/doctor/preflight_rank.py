"""One rank of a preflight: measures a matrix product, the clock, an all-reduce and an exchange with its neighbours.

Started as `python -m launcher.doctor.preflight_rank RANK`; RANK is a `RankRequest` as JSON. It writes its results
after each measurement, so that a rank that dies leaves those it completed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.core.atomic_write import write_file
from launcher.doctor.preflight_findings import RankResult, exchange_rounds
from launcher.hardware.topology import Topology
from launcher.process.parent_death import die_with_parent

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

# Side of the matrices: large enough to time the device and not the launch of a kernel.
_SIDE = {"cpu": 512, "cuda": 8192}
_REPEATS = {"cpu": 20, "cuda": 60}
# On a CPU the bucket of DDP; on GPUs enough to reach the full speed of the links.
_BYTES = {"cpu": 25 * 2**20, "cuda": 256 * 2**20}
_COLLECTIVES = 5
_CLOCK_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class RankRequest:
    """What a rank receives from its node: where to write results, its ranks, the rendezvous, and seconds to wait."""

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
        """The ranks that exchange data: all on a single node, else the first of each node."""
        is_one_node = self.world_size == self.ranks_per_node
        return list(range(0, self.world_size, 1 if is_one_node else self.ranks_per_node))


def measure(rank: RankRequest, multiply: Callable[[torch.device], tuple[str, float]] | None = None) -> RankResult:
    """Run all measurements, and write the results to the folder after each; `multiply` replaces `time_product`."""
    import socket

    import torch

    from launcher.agreement.process_group import GroupSettings, open_store, process_group
    from launcher.hardware.devices import detect_hardware

    hardware = detect_hardware("cpu" if rank.cpu else "auto", rank.local_rank)
    on_gpu = hardware.device.kind == "cuda"
    device = torch.device("cuda", rank.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // rank.ranks_per_node))
    host = socket.gethostname()
    result = RankResult(rank.rank, host, hardware.device.name)

    def record(**values: Any) -> None:
        nonlocal result
        result = dataclasses.replace(result, **values)
        write_file(Path(rank.folder) / f"rank-{rank.rank}.json", json.dumps(dataclasses.asdict(result)))

    record()
    dtype, flops = (multiply or time_product)(device)
    record(dtype=dtype, flops=flops)
    if rank.world_size == 1:
        return result
    topology = Topology(
        rank=rank.rank, world_size=rank.world_size, local_rank=rank.local_rank,
        local_world_size=rank.ranks_per_node, node_rank=rank.rank // rank.ranks_per_node, host=host,
        source="torchrun", master_addr=rank.host, master_port=rank.port,
    )  # fmt: skip
    store = open_store(topology, rank.timeout)
    with process_group(store, topology, GroupSettings("nccl" if on_gpu else "gloo", "preflight", rank.timeout)):
        offset, error = compare_clocks(store, rank)
        speed, exact = time_all_reduce(device, rank)
        record(clock_offset=offset, clock_error=error, all_reduce=speed, all_reduce_sum=exact)
        record(exchange=time_exchanges(device, rank))
        _barrier(device)
    return result


def time_product(device: torch.device) -> tuple[str, float]:
    """Multiply square matrices in the fastest native precision of the device.

    Returns:
        The precision, and floating point operations per second.
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
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(one, other)
        _synchronize(device)
        times.append(time.perf_counter() - start)
    # GPU: the median shows clocks lowered by heat. CPU: the minimum, because other processes share it.
    seconds = statistics.median(times) if device.type == "cuda" else min(times)
    return name, 2 * side**3 / seconds


def compare_clocks(store: Store, rank: RankRequest) -> tuple[float, float] | tuple[None, None]:
    """Compare the clock of each node with that of rank 0 over the store.

    Uses the shortest of several round trips (Cristian 1989, "Probabilistic clock synchronization"): the error is at
    most half of the round trip.

    Returns:
        Seconds that the clock of this node is ahead of rank 0, and the largest possible error; None on ranks that are
        not the first of their node.
    """
    others = range(rank.ranks_per_node, rank.world_size, rank.ranks_per_node)
    if rank.rank == 0:
        for other in others:
            for number in range(_CLOCK_ROUNDS):
                store.get(f"preflight/ask/{other}/{number}")
                store.set(f"preflight/answer/{other}/{number}", repr(time.time()))
        return 0.0, 0.0
    if rank.rank not in others:
        return None, None
    best = 0.0, float("inf")
    for number in range(_CLOCK_ROUNDS):
        asked = time.time()
        store.set(f"preflight/ask/{rank.rank}/{number}", "")
        answer = float(store.get(f"preflight/answer/{rank.rank}/{number}"))
        received = time.time()
        error = (received - asked) / 2
        if error < best[1]:
            best = (asked + received) / 2 - answer, error
    return best


def time_all_reduce(device: torch.device, rank: RankRequest) -> tuple[float, bool]:
    """All-reduce a large tensor.

    Returns:
        Bus bandwidth in bytes per second, 2 (n - 1) / n of the tensor's size by the time (nccl-tests, PERFORMANCE.md),
        and whether the sum was correct.
    """
    import torch
    import torch.distributed as dist

    values = torch.empty(_BYTES[device.type] // 4, device=device)
    best = float("inf")
    for _ in range(_COLLECTIVES):
        values.fill_(rank.rank + 1)
        _barrier(device)
        start = time.perf_counter()
        dist.all_reduce(values)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    size = rank.world_size
    # Integers: exact in fp32 up to 5,000 ranks, in any order of addition.
    exact = bool((values == size * (size + 1) / 2).all())
    return 2 * (size - 1) / size * _BYTES[device.type] / best, exact


def time_exchanges(device: torch.device, rank: RankRequest) -> dict[int, float]:
    """Exchange a large tensor with both neighbours on the ring of `leaders`, one at a time.

    Returns:
        Partner to bytes per second in each direction; empty on the other ranks.
    """
    import torch

    leaders = rank.leaders
    sent = torch.ones(_BYTES[device.type] // 4, device=device)
    received = torch.empty_like(sent)
    found: dict[int, float] = {}
    for pairs in exchange_rounds(len(leaders)):
        _barrier(device)
        ranks = [(leaders[one], leaders[other]) for one, other in pairs]
        partner = next((b if a == rank.rank else a for a, b in ranks if rank.rank in (a, b)), None)
        if partner is not None:
            found[partner] = _BYTES[device.type] / min(_exchange(sent, received, partner) for _ in range(3))
    return found


def _exchange(sent: torch.Tensor, received: torch.Tensor, partner: int) -> float:
    import torch.distributed as dist

    _synchronize(sent.device)
    start = time.perf_counter()
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)])
    for work in works:
        work.wait()
    _synchronize(sent.device)
    return time.perf_counter() - start


def _barrier(device: torch.device) -> None:
    """A barrier that works with gloo and NCCL."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.zeros(1, device=device))
    _synchronize(device)


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    die_with_parent()
    measure(RankRequest(**json.loads(sys.argv[1])))
