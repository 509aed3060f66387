"""Many simulated agents through rendezvous and agreement: seconds and store operations.

    python -m tests.benchmarks.agents [--sizes 16 64 256 1000] [--torch-sizes 16 32 64 128] [--extrapolate 1000]

The agents are threads of one process, each with its own connection to a real TCPStore; they run the
product's code. They share one interpreter and the machine's cores, so the seconds are an upper bound for
the same number of machines. `torch` is torchelastic's rendezvous, which torchrun uses, in the same threads. The
connection is timed separately, because it includes name lookups. The last lines are power laws fitted to the sizes.
"""

from __future__ import annotations

import argparse
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from launcher.agent.fixed_rendezvous import FixedRendezvous, NumberedNode
from launcher.agreement.handshake import Participant, exchange
from tests.support.rank_threads import facts

_TIMEOUT = 900.0


class Counting:
    """A store's client that counts its operations."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.operations = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def count(*arguments: Any) -> Any:
            self.operations += 1
            return method(*arguments)

        return count


class Clients:
    """A real store and its clients, which are reused for larger sizes."""

    def __init__(self) -> None:
        self._server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._clients: list[Any] = []
        self._scopes = 0

    def take(self, size: int) -> list[Any]:
        """`size` clients with an empty key space."""
        while len(self._clients) < size:
            client = dist.TCPStore(
                "127.0.0.1", self._server.port, wait_for_workers=False, timeout=timedelta(seconds=_TIMEOUT)
            )
            self._clients.append(client)
        self._scopes += 1
        return [dist.PrefixStore(str(self._scopes), client) for client in self._clients[:size]]


def all_at_once(size: int, work: Callable[[int], object]) -> float:
    """Seconds until `size` threads that start together have finished."""
    barrier = threading.Barrier(size + 1)

    def one(number: int) -> None:
        barrier.wait()
        work(number)

    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(one, number) for number in range(size)]
        barrier.wait()
        began = time.perf_counter()
        for job in jobs:
            job.result()
        return time.perf_counter() - began


def fixed_rendezvous(stores: Sequence[Any]) -> tuple[float, int]:
    """Seconds and store operations of numbered agents in the launcher's rendezvous."""
    size = len(stores)
    address = RendezvousStoreInfo("127.0.0.1", 1)
    handlers = [
        FixedRendezvous(store, address, NumberedNode(number, size), _TIMEOUT) for number, store in enumerate(stores)
    ]
    counting = [Counting(store) for store in stores]
    for handler, counted in zip(handlers, counting, strict=True):
        handler._store = counted
    seconds = all_at_once(size, lambda number: handlers[number].next_rendezvous())
    return seconds, sum(counted.operations for counted in counting)


def agreement(stores: Sequence[Any]) -> tuple[float, int]:
    """Seconds and store operations of the agreement, with one rank for each agent."""
    size = len(stores)
    counting: list[Any] = [Counting(store) for store in stores]
    seconds = all_at_once(
        size,
        lambda rank: exchange(Participant(counting[rank], size, facts(rank), _TIMEOUT), lambda all_: {"n": len(all_)}),
    )
    return seconds, sum(counted.operations for counted in counting)


def torch_rendezvous(stores: Sequence[Any]) -> tuple[float, int]:
    """Seconds and store operations of agents in torchelastic's rendezvous."""
    size = len(stores)
    counting: list[Any] = [Counting(store) for store in stores]
    handlers = [
        DynamicRendezvousHandler.from_backend(
            "run", store, C10dRendezvousBackend(counted, "run"), size, size, "127.0.0.1"
        )
        for store, counted in zip(stores, counting, strict=True)
    ]
    seconds = all_at_once(size, lambda number: handlers[number].next_rendezvous())
    operations = sum(counted.operations for counted in counting)
    for handler in handlers:
        handler._stop_heartbeats()
    return seconds, operations


def power_law(sizes: Sequence[int], values: Sequence[float], at: int) -> tuple[float, float]:
    """Least squares of log(value) over log(size): the exponent, and the value at `at`."""
    xs, ys = [math.log(size) for size in sizes], [math.log(max(value, 1e-6)) for value in values]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    return slope, math.exp(mean_y + slope * (math.log(at) - mean_x))


def measure(
    what: str, run: Callable[[Sequence[Any]], tuple[float, int]], sizes: Sequence[int], clients: Clients, at: int
) -> None:
    """Run each size once, and print the cost and its extrapolation to `at` agents."""
    rows: list[tuple[float, int]] = []
    for size in sizes:
        began = time.perf_counter()
        stores = clients.take(size)
        connected = time.perf_counter() - began
        rows.append(run(stores))
        seconds, operations = rows[-1]
        print(f"{what}: {size:5} agents {seconds:8.2f} s {operations:8} store operations, {operations / size:.1f} for "
              f"each (connecting {connected:.1f} s)", flush=True)  # fmt: skip
    if len(sizes) > 1:
        for unit, values in (("s", [row[0] for row in rows]), ("operations", [float(row[1]) for row in rows])):
            exponent, value = power_law(sizes, values, at)
            label = "fitted" if at <= max(sizes) else "extrapolated"
            print(f"{what}: {label} for {at} agents (exponent {exponent:.2f}): {value:.1f} {unit}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256, 1000])
    parser.add_argument("--torch-sizes", type=int, nargs="*", default=[16, 32, 64, 128])
    parser.add_argument("--extrapolate", type=int, default=1000)
    options = parser.parse_args()
    # As the launcher does: c10d looks up the name of every address that it connects to.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")
    clients = Clients()
    measure("rendezvous", fixed_rendezvous, options.sizes, clients, options.extrapolate)
    measure("agreement", agreement, options.sizes, clients, options.extrapolate)
    if options.torch_sizes:
        measure("torch's rendezvous", torch_rendezvous, options.torch_sizes, clients, options.extrapolate)


if __name__ == "__main__":
    main()
