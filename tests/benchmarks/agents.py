"""Many agents through the rendezvous: seconds and store operations. `agreement_scale.py` does the ranks' agreement.

    python -m tests.benchmarks.agents [--sizes 8 16 32 64] [--extrapolate 1000]

The agents are threads of one process; the store, its sockets and torchelastic's rendezvous are the real ones. Threads
share one interpreter, so the seconds are an upper bound of what as many machines would take. The last lines are a power
law fitted to the sizes.
"""

from __future__ import annotations

import argparse
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler


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


def serve() -> tuple[Any, Callable[[], Any]]:
    """A real store, and what makes one more client of it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=300))

    def client() -> Any:
        return dist.TCPStore(
            "127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=300)
        )

    return server, client


def all_at_once(size: int, work: Callable[[int], None]) -> float:
    """Seconds until `size` threads that begin together have done their work."""
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


def rendezvous(size: int) -> tuple[float, int]:
    """Seconds and store operations of `size` agents that meet."""
    server, client = serve()
    clients = [client() for _ in range(size)]
    counting = [Counting(one) for one in clients]
    handlers = [
        DynamicRendezvousHandler.from_backend(
            "run", own, C10dRendezvousBackend(counted, "run"), size, size, "127.0.0.1"
        )  # type: ignore[arg-type]
        for own, counted in zip(clients, counting, strict=True)
    ]
    seconds = all_at_once(size, lambda number: handlers[number].next_rendezvous() and None)
    operations = sum(counted.operations for counted in counting)
    for handler in handlers:
        handler._stop_heartbeats()
    del server
    return seconds, operations


def power_law(sizes: Sequence[int], values: Sequence[float], at: int) -> tuple[float, float]:
    """Least squares of log(value) over log(size): the exponent, and the value at `at`."""
    xs, ys = [math.log(size) for size in sizes], [math.log(max(value, 1e-6)) for value in values]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    return slope, math.exp(mean_y + slope * (math.log(at) - mean_x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--extrapolate", type=int, default=1000)
    options = parser.parse_args()
    rows: list[tuple[float, int]] = []
    for size in options.sizes:
        rows.append(rendezvous(size))
        print(f"{size:5} agents {rows[-1][0]:8.2f} s {rows[-1][1]:8} store operations", flush=True)
    if len(options.sizes) > 1:
        for what, values in (("s", [row[0] for row in rows]), ("operations", [float(row[1]) for row in rows])):
            exponent, value = power_law(options.sizes, values, options.extrapolate)
            print(f"extrapolated to {options.extrapolate} agents (exponent {exponent:.2f}): {value:.1f} {what}")


if __name__ == "__main__":
    main()
