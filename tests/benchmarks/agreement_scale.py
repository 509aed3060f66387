"""How the agreement grows with the number of ranks: the decision alone, and the exchange over a real store.

    python -m tests.benchmarks.agreement_scale [--decide 100000] [--clients 8 64 256 512] [--repeats 3]

The exchange runs over a real TCPStore, each simulated rank with its own connection, in threads of one process; the time
from the first rank's start to the last one's end is printed, without the connection.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from torch.distributed import PrefixStore, TCPStore

from launcher.agreement.handshake import Participant, exchange
from strategies.precision import RankCapability, reconcile
from tests.support.rank_threads import Spy, facts


def decide(count: int) -> float:
    """Seconds of `reconcile` for `count` ranks, one of which blocks the precision."""
    both = frozenset({"fp32", "fp64", "fp16", "bf16"})
    ranks = [RankCapability(n, f"node{n // 8}", "cuda", "A100", both) for n in range(count - 1)]
    ranks.append(RankCapability(count - 1, "odd", "cuda", "V100", both - {"bf16"}))
    began = time.perf_counter()
    reconcile("auto", ranks, world_size=count)
    return time.perf_counter() - began


def meet(clients: list[TCPStore], prefix: str) -> tuple[float, list[int]]:
    """Seconds of one exchange, and the store operations of each rank."""
    count = len(clients)
    spies = [Spy(PrefixStore(prefix, client)) for client in clients]
    gate = threading.Barrier(count + 1)

    def one(rank: int) -> None:
        own = facts(rank)
        gate.wait()
        exchange(Participant(spies[rank], count, own, 300.0), lambda everybody: {"ranks": len(everybody)})

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(one, rank) for rank in range(count)]
        gate.wait()
        began = time.perf_counter()
        for future in futures:
            future.result(300)
        return time.perf_counter() - began, [len(spy.operations) for spy in spies]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decide", type=int, default=100_000)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 64, 256, 512])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    seconds = statistics.median(decide(options.decide) for _ in range(options.repeats))
    print(f"reconcile over {options.decide} ranks: {seconds:.3f} s (target below 1)")
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients: list[TCPStore] = []
    for count in options.clients:
        began = time.perf_counter()
        while len(clients) < count:
            clients.append(TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False))
        connected = time.perf_counter() - began
        runs = [meet(clients[:count], f"{count}-{n}") for n in range(options.repeats)]
        operations = collections.Counter(n for _, each in runs for n in each)
        print(
            f"{count} ranks: exchange {statistics.median(s for s, _ in runs):.3f} s; store operations of a rank: "
            f"{dict(sorted(operations.items()))}; connecting one after the other {connected:.1f} s"
        )


if __name__ == "__main__":
    main()
